"""A data root under examination: what the parts of the data doctor share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_utils.check.findings import Report
from data_utils.errors import MMRoleError
from data_utils.files import read_json
from data_utils.images import find_image, leads_outside
from data_utils.paths import SHOWN, listed
from data_utils.roots import Characters
from data_utils.schema import Record, Row, validate_row
from qwen_vl.tokenization import SPECIAL_TOKENS

SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
COCO = "COCO/"
UNREADABLE = object()  # instead of a file's content, which may be null
_LEFTOVER = re.compile(r"\{[A-Za-z_]+\}")


@dataclass
class Examination:
    """A data root that is looked at, and what its parts need to know of each other.

    Attributes:
        root: The data root.
        report: What was found.
        characters: Everybody who may speak, of all roots.
        image_roots: The data roots whose images may be referred to, this one first.
        tested: Ids of the dialogues that test samples were drawn from, of all roots.
        wanted: Test samples by the id of their dialogue.
        images: Who first refers to an image: file and id.
        trained: Images of dialogues that training samples are made of.
        ids: The root and the file in which an id was seen first, by kind of record.
    """

    root: Path
    report: Report
    characters: Characters
    image_roots: list[Path]
    tested: set[str] = field(default_factory=set)
    wanted: dict[str, list[tuple[str, Row]]] = field(default_factory=dict)
    images: dict[str, tuple[str, str]] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    ids: dict[tuple[str, str], tuple[Path, str]] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        """A file's name as findings show it."""
        return path.relative_to(self.root).as_posix()

    def read(self, path: Path) -> Any:
        """A JSON file's content, or `UNREADABLE` if it cannot be read, which is a finding."""
        try:
            return read_json(path)
        except MMRoleError as error:
            detail = ", ".join(str(part) for part in (error.what, error.value) if part and str(part) != str(path))
            self.report.add("unreadable_file", self.name(path), _place(error, path), detail)
            return UNREADABLE

    def files(self, folder: str) -> list[Path]:
        """The JSON files of a folder, in order; that it may not be read is a finding."""
        try:
            return listed(self.root / folder, f"{SHOWN}.json")
        except MMRoleError as error:
            self.report.add("unreadable_file", folder, detail=error.what)
            return []

    def rows(self, path: Path, record: type[Record], sort: str) -> Iterator[Row]:
        """The rows of a file that are as they should be; all others, and ids that come again, are findings.

        Args:
            path: The file.
            record: What its rows must be.
            sort: Within what ids must differ; empty where rows have none.
        """
        rows = self.read(path)
        if rows is UNREADABLE:
            return
        if not isinstance(rows, list):
            self.report.add(
                "wrong_field", self.name(path), "the file", f"a list is expected, not {type(rows).__name__}"
            )
            return
        for number, row in enumerate(rows, 1):
            problems = validate_row(row, record, number, path)
            for problem in problems:
                self.problem(path, problem)
            if problems:
                continue
            if sort:
                key = (sort, row["id"])
                if key in self.ids:
                    root, file = self.ids[key]
                    other = f" of {root}" if root != self.root else ""
                    self.report.add("duplicate_id", self.name(path), row["id"], f"also in {file}{other}")
                self.ids.setdefault(key, (self.root, self.name(path)))
            yield row

    def problem(self, path: Path, problem: MMRoleError) -> None:
        """Reports a wrong field."""
        value = "" if problem.value is None else f", not {problem.value}"
        self.report.add("wrong_field", self.name(path), _place(problem, path), f"{problem.what}{value}")

    def find_image(self, image: str) -> Path | None:
        """Where an image lies, in any of the roots; None if nowhere.

        Raises:
            MMRoleError: The name is not allowed.
        """
        found = (find_image(folder, image, follow_links=True) for folder in self._image_folders())
        return next(filter(None, found), None)

    def check_link(self, file: str, name: str, image: str, path: Path) -> None:
        """Reports an image, as `find_image` found it, that a link leads out of its image folder for."""
        folder = next(folder for folder in self._image_folders() if path == folder / image)
        if leads_outside(folder, path):
            self.report.add("image_outside", file, name, f"{image} -> {path.resolve()}")

    def _image_folders(self) -> list[Path]:
        return [root / "images" for root in self.image_roots]

    def check_text(self, file: str, name: str, text: str) -> None:
        """Reports what should not stand in a text of the sources: a special token, a template's leftover."""
        self.check_special(file, name, text)
        leftover = _LEFTOVER.search(text)
        if leftover:
            self.report.add("template_leftover", file, name, leftover[0])

    def check_special(self, file: str, name: str, text: str) -> None:
        """Reports a token that training reads as a mark."""
        token = SPECIAL.search(text)
        if token:
            self.report.add("special_token", file, name, token[0])


def image_files(root: Path) -> list[str]:
    """The names of the images below `images/`, but for MS-COCO's."""
    folder = root / "images"
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(name for name in found if not name.startswith(COCO))


def _place(error: MMRoleError, path: Path) -> str:
    """Where in the file an error is: row and sample, or line and column."""
    where = str(error.where or "")
    return where.removeprefix(str(path)).removeprefix(", ") if where.startswith(str(path)) else ""
