"""Plans profiles and dialogues, and how the model is asked for each."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import Row, read_json
from data_utils.grow.validation import (
    UnusableError,
    dialogue_problem,
    read_comment,
    read_detailed_profile,
    read_summary,
    read_turns,
    text_problem,
)
from data_utils.images import IMAGE_SUFFIXES, file_name_problem, find_image
from data_utils.layout import COCO, KIND_IN_ID, KINDS, SPLITS, file_name, profiles_folder
from data_utils.paths import listed
from data_utils.prompts import HUMAN, HYPOTHETICAL_CHARACTERS, INFORMATION_FIELDS, Role, prompt_language
from data_utils.roots import Characters, dialogue_files, read_annotations, read_profiles
from data_utils.samples import speaker
from data_utils.schema import Dialogue, read_rows

TURNS = (8, 10, 12, 14)  # nine in ten published human-role dialogues have so many
LARGEST_SIDE, LARGEST_FILE = 2048, 4 * 2**20
_MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}

Ask = Callable[[str, str, str | None], str]
Fill = Callable[[str, dict[str, str]], tuple[str, str]]
Record = Mapping[str, Any]  # a finished profile or dialogue, and where it is written


@dataclass(frozen=True)
class ProfilePlan:
    """A profile to be written, from a text or from facts."""

    split: str
    name: str
    script: str
    text: str = ""
    facts: str = ""  # JSON

    @property
    def key(self) -> str:
        """Its key in the journal."""
        return f"{self.split}/{self.name}"

    def write(self, ask: Ask, fill: Fill) -> dict[str, Any]:
        """Ask for the detailed and the short profile, and return the record with everything for the files.

        Raises:
            UnusableError: The answer cannot be used.
        """
        values = {"character": self.name, "script": self.script, "language": prompt_language(self.script)}
        template = "profile_from_facts" if self.facts else "profile_from_text"
        detailed = read_detailed_profile(ask(*fill(template, {**values, "text": self.text, "facts": self.facts}), None))
        text = json.dumps(detailed, ensure_ascii=False, indent=4)
        short = read_summary(ask(*fill("profile_summary", {**values, "detailed": text}), None))
        return {
            "split": self.split, "name": self.name, "script": self.script, "text": self.text, "facts": self.facts,
            "detailed": detailed, "profile": short,
        }  # fmt: skip


@dataclass(frozen=True)
class DialoguePlan:
    """A dialogue to be written.

    Attributes:
        split: Where it goes.
        kind: "comment", "human-role" or "inter-role".
        id: The dialogue's.
        image: Name of the image, `path` where it lies.
        role: The character that speaks last; `partner` is the other one, None for the human.
        information: The image's annotation.
        question: The question of a comment.
        turns: The number of turns of other kinds.
    """

    split: str
    kind: str
    id: str
    image: str
    path: Path
    role: Role
    partner: Role | None
    information: Mapping[str, str]
    question: str
    turns: int

    @property
    def key(self) -> str:
        """Its key in the journal."""
        return dialogue_key(self.split, self.kind, self.role.name, self.image)

    def write(self, ask: Ask, fill: Fill) -> dict[str, Any]:
        """Ask for the dialogue, and return its record.

        Raises:
            UnusableError: The answer cannot be used.
            MMRoleError: The image cannot be read.
        """
        language = prompt_language(self.role.script)
        answer = ask(*fill(self.kind, self._values(language)), image_url(self.path))
        if self.kind == "comment":
            said = {"role": self.role.name, "value": read_comment(answer, self.role.name)}
            turns = [{"from": HUMAN, "value": self.question}, said]  # published: "from" in a comment's first turn only
        else:
            turns = read_turns(answer, [self.partner.name if self.partner else HUMAN, self.role.name])
        dialogue = {"id": self.id, "image": self.image, **self.information, "conversations": turns}
        problem = dialogue_problem(dialogue, self.kind, language)
        if problem:
            raise UnusableError(problem)
        return {"split": self.split, "kind": self.kind, "name": self.role.name, "dialogue": dialogue}

    def _values(self, language: str) -> dict[str, str]:
        facts = [f" - {key.removesuffix('_info')}: {text.strip()}" for key, text in self.information.items() if text]
        return {
            "character": self.role.name, "script": self.role.script, "profile": self.role.profile, "language": language,
            "partner": self.partner.name if self.partner else "", "question": self.question, "turns": str(self.turns),
            "partner_profile": self.partner.profile if self.partner else "",
            "image_information": "\n".join(["", "What is known about the image:", *facts, ""]) if facts else "",
        }  # fmt: skip


Plan = ProfilePlan | DialoguePlan


def dialogue_key(split: str, kind: str, name: str, image: str) -> str:
    """Return the key of a dialogue: there is one of each kind per character and image."""
    return f"{split}/{kind}/{name}/{image}"


def dialogue_number(dialogue_id: str) -> int:
    """Return the number at the end of a dialogue's id; -1 if there is none."""
    number = dialogue_id.rpartition("_")[2]
    return int(number) if number.isdecimal() else -1


def plan_profile(
    root: Path, split: str, name: str, script: str, file: Path, grown: Mapping[str, Record], overwrite: bool
) -> list[Plan]:
    """Plan a profile from a text.

    Raises:
        MMRoleError: The text cannot be read or is empty, the name cannot name a file, or it already has a profile.
    """
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MMRoleError("the text cannot be read", str(error), file, "choose a file of UTF-8 text") from None
    if not text:
        raise MMRoleError("the text is empty", None, file, "write a text about the character")
    return _new_profiles(root, [ProfilePlan(split, name, script, text=text)], grown, overwrite)


def plan_people(root: Path, split: str, file: Path, grown: Mapping[str, Record], overwrite: bool) -> list[Plan]:
    """Plan the profiles of hypothetical people, from a JSON file with the facts of one or several.

    Raises:
        MMRoleError: The file has a wrong form, two people have the same name, or someone already has a profile.
    """
    found = read_json(file)
    people = found if isinstance(found, list) else [found]
    fix = 'give {"name": "...", ...}, or a list of such'
    if not people:
        raise MMRoleError("the file holds no facts", None, file, fix)
    plans, problems = [], []
    for person in people:
        if not isinstance(person, dict) or not isinstance(person.get("name"), str):
            problems.append(MMRoleError("facts without a name", person, file, fix))
            continue
        facts = json.dumps(person, ensure_ascii=False, indent=4)
        if any("\ud800" <= character <= "\udfff" for character in facts):
            problems.append(MMRoleError("facts hold half of a surrogate pair", facts, file, "correct that text"))
        plans.append(ProfilePlan(split, person["name"], HYPOTHETICAL_CHARACTERS, facts=facts))
    raise_problems(problems)
    return _new_profiles(root, plans, grown, overwrite)


def _new_profiles(root: Path, plans: Sequence[ProfilePlan], grown: Mapping[str, Record], overwrite: bool) -> list[Plan]:
    """Return the plans that still have to be grown.

    Raises:
        ProblemsError: Names cannot be used or would share files, or an existing profile was not grown here.
    """
    names = {name: what for p in plans for name, what in ((p.name, "the character's name"), (p.script, "the script"))}
    problems = _name_problems(names)
    if any(plan.name.casefold() == HUMAN for plan in plans):
        what = "this name is reserved for the human who talks with characters"
        problems.append(MMRoleError(what, HUMAN, "the name", "choose another name"))
    raise_problems(problems)
    places: dict[str, Path] = {}
    for split in SPLITS:
        found, wrong = read_profiles(root, split, may_lack=True)
        problems += wrong
        places |= dict.fromkeys(found.profiles, profiles_folder(root, split))
    stems = [file_name(plan.name) for plan in plans]
    for plan, stem in zip(plans, stems, strict=True):
        if plan.name in places and plan.key not in grown:
            fix = "choose another name or data root"
            problems.append(MMRoleError("the character already has a profile", plan.name, places[plan.name], fix))
        alike = [name for name in places if file_name(name) == stem and name != plan.name]
        if alike:
            what = f"another character's files have this name: {alike[0]}"
            problems.append(MMRoleError(what, plan.name, root, "choose another name"))
        if stems.count(stem) > 1:
            problems.append(MMRoleError("several people have the same name", plan.name, "the facts", "rename one"))
    raise_problems(problems)
    return [plan for plan in plans if overwrite or plan.key not in grown]


def plan_dialogues(
    root: Path,
    source: Path,
    split: str,
    questions: Mapping[str, Sequence[str]],
    grown: Mapping[str, Record],
    *,
    characters: Sequence[str] | None,
    partner: str | None,
    kinds: Sequence[str],
    images: Sequence[str] | None,
    most: int | None,
    seed: int,
    overwrite: bool,
) -> list[Plan]:
    """Plan dialogues: one of each kind for each character and image, without existing ones.

    No id of `root` or `source` is reused, so that samples can be built from both together.

    Args:
        root: The data root they are written to.
        source: The one that profiles and images come from.
        split: The split of both.
        questions: The questions of comments, by language.
        grown: Earlier results, by key.
        characters: Names, or None for all.
        partner: The other character of inter-role, or None to draw one from the same script.
        kinds: Of dialogues.
        images: Names below `images`, or None for all in the folder named after the character's script.
        most: The number of images to draw for each character.
        seed: Seed of the random draws.
        overwrite: Plan also those in `grown`, with their ids.

    Raises:
        MMRoleError: A name is unknown or cannot name a file, an image does not exist, there is no partner, or files of
            `source` or `root` are wrong.
    """
    cast, roles = _cast(source, split, characters)
    rows, problems = read_annotations(source)
    raise_problems(problems)
    annotations = {row["image"]: {key: row[key] for key in INFORMATION_FIELDS} for row in rows}
    paths = _image_paths(source, images if images is not None else [])
    exists, numbers = _existing(root, source, split, grown)
    plans: list[Plan] = []
    for role in roles:
        script_images = {} if images is not None else _image_paths(source, _script_images(source, role.script))
        names = sorted(paths | script_images)
        rng = random.Random(f"{seed}/{role.name}")  # noqa: S311 - draws images, keeps no secret
        chosen = names if most is None or most >= len(names) else sorted(rng.sample(names, most))
        if not chosen:
            fix = f"give --images for {role.name}, or put some there"
            raise MMRoleError("no images", role.script, source / "images", fix)
        for kind, image in ((kind, image) for kind in kinds for image in chosen):
            key = dialogue_key(split, kind, role.name, image)
            head = f"{file_name(role.name)}_{KIND_IN_ID[kind]}_"
            if key in grown:
                if not overwrite:
                    continue
                dialogue_id = grown[key]["dialogue"]["id"]
            elif key in exists:
                continue
            else:
                numbers[head] = numbers.get(head, -1) + 1
                dialogue_id = f"{head}{'COCO' if image.startswith(COCO) else 'script'}_{numbers[head]}"
            draw = random.Random(f"{seed}/{key.partition('/')[2]}")  # noqa: S311
            other = _partner(cast, role, partner, draw) if kind == "inter-role" else None
            question, turns = draw.choice(questions[prompt_language(role.script)]), draw.choice(TURNS)
            path, information = (paths | script_images)[image], annotations.get(image, {})
            plan = DialoguePlan(split, kind, dialogue_id, image, path, role, other, information, question, turns)
            plans.append(plan)
    return plans


def check_images(plans: Iterable[Plan]) -> None:
    """Read the images that will be sent.

    Raises:
        ProblemsError: Some cannot be read; every one is reported.
    """
    _collect(image_url, dict.fromkeys(plan.path for plan in plans if isinstance(plan, DialoguePlan)))


def image_url(path: Path) -> str:
    """Return a data URL of an image, reduced or converted to JPEG if endpoints would not accept the original.

    Raises:
        MMRoleError: It is not an image, or broken.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            mime = _MIME.get(image.format or "")
            if mime is None or len(data) > LARGEST_FILE or max(image.size) > LARGEST_SIDE:
                image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
                smaller = io.BytesIO()
                image.convert("RGB").save(smaller, "JPEG", quality=90)
                data, mime = smaller.getvalue(), _MIME["JPEG"]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MMRoleError("an image cannot be read", str(error), path, "replace the file, or leave it out") from None
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _existing(root: Path, source: Path, split: str, grown: Mapping[str, Record]) -> tuple[set[str], dict[str, int]]:
    """Return the keys of the dialogues in `root` and this split, and the highest number for each prefix of an id."""
    dialogues: list[tuple[Path, str, str, Row]] = []
    problems: list[MMRoleError] = []
    for folder in {source.resolve(), root.resolve()}:
        for part, kind in ((part, kind) for part in SPLITS for kind in KINDS):
            for path in dialogue_files(folder, part, kind):
                rows, wrong = read_rows(path, Dialogue)
                problems += wrong
                dialogues += [(folder, part, kind, row) for row in rows]
    raise_problems(problems)
    exists = set()
    ids = [record["dialogue"]["id"] for record in grown.values() if "dialogue" in record]
    for folder, part, kind, row in dialogues:
        ids.append(row["id"])
        for name in {speaker(turn) for turn in row["conversations"]}:
            own = row["id"].startswith(f"{file_name(name)}_{KIND_IN_ID[kind]}_")
            if own and part == split and folder == root.resolve():
                exists.add(dialogue_key(split, kind, name, row["image"]))
    numbers: dict[str, int] = {}
    for dialogue_id in ids:  # <head>_<COCO or script>_<number>
        head = dialogue_id.rpartition("_")[0].rpartition("_")[0] + "_"
        numbers[head] = max(numbers.get(head, -1), dialogue_number(dialogue_id))
    return exists, numbers


def _cast(source: Path, split: str, wanted: Sequence[str] | None) -> tuple[Characters, list[Role]]:
    """Return all characters of a split, and the wanted ones, whose names must be usable as file names."""
    found, problems = read_profiles(source, split)
    raise_problems(problems)
    cast = Characters(found.profiles, found.scripts)
    roles: list[Role] = []
    for name in dict.fromkeys(wanted or sorted(cast.scripts)):
        try:
            roles.append(cast.role(name))
        except MMRoleError as error:
            problems.append(error)
    names = [name for role in roles for name in (role.name, role.script)]
    raise_problems([*problems, *_name_problems(dict.fromkeys(names, profiles_folder(source, split) / "roles.json"))])
    return cast, roles


def _name_problems(names: Mapping[str, str | Path]) -> list[MMRoleError]:
    """Return a problem for each name (given with its origin) that cannot be part of a file name."""
    return [
        MMRoleError(f"a name that cannot name a file: {problem}", name, where, "choose another name")
        for name, where in names.items()
        if (problem := file_name_problem(name) or text_problem(name))
    ]


def _partner(cast: Characters, role: Role, wanted: str | None, draw: random.Random) -> Role:
    if wanted is not None and wanted != role.name:
        return cast.role(wanted)
    others = sorted(name for name, script in cast.scripts.items() if script == role.script and name != role.name)
    if not others:
        what = "the script has no other character for an inter-role dialogue"
        raise MMRoleError(what, role.name, role.script, "give --partner, or leave inter-role out of --kinds")
    return cast.role(draw.choice(others))


def _script_images(source: Path, script: str) -> list[str]:
    folder = source / "images" / file_name(script)
    return [f"{folder.name}/{path.name}" for path in listed(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def _image_paths(source: Path, names: Iterable[str]) -> dict[str, Path]:
    def path_of(name: str) -> Path:
        path = find_image(source / "images", name, follow_links=True)
        if path is None:
            raise MMRoleError("no such image", name, source / "images", "put it there, or correct --images")
        return path

    return _collect(path_of, dict.fromkeys(names))


def _collect(function: Callable[[Any], Any], values: Iterable[Any]) -> dict[Any, Any]:
    """Return the results of a function by value; its problems are raised together."""
    results, problems = {}, []
    for value in values:
        try:
            results[value] = function(value)
        except MMRoleError as error:
            problems.append(error)
    raise_problems(problems)
    return results
