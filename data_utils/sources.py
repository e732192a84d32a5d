"""The dialogues, characters and test sets of a data root and of further ones, with everything that is wrong in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
        ProblemsError: Files of characters are missing or wrong, or two roots have different ones of one name, with
            everything that is.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = list(roots)
        self.problems: list[MMRoleError] = []
        self.roles: dict[str, dict[str, list[str]]] = {}
        profiles: dict[str, str] = {}
        scripts: dict[str, str] = {}
        for root in self.roots:
            own, own_scripts = self._people(root)
            self.problems += _two_of_one_name(root, profiles, own, scripts, own_scripts)
            profiles.update(own)
            scripts.update(own_scripts)
        if not scripts and not self.problems:
            fix = "choose the folder that holds profiles/ and dialogues/"
            self.problems.append(MMRoleError("no profiles/<split>/roles.json", None, self.roots[0], fix))
        raise_problems(self.problems)
        self.characters = Characters(profiles, scripts)

    def _people(self, root: Path) -> tuple[dict[str, str], dict[str, str]]:
        """The profile and the script of each character of a root."""
        profiles: dict[str, str] = {}
        scripts: dict[str, str] = {}
        for split, folder in ((split, root / "profiles" / split) for split in SPLITS):
            if not folder.is_dir():
                continue
            profiles.update(self._value(folder / "profiles.json", Profiles))
            for script, names in self._value(folder / "roles.json", Roles).items():
                self.roles.setdefault(split, {}).setdefault(script, []).extend(names)
                scripts.update(dict.fromkeys(names, script))
        return profiles, scripts

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


def _two_of_one_name(
    root: Path,
    profiles: Mapping[str, str],
    own: Mapping[str, str],
    scripts: Mapping[str, str],
    own_scripts: Mapping[str, str],
) -> list[MMRoleError]:
    """Whom a root's profiles or scripts make another person than the roots before it do."""
    changed = {name for name in own.keys() & profiles.keys() if own[name] != profiles[name]}
    moved = {name for name in own_scripts.keys() & scripts.keys() if own_scripts[name] != scripts[name]}
    if not changed | moved:
        return []
    fix = "rename those of one root, also in its dialogues and samples, or take them out of its profiles and roles"
    return [
        MMRoleError(
            f"{len(changed | moved):,} character(s) of two data roots have the same name and are different people",
            _some_of(sorted(changed | moved)),
            root / "profiles",
            fix,
        )
    ]


def _some_of(names: Sequence[str]) -> list[str]:
    more = [f"… and {len(names) - _MOST_NAMES:,} more"] if len(names) > _MOST_NAMES else []
    return [*names[:_MOST_NAMES], *more]


def _clash(root: Path, other: Path, names: Sequence[str]) -> MMRoleError:
    return MMRoleError(
        f"{len(names):,} image(s) of two data roots have the same name and are different pictures",
        _some_of(names),
        f"{root / 'images'} and {other / 'images'}",
        "rename those of one root, also in its annotations, dialogues and samples, or give its script another name",
    )
