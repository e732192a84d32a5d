"""Adds a character to a data root, from its profile and pictures."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_utils.errors import MMRoleError, raise_problems, shown
from data_utils.files import Row, write_bytes, write_json
from data_utils.images import IMAGE_SUFFIXES, NO_IMAGES, file_name_problem, plain_picture, upright_rgb
from data_utils.layout import PLAIN_IMAGE, SPLITS, card_path, file_name, play_path, profiles_folder
from data_utils.paths import listed
from data_utils.prompts import HUMAN, ImageInformation, prompt_language
from data_utils.roots import (
    Characters,
    SplitProfiles,
    add_profile,
    read_annotations,
    read_profiles,
    write_annotations,
)
from data_utils.samples import build_sample
from qwen_vl.special_tokens import SPECIAL_TOKENS

QUESTIONS = {
    "English": ("Please tell me what you think of this picture.", "What does this picture remind you of?"),
    "Chinese": ("请谈谈你对这张图片的看法。", "这张图片让你想起了什么？"),
}
CARD_SUFFIXES = (".png", ".json", ".charx")
_TEXTS = (".txt", ".md")


@dataclass(frozen=True)
class Picture:
    """A picture of a character, and its description.

    Attributes:
        path: Its file, or a label for messages if `content` is given.
        about, place, who: What it shows, where that is, and who is on it.
        content: The picture's bytes, if it is not in a file.
    """

    path: Path
    about: str = ""
    place: str = ""
    who: str = ""
    content: bytes | None = None


@dataclass(frozen=True)
class NewCharacter:
    """A character to be added.

    Attributes:
        name: As prompts name it.
        script: What the character comes from.
        profile: The profile text.
        pictures: Related pictures; there may be none.
        split: Where the character belongs: the first split trains, the second only tests.
        card: The card that the character comes from, and the suffix under which it is kept.
    """

    name: str
    script: str
    profile: str
    pictures: Sequence[Picture] = ()
    split: str = SPLITS[0]
    card: tuple[bytes, str] | None = None


def read_folder(folder: Path) -> tuple[str, list[Picture]]:
    """Return the profile and the pictures in a character's folder, and print the names of unused files.

    Raises:
        MMRoleError: There is no profile, or a text cannot be read.
    """
    profiles = [folder / name for name in ("profile.txt", "profile.md") if (folder / name).is_file()]
    if not profiles:
        fix = "describe the character in profile.txt"
        raise MMRoleError("no profile.txt or profile.md", None, folder, fix)
    files = listed(folder)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    texts = {path: path.with_suffix(".txt") for path in images}
    abouts = {path: text for path, text in texts.items() if text.is_file() and text not in profiles}
    used = {profiles[0], *images, *abouts.values()}
    for path in files:
        if path not in used and (path.suffix.lower() in _TEXTS or path.suffix.lower() not in NO_IMAGES):
            why = "no picture has this name" if path.suffix.lower() in _TEXTS else f"not {', '.join(IMAGE_SUFFIXES)}"
            why = "profile.txt is used" if path.name == "profile.md" else why
            print(f"not used: {shown(path)} ({why})", file=sys.stderr, flush=True)
    pictures = [Picture(path, read_text(abouts[path]) if path in abouts else "") for path in images]
    return read_text(profiles[0]), pictures


def read_text(path: Path) -> str:
    """Return the text of a file, stripped.

    Raises:
        MMRoleError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MMRoleError("the text cannot be read", str(error), path, "choose a file of UTF-8 text") from None


def add_character(root: Path, character: NewCharacter, questions: Sequence[str] = ()) -> Path:
    """Add a character to a data root; nothing is written if anything is wrong.

    A picture is stored as an upright 8-bit RGB copy, because the model reads neither EXIF nor transparency; one that
    already is such a copy is stored unchanged.

    Args:
        root: A data root, new or existing.
        character: The character; an existing one gets the new profile, and further pictures.
        questions: Questions about each picture; by default two general ones.

    Returns:
        The test input that was written.

    Raises:
        ProblemsError: The character or the data root has faults; every one is reported.
        MMRoleError: A file cannot be written.
    """
    annotations, problems = read_annotations(root)
    splits: dict[str, SplitProfiles] = {}
    for split in SPLITS:
        splits[split], wrong = read_profiles(root, split, may_lack=True)
        problems += wrong
    contents, unreadable = _picture_contents(character)
    raise_problems([*problems, *_problems(root, splits, character, questions), *unreadable])
    if character.card:
        _keep_card(root, character)
    names = _image_names(root, character, contents, {row["image"] for row in annotations})
    for image, picture in names.items():
        if not (root / "images" / image).is_file():
            write_bytes(root / "images" / image, contents[picture.path][0])
        information = ImageInformation(role=picture.who, place=picture.place, scene=picture.about)
        annotations.append({"image": image, **information.fields()})
    add_profile(root, character.split, character.name, character.script, character.profile)
    if names:
        write_annotations(root, annotations)
    return _write_questions(root, character, annotations, questions)


def play_samples(character: NewCharacter, pictures: Sequence[Row], questions: Sequence[str]) -> list[Row]:
    """Return test samples in which the human asks the character each question about each picture.

    There is no ground truth.
    """
    characters = Characters({character.name: character.profile}, {character.name: character.script})
    samples = []
    for number, (picture, question) in enumerate((p, q) for p in pictures for q in questions):
        turns = [{"from": HUMAN, "value": question}, {"role": character.name, "value": ""}]
        dialogue = {"id": f"{file_name(character.name)}_play_{number}", **picture, "conversations": turns}
        samples.append(build_sample(dialogue, 1, characters))
    return samples


def _write_questions(root: Path, character: NewCharacter, annotations: Sequence[Row], questions: Sequence[str]) -> Path:
    folder = f"{file_name(character.script)}/"
    pictures = [row for row in annotations if row["image"].startswith(folder)]
    if not pictures:
        plain = io.BytesIO()
        plain_picture().save(plain, "PNG")
        write_bytes(root / "images" / PLAIN_IMAGE, plain.getvalue())
        pictures = [{"image": PLAIN_IMAGE}]
    path = play_path(root, character.name)
    write_json(path, play_samples(character, pictures, questions or QUESTIONS[prompt_language(character.script)]))
    return path


def _picture_contents(character: NewCharacter) -> tuple[dict[Path, tuple[bytes, str]], list[MMRoleError]]:
    """Return the content and suffix to store for each picture, and a problem for each unusable one."""
    contents: dict[Path, tuple[bytes, str]] = {}
    problems = []
    for picture in character.pictures:
        try:
            contents[picture.path] = stored_picture(picture)
        except (OSError, ValueError) as error:
            problems.append(MMRoleError("an image cannot be used", str(error), picture.path, "give another file"))
    return contents, problems


def stored_picture(picture: Picture) -> tuple[bytes, str]:
    """Return the content and suffix of a picture as it is stored.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a picture, is cut short, or has more pixels than Pillow allows.
    """
    content = picture.path.read_bytes() if picture.content is None else picture.content
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                image.load()
            return upright_rgb(content)
    except Exception as error:  # per-sample boundary: each of Pillow's decoders raises other errors
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _keep_card(root: Path, character: NewCharacter) -> None:
    assert character.card is not None
    content, suffix = character.card
    write_bytes(card_path(root, character.split, character.name, suffix), content)
    for other in CARD_SUFFIXES:
        if other != suffix:
            card_path(root, character.split, character.name, other).unlink(missing_ok=True)


def _problems(
    root: Path, splits: Mapping[str, SplitProfiles], character: NewCharacter, questions: Sequence[str]
) -> list[MMRoleError]:
    """Return what is wrong with the character's names and texts, and with its place in the data root."""
    name, problems = character.name, []
    for option, text in (("--name", name), ("--script", character.script)):
        problem = file_name_problem(text)
        if problem:
            problems.append(MMRoleError(f"a name that cannot name a file: {problem}", text, option, "choose another"))
    if name == HUMAN:
        what = "this name is reserved for the human who talks with characters"
        problems.append(MMRoleError(what, name, "--name", "choose another name"))
    script = splits[character.split].scripts.get(name, character.script)
    if script != character.script:
        where = profiles_folder(root, character.split) / "roles.json"
        problems.append(MMRoleError("the character exists in another script", script, where, "give the same script"))
    others = [split for split, found in splits.items() if split != character.split and name in found.profiles]
    if others:
        where = profiles_folder(root, others[0])
        what = "the character exists in the other split"
        problems.append(MMRoleError(what, others[0], where, "give the same --split"))
    names = {other for found in splits.values() for other in found.profiles}
    alike = sorted(other for other in names if file_name(other) == file_name(name) and other != name)
    if alike:
        what = f"another character's files have this name: {alike[0]}"
        problems.append(MMRoleError(what, name, "--name", "choose another name"))
    if not character.profile.strip():
        problems.append(MMRoleError("the profile is empty", None, "--profile", "describe the character"))
    abouts = [text for picture in character.pictures for text in (picture.about, picture.place, picture.who)]
    for text in (name, character.script, character.profile, *questions, *abouts):
        token = next((token for token in SPECIAL_TOKENS if token in text), None)
        if token:
            what = "a text contains a special token, which training would interpret"
            problems.append(MMRoleError(what, token, fix="reword it"))
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            what = "a text is not UTF-8, or holds half of a surrogate pair"
            problems.append(MMRoleError(what, text, fix="write it again, in a terminal that is set to UTF-8"))
    return problems


def _image_names(
    root: Path, character: NewCharacter, contents: Mapping[Path, tuple[bytes, str]], annotated: Collection[str]
) -> dict[str, Picture]:
    """Return the new pictures by name, numbered after those of the script.

    A picture whose content is already in the folder keeps its name. It is left out if it is annotated, which it is not
    if a run was killed before writing the annotations.
    """
    folder = root / "images" / file_name(character.script)
    files = [path for path in listed(folder) if path.is_file()]
    # Of two files with the same content the annotated one counts.
    files.sort(key=lambda path: f"{folder.name}/{path.name}" in annotated)
    names_of = {path.read_bytes(): f"{folder.name}/{path.name}" for path in files}
    number = max([int(path.stem) for path in files if path.stem.isdigit()], default=0)
    names: dict[str, Picture] = {}
    for picture in character.pictures:
        content, suffix = contents[picture.path]
        if content not in names_of:
            number += 1
            names_of[content] = f"{folder.name}/{number:02d}{suffix}"
        if names_of[content] not in annotated:
            names.setdefault(names_of[content], picture)
    return names
