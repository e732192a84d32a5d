"""Data roots: their characters, dialogues and test sets, of one root or of several together.

Only this module reads and writes `profiles.json`, `roles.json` and `annotations.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError, first_of, raise_problems
from data_utils.files import Row, write_json
from data_utils.images import clashing_images
from data_utils.layout import SPLITS, annotations_path, dialogues_folder, paths_of_tests, profiles_folder
from data_utils.paths import is_file, is_folder, listed
from data_utils.prompts import Role
from data_utils.schema import Annotation, Dialogue, Named, Profiles, Roles, read_rows, read_value


@dataclass(frozen=True)
class Characters:
    """The characters that can speak.

    Attributes:
        profiles: The profile text of each.
        scripts: The script of each, as `roles.json` lists it.
    """

    profiles: Mapping[str, str]
    scripts: Mapping[str, str]

    def role(self, name: str) -> Role:
        """Return a character by name.

        Raises:
            MMRoleError: No script lists it, or it has no profile.
        """
        if name not in self.scripts:
            fix = "list the character under its script in roles.json"
            raise MMRoleError("unknown speaker", name, "roles.json", fix)
        if name not in self.profiles:
            raise MMRoleError("a speaker without a profile", name, "profiles.json", "add its profile to profiles.json")
        return Role(name, self.scripts[name], self.profiles[name])


@dataclass
class SplitProfiles:
    """The characters of one split of a data root.

    Attributes:
        profiles: `profiles.json`: the profile text of each character.
        roles: `roles.json`: the characters of each script.
    """

    profiles: dict[str, str]
    roles: dict[str, list[str]]

    @property
    def scripts(self) -> dict[str, str]:
        """The script of each character."""
        return {name: script for script, names in self.roles.items() for name in names}


def read_profiles(data_root: Path, split: str, *, may_lack: bool = False) -> tuple[SplitProfiles, list[MMRoleError]]:
    """Read the characters of a split.

    Args:
        data_root: The data root.
        split: The split.
        may_lack: Treat a missing file as an empty one.

    Returns:
        The characters, and everything that is wrong with their files.
    """
    folder = profiles_folder(data_root, split)
    content: list[dict[str, Any]] = []
    problems: list[MMRoleError] = []
    for path, form in ((folder / "profiles.json", Profiles), (folder / "roles.json", Roles)):
        value, wrong = ({}, []) if may_lack and not is_file(path) else read_value(path, form)
        content.append(value)
        problems += wrong
    return SplitProfiles(*content), problems


def write_profiles(data_root: Path, split: str, characters: SplitProfiles) -> None:
    """Write the characters of a split.

    Raises:
        MMRoleError: A file cannot be written.
    """
    folder = profiles_folder(data_root, split)
    write_json(folder / "profiles.json", characters.profiles)
    write_json(folder / "roles.json", characters.roles)


def add_profile(data_root: Path, split: str, name: str, script: str, profile: str) -> None:
    """Add a character to a split, or give it a new profile.

    Raises:
        ProblemsError: Existing files are wrong; every problem is reported.
        MMRoleError: A file cannot be written.
    """
    characters, problems = read_profiles(data_root, split, may_lack=True)
    raise_problems(problems)
    characters.profiles[name] = profile
    if name not in characters.roles.setdefault(script, []):
        characters.roles[script].append(name)
    write_profiles(data_root, split, characters)


def read_annotations(data_root: Path) -> tuple[list[Row], list[MMRoleError]]:
    """Read the image annotations: the rows, none if there is no file, and everything that is wrong with it."""
    path = annotations_path(data_root)
    return read_rows(path, Annotation) if is_file(path) else ([], [])


def write_annotations(data_root: Path, rows: Sequence[Row]) -> None:
    """Write the image annotations.

    Raises:
        MMRoleError: The file cannot be written.
    """
    write_json(annotations_path(data_root), rows)


def dialogue_files(data_root: str | Path, split: str, kind: str) -> list[Path]:
    """Return the files of a kind's dialogues: the single file first, then a folder's in order of file name.

    Published splits have one or the other; new dialogues go to the folder, beside a published single file.

    Raises:
        UnreadableError: A folder cannot be read.
    """
    folder = dialogues_folder(data_root, split, kind)
    single = folder.with_name(f"{kind}.json")
    return [*([single] if is_file(single) else []), *listed(folder, "*.json")]


def dialogue_id(sample_id: str) -> str:
    """Return the id of the dialogue that a sample was made from (`<dialogue id>_<turn>`)."""
    return sample_id.rpartition("_")[0]


class DataRoots:
    """The dialogues and characters of a data root and of further ones that add to it.

    Args:
        roots: The data root, and further ones.

    Attributes:
        characters: The characters that may speak.
        roles: The characters by script, of each split of the roots.
        problems: All problems found so far; the caller raises them after reading the dialogues.

    Raises:
        ProblemsError: Roots do not exist or are given twice; files of characters are missing or wrong, or two roots
            have different characters of one name; every problem is reported.
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
            new = self._characters(root)
            self.problems += _different_characters(root, profiles, scripts, new)
            profiles.update(new.profiles)
            scripts.update(new.scripts)
        if not scripts and not self.problems:
            fix = "choose the folder that holds profiles/ and dialogues/"
            self.problems.append(MMRoleError("no profiles/<split>/roles.json", None, self.roots[0], fix))
        raise_problems(self.problems)
        self.characters = Characters(profiles, scripts)

    def _characters(self, root: Path) -> Characters:
        profiles: dict[str, str] = {}
        scripts: dict[str, str] = {}
        for split in (split for split in SPLITS if is_folder(profiles_folder(root, split))):
            found, problems = read_profiles(root, split)
            self.problems += problems
            profiles.update(found.profiles)
            scripts.update(found.scripts)
            for script, names in found.roles.items():
                self.roles.setdefault(split, {}).setdefault(script, []).extend(names)
        return Characters(profiles, scripts)

    def dialogues(self, split: str, kind: str) -> Iterator[Row]:
        """Yield the dialogues of all roots; a file that is wrong, or repeats ids, goes to `problems`."""
        for path in (path for root in self.roots for path in self._files(root, split, kind)):
            rows = self.rows(path, Dialogue)
            places = {row["id"]: self._places.setdefault(row["id"], path) for row in rows}
            for other in dict.fromkeys(place for place in places.values() if place != path):
                names = [name for name, place in places.items() if place == other]
                what = f"{len(names):,} dialogue(s) of two files have the same id"
                fix = "give each a different id, or remove those of one file"
                self.problems.append(MMRoleError(what, first_of(names), f"{path} and {other}", fix))
            yield from rows

    def _files(self, root: Path, split: str, kind: str) -> list[Path]:
        try:
            return dialogue_files(root, split, kind)
        except MMRoleError as error:  # an unreadable folder
            self.problems.append(error)
            return []

    def rows(self, path: Path, record: Any) -> list[Row]:
        """Return the rows of a file; none if it is wrong, which goes to `problems`."""
        rows, problems = read_rows(path, record)
        self.problems += problems
        return rows

    def tested(self) -> frozenset[str]:
        """Return the ids of the dialogues that test samples of any root were drawn from; these never train.

        Problems of the test sets go to `problems`, missing files included: without them it is unknown which dialogues
        must not train.
        """
        found: list[str] = []
        for root in (root for root in self.roots if is_folder(root / "data" / "test")):
            for path in paths_of_tests(root):
                rows, wrong = read_rows(path, Named)
                found += [row["id"] for row in rows]
                if not is_file(path):
                    fix = "download or build the test files again; one that has no samples holds []"
                    what = "cannot read the file: a test set has six, and this one is missing"
                    wrong = [MMRoleError(what, path, fix=fix)]
                self.problems += wrong
        return frozenset(map(dialogue_id, found))

    def complete_tests(self, out: Path) -> list[Path]:
        """Return the roots that have all six test files; a root that lacks some of them goes to `problems`.

        Args:
            out: Where test files are written: the missing ones may be added there.
        """
        complete = []
        for root in self.roots:
            absent = [path for path in paths_of_tests(root) if not is_file(path)]
            if not absent:
                complete.append(root)
            elif len(absent) < len(paths_of_tests(root)) and out.resolve() != (root / "data" / "test").resolve():
                what = f"a test set has six files, and {len(absent)} of this one are missing"
                fix = "download or build the test files again, or move the others away to draw new ones"
                self.problems.append(MMRoleError(what, [str(path.relative_to(root)) for path in absent], root, fix))
        return complete

    def compare_images(self) -> None:
        """Add to `problems` images that differ from one of the same name in an earlier root, that would be shown."""
        for number, root in enumerate(self.roots):
            clashes = list(clashing_images(root, self.roots[:number]))
            for other in dict.fromkeys(other for _, other in clashes):
                names = [name for name, where in clashes if where == other]
                what = f"{len(names):,} image(s) of two data roots have the same name but differ"
                fix = (
                    "rename those of one root, also in its annotations, dialogues and samples, "
                    "or give its script another name"
                )
                place = f"{root / 'images'} and {other / 'images'}"
                self.problems.append(MMRoleError(what, first_of(names), place, fix))


def root_problems(roots: Sequence[Path]) -> list[MMRoleError]:
    """Return a problem for each root that does not exist or is given twice, even under another name."""
    problems = []
    found: list[Path] = []
    for root in roots:
        same = next((other for other in found if other.samefile(root)), None) if is_folder(root) else None
        if not is_folder(root):
            problems.append(MMRoleError("there is no such data root", root, fix="check the path"))
        elif same:
            fix = "give each data root once: every sample would come twice"
            problems.append(MMRoleError("a data root is given twice", root, f"it is {same}", fix))
        else:
            found.append(root)
    return problems


def _different_characters(
    root: Path, profiles: Mapping[str, str], scripts: Mapping[str, str], new: Characters
) -> list[MMRoleError]:
    """Return a problem if profiles or scripts differ from those of earlier characters of the same name."""
    changed = {name for name in new.profiles.keys() & profiles.keys() if new.profiles[name] != profiles[name]}
    changed |= {name for name in new.scripts.keys() & scripts.keys() if new.scripts[name] != scripts[name]}
    if not changed:
        return []
    what = f"{len(changed):,} character(s) of two data roots have the same name but differ"
    fix = "rename those of one root, also in its dialogues and samples, or remove them from its profiles and roles"
    return [MMRoleError(what, first_of(sorted(changed)), root / "profiles", fix)]
