"""The dialogues, characters and test sets of a data root and of further ones, with everything that is wrong in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_utils.build import SPLITS, Characters, dialogue_files, tested_dialogues
from data_utils.errors import MMRoleError, ProblemsError, raise_problems
from data_utils.image_files import clashing_images
from data_utils.schema import Dialogue, Profiles, Roles, Row, read_rows, read_value

_MOST_NAMES = 20


class Sources:
    """The dialogues and characters of a data root and of further ones.

    Args:
        roots: The data root, and further ones that add to it.

    Attributes:
        characters: Everybody who may speak.
        roles: The characters by script, of each split of the roots.
        problems: What was found wrong so far; whoever reads dialogues raises them when all are read.

    Raises:
        ProblemsError: Files of characters are missing or wrong, with everything that is.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = list(roots)
        self.problems: list[MMRoleError] = []
        self.roles: dict[str, dict[str, list[str]]] = {}
        profiles: dict[str, str] = {}
        scripts: dict[str, str] = {}
        for split, folder in ((split, root / "profiles" / split) for root in self.roots for split in SPLITS):
            if not folder.is_dir():
                continue
            profiles.update(self._value(folder / "profiles.json", Profiles))
            for script, names in self._value(folder / "roles.json", Roles).items():
                self.roles.setdefault(split, {}).setdefault(script, []).extend(names)
                scripts.update(dict.fromkeys(names, script))
        if not scripts and not self.problems:
            fix = "choose the folder that holds profiles/ and dialogues/"
            self.problems.append(MMRoleError("no profiles/<split>/roles.json", None, self.roots[0], fix))
        raise_problems(self.problems)
        self.characters = Characters(profiles, scripts)

    def dialogues(self, split: str, kind: str) -> Iterator[Row]:
        """The dialogues of all roots; a file that is wrong goes to `problems`."""
        for path in (path for root in self.roots for path in dialogue_files(root, split, kind)):
            yield from self.rows(path, Dialogue)

    def rows(self, path: Path, record: Any) -> list[Row]:
        """The rows of a file; there are none if it is wrong, which goes to `problems`."""
        rows, problems = read_rows(path, record)
        self.problems += problems
        return rows

    def tested(self) -> frozenset[str]:
        """The dialogues that test samples of any root were drawn from; what is wrong with these goes to `problems`."""
        found: set[str] = set()
        for root in self.roots:
            if (root / "data" / "test").is_dir():
                try:
                    found |= tested_dialogues(root)
                except ProblemsError as error:
                    self.problems += error.problems
        return frozenset(found)

    def compare_images(self) -> None:
        """Whether an image of a root is another picture in an earlier one, where it would be shown; see `problems`."""
        for number, root in enumerate(self.roots):
            clashes = list(clashing_images(root, self.roots[:number]))
            for other in dict.fromkeys(other for _, other in clashes):
                self.problems.append(_clash(root, other, [name for name, where in clashes if where == other]))

    def _value(self, path: Path, form: Any) -> dict[str, Any]:
        value, problems = read_value(path, form)
        self.problems += problems
        return value


def _clash(root: Path, other: Path, names: Sequence[str]) -> MMRoleError:
    more = [f"… and {len(names) - _MOST_NAMES:,} more"] if len(names) > _MOST_NAMES else []
    return MMRoleError(
        f"{len(names):,} image(s) of two data roots have the same name and are different pictures",
        [*names[:_MOST_NAMES], *more],
        f"{root / 'images'} and {other / 'images'}",
        "rename those of one root, also in its annotations, dialogues and samples, or give its script another name",
    )
