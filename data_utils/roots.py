"""Data roots: their characters, dialogues and test sets, of one root or of several together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError, ProblemsError, raise_problems
from data_utils.images import clashing_images
from data_utils.layout import SPLITS, paths_of_tests
from data_utils.paths import SHOWN, is_file, is_folder, listed
from data_utils.prompts import Role
from data_utils.schema import Dialogue, Named, Profiles, Roles, Row, read_rows, read_value

_MOST_NAMES = 20


@dataclass(frozen=True)
class Characters:
    """Who can speak: ``profiles`` maps a name to its profile text, ``scripts`` a name to the script that lists it."""

    profiles: Mapping[str, str]
    scripts: Mapping[str, str]

    def role(self, name: str) -> Role:
        """Gives the character ``name``.

        Raises:
            MMRoleError: no script lists it, or it has no profile.
        """
        if name not in self.scripts:
            raise MMRoleError(
                "unknown speaker",
                value=name,
                where="roles.json",
                fix="list the character under its script in roles.json",
            )
        if name not in self.profiles:
            raise MMRoleError(
                "a speaker without a profile", value=name, where="profiles.json", fix="add its profile to profiles.json"
            )
        return Role(name, self.scripts[name], self.profiles[name])


def load_characters(data_root: str | Path, splits: Sequence[str] = SPLITS) -> Characters:
    """Reads ``profiles/<split>/{profiles,roles}.json`` of a data root, all splits into one.

    Raises:
        ProblemsError: files are missing or wrong, with everything that is.
    """
    profiles: dict[str, str] = {}
    scripts: dict[str, str] = {}
    problems: list[MMRoleError] = []
    for split in splits:
        folder = Path(data_root) / "profiles" / split
        own, wrong = read_value(folder / "profiles.json", Profiles)
        roles, wrong_roles = read_value(folder / "roles.json", Roles)
        problems += [*wrong, *wrong_roles]
        profiles.update(own)
        scripts.update({name: script for script, names in roles.items() for name in names})
    raise_problems(problems)
    return Characters(profiles, scripts)


def dialogue_files(data_root: str | Path, split: str, kind: str) -> list[Path]:
    """Gives the files of ``dialogues/<split>/<kind>``: the single file first, then a folder's in order of file name.

    Published splits have the one or the other; new dialogues beside a published single file make a folder.

    Raises:
        UnreadableError: a folder may not be read.
    """
    place = Path(data_root) / "dialogues" / split / kind
    single = place.with_name(f"{kind}.json")
    return [*([single] if is_file(single) else []), *listed(place, f"{SHOWN}.json")]


def iterate_dialogues(data_root: str | Path, split: str, kind: str) -> Iterator[dict[str, Any]]:
    """Yields the dialogues of ``dialogues/<split>/<kind>``, in order of file name.

    Raises:
        MMRoleError: there is neither a folder nor a file.
        ProblemsError: a file is broken or its rows are wrong, with everything that is wrong in it.
    """
    place = Path(data_root) / "dialogues" / split / kind
    files = dialogue_files(data_root, split, kind)
    if not files and not is_folder(place):
        raise MMRoleError(
            "no dialogues", value=f"{kind} ({split})", where=str(place), fix="check the data root, or download the data"
        )
    for file in files:
        rows, problems = read_rows(file, Dialogue)
        raise_problems(problems)
        yield from rows


def tested_dialogues(data_root: str | Path) -> frozenset[str]:
    """Gives the ids of the dialogues from which the data root's test samples were drawn.

    Raises:
        ProblemsError: a test file is missing or wrong, with everything that is.
    """
    ids: list[str] = []
    problems: list[MMRoleError] = []
    for path in paths_of_tests(data_root):
        rows, wrong = read_rows(path, Named)
        ids += [row["id"] for row in rows]
        problems += wrong if is_file(path) else [_no_test_file(path)]
    raise_problems(problems)
    return frozenset(map(dialogue_id, ids))


def dialogue_id(sample_id: str) -> str:
    """Gives the id of the dialogue a sample was made from (``<dialogue id>_<turn>``)."""
    return sample_id.rpartition("_")[0]


class Sources:
    """The dialogues and characters of a data root and of further ones.

    Args:
        roots: The data root, and further ones that add to it.

    Attributes:
        characters: Everybody who may speak.
        roles: The characters by script, of each split of the roots.
        problems: What was found wrong so far; whoever reads dialogues raises them when all are read.

    Raises:
        ProblemsError: Roots are not there or given twice; files of characters are missing or wrong, or two roots have
            different ones of one name, with everything that is.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = list(roots)
        self.problems: list[MMRoleError] = root_problems(self.roots)
        raise_problems(self.problems)
        self._places: dict[str, Path] = {}  # the file of each dialogue that was read
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
            if not is_folder(folder):
                continue
            profiles.update(self._value(folder / "profiles.json", Profiles))
            for script, names in self._value(folder / "roles.json", Roles).items():
                self.roles.setdefault(split, {}).setdefault(script, []).extend(names)
                scripts.update(dict.fromkeys(names, script))
        return profiles, scripts

    def dialogues(self, split: str, kind: str) -> Iterator[Row]:
        """The dialogues of all roots; a file that is wrong goes to `problems`, and so do ids that come again."""
        for path in (path for root in self.roots for path in self._files(root, split, kind)):
            rows = self.rows(path, Dialogue)
            places = {row["id"]: self._places.setdefault(row["id"], path) for row in rows}
            for other in dict.fromkeys(place for place in places.values() if place != path):
                self.problems.append(_again(path, other, [name for name, place in places.items() if place == other]))
            yield from rows

    def _files(self, root: Path, split: str, kind: str) -> list[Path]:
        try:
            return dialogue_files(root, split, kind)
        except MMRoleError as error:  # a folder that may not be read
            self.problems.append(error)
            return []

    def rows(self, path: Path, record: Any) -> list[Row]:
        """The rows of a file; there are none if it is wrong, which goes to `problems`."""
        rows, problems = read_rows(path, record)
        self.problems += problems
        return rows

    def tested(self) -> frozenset[str]:
        """The dialogues that test samples of any root were drawn from; what is wrong with these goes to `problems`."""
        found: set[str] = set()
        for root in self.roots:
            if is_folder(root / "data" / "test"):
                try:
                    found |= tested_dialogues(root)
                except ProblemsError as error:
                    self.problems += error.problems
        return frozenset(found)

    def whole_tests(self, out: Path) -> list[Path]:
        """The roots that have a test set, all six files of it; one that is not whole goes to `problems`.

        Args:
            out: Where test files are written: a test set that is not whole there may be made whole.
        """
        whole = []
        for root in self.roots:
            absent = [path for path in paths_of_tests(root) if not is_file(path)]
            if not absent:
                whole.append(root)
            elif len(absent) < len(paths_of_tests(root)) and out.resolve() != (root / "data" / "test").resolve():
                self.problems.append(_not_whole(root, absent))
        return whole

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


def root_problems(roots: Sequence[Path]) -> list[MMRoleError]:
    """The roots that are not there, and those that are given twice, under whatever names."""
    problems = []
    there: list[Path] = []
    for root in roots:
        same = next((other for other in there if other.samefile(root)), None) if is_folder(root) else None
        if not is_folder(root):
            problems.append(MMRoleError("there is no such data root", root, fix="check the path"))
        elif same:
            fix = "give each data root once: every sample would come twice"
            problems.append(MMRoleError("a data root is given twice", root, f"it is {same}", fix))
        else:
            there.append(root)
    return problems


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


def _again(path: Path, other: Path, names: Sequence[str]) -> MMRoleError:
    return MMRoleError(
        f"{len(names):,} dialogue(s) of two files have the same id",
        _some_of(names),
        f"{path} and {other}",
        "give each an id of its own, or take those of one file out",
    )


def _not_whole(root: Path, absent: Sequence[Path]) -> MMRoleError:
    return MMRoleError(
        f"a test set has six files, and {len(absent)} of this one are missing",
        [str(path.relative_to(root)) for path in absent],
        root,
        "fetch or build the test files anew, or move those that are there away to draw new ones",
    )


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


def _no_test_file(path: Path) -> MMRoleError:
    # Without it nobody knows which dialogues must not train.
    fix = "fetch or build the test files anew; one that has no samples holds []"
    return MMRoleError("cannot read the file: a test set has six, and this one is missing", path, fix=fix)
