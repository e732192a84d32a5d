"""The state that the checks of one data root share, and how they read files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_utils.check.report import Report
from data_utils.errors import MMRoleError
from data_utils.files import Row, read_json
from data_utils.images import find_image, leads_outside
from data_utils.paths import UnreadableError, listed
from data_utils.roots import Characters
from data_utils.schema import Record, validate_row
from qwen_vl.special_tokens import SPECIAL_TOKENS

SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_LEFTOVER = re.compile(r"\{[A-Za-z_]+\}")


@dataclass
class Checker:
    """The state of checking one data root.

    Attributes:
        root: The data root.
        report: What was found.
        characters: The characters of all roots.
        image_roots: The data roots whose images may be referred to, this one first.
        tested: Ids of the dialogues that test samples were drawn from, of all roots.
        test_samples: Test samples with their files, by the id of their dialogue.
        images: For each image the file and id that first refer to it.
        trained: Images of dialogues that training samples are made of.
        ids: The root and file in which an id was first seen, by kind of record and id.
    """

    root: Path
    report: Report
    characters: Characters
    image_roots: list[Path]
    tested: set[str] = field(default_factory=set)
    test_samples: dict[str, list[tuple[str, Row]]] = field(default_factory=dict)
    images: dict[str, tuple[str, str]] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    ids: dict[tuple[str, str], tuple[Path, str]] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        """Return a file's name for findings."""
        return path.relative_to(self.root).as_posix()

    def files(self, folder: str) -> list[Path]:
        """Return the JSON files of a folder, in order; an unreadable folder is a finding."""
        try:
            return listed(self.root / folder, "*.json")
        except MMRoleError as error:
            self.report.add("unreadable_file", folder, detail=error.what)
            return []

    def rows(self, path: Path, record: type[Record], sort: str) -> Iterator[Row]:
        """Yield the valid rows of a file; invalid ones and repeated ids are findings.

        Args:
            path: The file.
            record: The type of its rows.
            sort: The kind of record within which ids must differ; empty if rows have none.
        """
        try:
            rows = read_json(path)
        except MMRoleError as error:
            self.problem(path, error)
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
        """Report a file that cannot be read, or a wrong field in it."""
        if isinstance(problem, UnreadableError):
            parts = (str(part) for part in (problem.what, problem.value) if part and str(part) != str(path))
            self.report.add("unreadable_file", self.name(path), _place(problem, path), ", ".join(parts))
        else:
            value = "" if problem.value is None else f", not {problem.value}"
            self.report.add("wrong_field", self.name(path), _place(problem, path), f"{problem.what}{value}")

    def find_image(self, image: str) -> Path | None:
        """Return the file of an image in any of the roots, or None.

        Raises:
            MMRoleError: The name is not allowed.
        """
        found = (find_image(folder, image, follow_links=True) for folder in self._image_folders())
        return next(filter(None, found), None)

    def check_link(self, file: str, name: str, image: str, path: Path) -> None:
        """Report an image, as `find_image` found it, if a link leads out of its image folder."""
        folder = next(folder for folder in self._image_folders() if path == folder / image)
        if leads_outside(folder, path):
            self.report.add("image_outside", file, name, f"{image} -> {path.resolve()}")

    def _image_folders(self) -> list[Path]:
        return [root / "images" for root in self.image_roots]

    def check_text(self, file: str, name: str, text: str) -> None:
        """Report a special token or an unfilled template field in a source text."""
        self.check_special(file, name, text)
        leftover = _LEFTOVER.search(text)
        if leftover:
            self.report.add("template_leftover", file, name, leftover[0])

    def check_special(self, file: str, name: str, text: str) -> None:
        """Report a special token, which training would interpret."""
        token = SPECIAL.search(text)
        if token:
            self.report.add("special_token", file, name, token[0])


def _place(error: MMRoleError, path: Path) -> str:
    """Return where in the file an error is: row and sample, or line and column."""
    where = str(error.where or "")
    return where.removeprefix(str(path)).removeprefix(", ") if where.startswith(str(path)) else ""
