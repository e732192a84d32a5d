"""Brings a character of your own into a data root: `python -m data_utils.characters ROOT --name NAME --profile FILE`.

    python -m data_utils.characters ROOT --name "Ada Reed" --script "The Lighthouse" --profile ada.txt \\
        --image tower.jpg --about "The tower where Ada lives." --question "What do you see here?"
    python -m data_utils.characters ROOT --folder Ada_Reed

ROOT is made, or added to, in the published layout: profiles/<split>/{profiles,roles}.json, images/<script>/NN.jpg and
images/annotations.json. A folder holds profile.txt (or profile.md) and maybe pictures, each with what is known about it
in a text file of the same name. ROOT/data/play/<name>.json then asks the questions about each picture, for
inference.sh --input_dir ROOT/data/play; a character without pictures is shown a plain one.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from data_utils.errors import MMRoleError, raise_problems, shown
from data_utils.files import make_folder, read_json, write_bytes, write_json
from data_utils.images import PLAIN_IMAGE, file_name_problem
from data_utils.layout import SPLITS
from data_utils.prompts import HUMAN, HYPOTHETICAL_CHARACTERS, prompt_language
from data_utils.roots import Characters
from data_utils.samples import build_sample
from data_utils.schema import Annotation, Profiles, Roles, Row, read_rows, read_value
from qwen_vl import QwenVLImageProcessor
from qwen_vl.tokenization import SPECIAL_TOKENS

QUESTIONS = {
    "English": ("Please tell me what you think of this picture.", "What does this picture remind you of?"),
    "Chinese": ("请谈谈你对这张图片的看法。", "这张图片让你想起了什么？"),
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_TEXTS = (".txt", ".md")
_NOT_OURS = (".db", ".ini")  # which systems put beside pictures
_PLAIN_GREY = (160, 160, 160)


@dataclass(frozen=True)
class Picture:
    """A picture of a character, and what is known about it."""

    path: Path
    about: str = ""
    place: str = ""
    who: str = ""


@dataclass(frozen=True)
class NewCharacter:
    """A character to be brought in.

    Attributes:
        name: As it stands in prompts.
        script: What the character comes from.
        profile: The profile text.
        pictures: Related pictures; there may be none.
        split: Where the character belongs: the first split trains, the second only tests.
    """

    name: str
    script: str
    profile: str
    pictures: Sequence[Picture] = ()
    split: str = SPLITS[0]


@dataclass
class _Root:
    """The files of a data root that a character goes into."""

    folder: Path
    split: str
    problems: list[MMRoleError] = field(default_factory=list)

    def __post_init__(self) -> None:
        profiles = self.folder / "profiles" / self.split
        self.profiles_file, self.roles_file = profiles / "profiles.json", profiles / "roles.json"
        self.annotations_file = self.folder / "images" / "annotations.json"
        self.profiles: dict[str, str] = self._read(self.profiles_file, Profiles)
        self.roles: dict[str, list[str]] = self._read(self.roles_file, Roles)
        rows, problems = read_rows(self.annotations_file, Annotation) if self.annotations_file.is_file() else ([], [])
        self.annotations: list[Row] = rows
        self.problems += problems

    def names(self, split: str) -> Collection[str]:
        """Who has a profile in a split."""
        return self._read(self.folder / "profiles" / split / "profiles.json", Profiles)

    def _read(self, path: Path, form: Any) -> dict[str, Any]:
        found, problems = read_value(path, form) if path.is_file() else ({}, [])
        self.problems += problems
        return found


def read_folder(folder: Path) -> tuple[str, list[Picture]]:
    """The profile and the pictures of a character's folder.

    Raises:
        MMRoleError: There is no profile, or a text cannot be read.
    """
    profiles = [folder / name for name in ("profile.txt", "profile.md") if (folder / name).is_file()]
    if not profiles:
        fix = "write down who the character is in profile.txt"
        raise MMRoleError("no profile.txt or profile.md", None, folder, fix)
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    texts = {path: path.with_suffix(".txt") for path in images}
    abouts = {path: text for path, text in texts.items() if text.is_file() and text not in profiles}
    pictures = [Picture(path, _text(abouts[path]) if path in abouts else "") for path in images]
    _tell_of_others(folder, {profiles[0], *images, *abouts.values()})
    return _text(profiles[0]), pictures


def _tell_of_others(folder: Path, used: Collection[Path]) -> None:
    """Says what else lies in a character's folder and is not used."""
    for path in sorted(folder.iterdir()):
        if path in used or path.name.startswith(".") or path.suffix.lower() in _NOT_OURS:
            continue
        why = "no picture has this name" if path.suffix.lower() in _TEXTS else f"not {', '.join(IMAGE_SUFFIXES)}"
        why = "profile.txt is used" if path.name == "profile.md" else why
        print(f"passed over: {shown(path)} ({why})", file=sys.stderr, flush=True)


def add_character(root: Path, character: NewCharacter, questions: Sequence[str] = ()) -> Path:
    """Brings a character into a data root; nothing is written if anything is wrong.

    Args:
        root: A data root, or a folder that is to be one.
        character: Who; one who is there already gets the new profile, and further pictures.
        questions: What is asked about each picture; none gives two general ones.

    Returns:
        The test input that was written.

    Raises:
        ProblemsError: The character or the data root has faults, with all of them.
        MMRoleError: A file cannot be written.
    """
    place = _Root(root, character.split)
    problems = _character_problems(place, character, questions)
    raise_problems([*place.problems, *problems])
    added = _image_names(place, character)
    for image, picture in added.items():
        if not (root / "images" / image).is_file():
            _write(root / "images" / image, picture.path.read_bytes())
        row = {"image": image, "role_info": picture.who, "place_info": picture.place, "scene_info": picture.about}
        place.annotations.append(row)
    place.profiles[character.name] = character.profile
    if character.name not in place.roles.setdefault(character.script, []):
        place.roles[character.script].append(character.name)
    _write(place.profiles_file, place.profiles)
    _write(place.roles_file, place.roles)
    if added:
        _write(place.annotations_file, place.annotations)
    return _write_play(root, character, place.annotations, questions)


def play_samples(character: NewCharacter, pictures: Sequence[Row], questions: Sequence[str]) -> list[Row]:
    """Test samples in which the human asks the character each question about each picture; there is no ground truth."""
    characters = Characters({character.name: character.profile}, {character.name: character.script})
    stem = _file_name(character.name)
    samples = []
    for number, (picture, question) in enumerate((p, q) for p in pictures for q in questions):
        turns = [{"from": HUMAN, "value": question}, {"role": character.name, "value": ""}]
        dialogue = {"id": f"{stem}_play_{number}", **picture, "conversations": turns}
        samples.append(build_sample(dialogue, 1, characters))
    return samples


def _write_play(root: Path, character: NewCharacter, annotations: Sequence[Row], questions: Sequence[str]) -> Path:
    folder = f"{_file_name(character.script)}/"
    pictures = [row for row in annotations if row["image"].startswith(folder)]
    if not pictures:
        plain = io.BytesIO()
        Image.new("RGB", (448, 448), _PLAIN_GREY).save(plain, "PNG")
        _write(root / "images" / PLAIN_IMAGE, plain.getvalue())
        pictures = [{"image": PLAIN_IMAGE}]
    samples = play_samples(character, pictures, questions or QUESTIONS[prompt_language(character.script)])
    path = root / "data" / "play" / f"{_file_name(character.name)}.json"
    _write(path, samples)
    return path


def _character_problems(place: _Root, character: NewCharacter, questions: Sequence[str]) -> list[MMRoleError]:
    problems = []
    for option, name in (("--name", character.name), ("--script", character.script)):
        problem = file_name_problem(name)
        if problem:
            problems.append(MMRoleError(f"a name that cannot name a file: {problem}", name, option, "choose another"))
    if character.name == HUMAN:
        problems.append(MMRoleError("human is who talks with characters", None, "--name", "choose another name"))
    other = [script for script, names in place.roles.items() if character.name in names and script != character.script]
    if other:
        problems.append(MMRoleError("the character is of another script", other[0], place.roles_file, "give that one"))
    others = {split: place.names(split) for split in SPLITS if split != character.split}
    elsewhere = [split for split, names in others.items() if character.name in names]
    if elsewhere:
        where = place.folder / "profiles" / elsewhere[0]
        problems.append(MMRoleError("the character is of the other split", elsewhere[0], where, "give that --split"))
    stem = _file_name(character.name)
    everybody = {name for names in (place.profiles, *others.values()) for name in names}
    alike = sorted(name for name in everybody if _file_name(name) == stem and name != character.name)
    if alike:
        what = f"another character's files have this name: {alike[0]}"
        problems.append(MMRoleError(what, character.name, "--name", "choose another name"))
    if not character.profile.strip():
        problems.append(MMRoleError("the profile is empty", None, "--profile", "write down who the character is"))
    abouts = [text for picture in character.pictures for text in (picture.about, picture.place, picture.who)]
    for text in (character.name, character.script, character.profile, *questions, *abouts):
        token = next((token for token in SPECIAL_TOKENS if token in text), None)
        if token:
            problems.append(MMRoleError("a text holds a token that training reads as a mark", token, fix="reword it"))
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            what = "a text is not UTF-8, or holds half of a surrogate pair"
            problems.append(MMRoleError(what, text, fix="write it anew, in a terminal that is set to UTF-8"))
    for picture in character.pictures:
        try:
            QwenVLImageProcessor().load(picture.path)
        except (OSError, ValueError) as error:
            problems.append(MMRoleError("an image cannot be used", str(error), picture.path, "give another file"))
    return problems


def _image_names(place: _Root, character: NewCharacter) -> dict[str, Picture]:
    """The names of new pictures, numbered on.

    A picture that is there already, to the byte, keeps its name; it is left out if it is annotated, and new if a run
    was killed before it wrote that.
    """
    folder = place.folder / "images" / _file_name(character.script)
    there = [path for path in sorted(folder.glob("*")) if path.is_file()]
    annotated = {row["image"] for row in place.annotations}
    # Of two files with the same content the annotated one counts.
    there.sort(key=lambda path: f"{folder.name}/{path.name}" in annotated)
    known = {path.read_bytes(): f"{folder.name}/{path.name}" for path in there}
    number = max([int(path.stem) for path in there if path.stem.isdigit()], default=0)
    names: dict[str, Picture] = {}
    for picture in character.pictures:
        content = picture.path.read_bytes()
        if content not in known:
            number += 1
            known[content] = f"{folder.name}/{number:02d}{picture.path.suffix.lower()}"
        if known[content] not in annotated:
            names.setdefault(known[content], picture)
    return names


def _write(path: Path, content: Any) -> None:
    make_folder(path.parent, "files written before are kept")
    if isinstance(content, bytes):
        write_bytes(path, content)
    else:
        write_json(path, content)


def _file_name(name: str) -> str:
    return name.replace(" ", "_")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MMRoleError("the text cannot be read", str(error), path, "choose a file of UTF-8 text") from None


def _from_options(options: argparse.Namespace) -> NewCharacter:
    profile, pictures, name = "", [], options.name
    if options.folder:
        profile, pictures = read_folder(options.folder)
        name = name or options.folder.resolve().name.replace("_", " ")
    if options.profile:
        profile = _text(options.profile)
    if not name or not (options.folder or options.profile):
        fix = "give --name and --profile, or --folder"
        raise MMRoleError("a character needs a name and a profile", None, "the command line", fix)
    details = (options.about, options.place, options.who)
    for flag, texts in zip(("--about", "--place", "--who"), details, strict=True):
        if len(texts) > len(options.image):
            raise MMRoleError("more texts than images", texts, flag, "give one after each --image, in their order")
    filled = [[*texts, *[""] * (len(options.image) - len(texts))] for texts in details]
    pictures += [Picture(*values) for values in zip(options.image, *filled, strict=True)]
    return NewCharacter(name, options.script, profile, pictures, options.split)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.characters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="a data root, or a folder that is to be one")
    parser.add_argument("--name", help="the character's name (default: that of --folder)")
    parser.add_argument("--script", default=HYPOTHETICAL_CHARACTERS, help="what the character is from (%(default)s)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="the profile, a text")
    parser.add_argument("--folder", type=Path, help="a folder with profile.txt and pictures, instead or besides")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="repeatable")
    parser.add_argument("--about", action="append", default=[], metavar="TEXT", help="what the image shows, in order")
    parser.add_argument("--place", action="append", default=[], metavar="TEXT", help="where it is, in order")
    parser.add_argument("--who", action="append", default=[], metavar="TEXT", help="who is on it, in order")
    parser.add_argument("--question", action="append", default=[], metavar="TEXT", help="what to ask; repeatable")
    parser.add_argument("--split", choices=SPLITS, default=SPLITS[0], help="the first one trains (%(default)s)")
    options = parser.parse_args(arguments)
    character = _from_options(options)
    path = add_character(options.root, character, options.question)
    print(f"{character.name} ({character.script}) is in {options.root.resolve()}")
    print(f"{len(read_json(path))} questions written to {path.resolve()}")
