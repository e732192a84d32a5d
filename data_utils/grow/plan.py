"""What is to be grown, and how the model is asked for each piece."""

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
from data_utils.files import read_json
from data_utils.grow.files import JOURNAL, file_name, profiles_of
from data_utils.grow.ids import Ids, dialogue_key
from data_utils.grow.validation import (
    UnusableError,
    dialogue_problem,
    read_comment,
    read_detailed_profile,
    read_summary,
    read_turns,
    text_problem,
)
from data_utils.images import file_name_problem, find_image
from data_utils.journal import read_journal
from data_utils.layout import SPLITS
from data_utils.prompts import HUMAN, HYPOTHETICAL_CHARACTERS, Role, prompt_language
from data_utils.roots import Characters, read_annotations, read_profiles

TURNS = (8, 10, 12, 14)  # what nine in ten published human-role dialogues have
INFORMATION = ("role_info", "place_info", "scene_info")
LARGEST_SIDE, LARGEST_FILE = 2048, 4 * 2**20
_MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}

Ask = Callable[[str, str, str | None], str]
Fill = Callable[[str, dict[str, str]], tuple[str, str]]


@dataclass(frozen=True)
class ProfilePlan:
    """A profile to be written, from a raw text or from facts."""

    split: str
    name: str
    script: str
    text: str = ""
    facts: str = ""  # JSON

    @property
    def key(self) -> str:
        """What identifies it in the journal."""
        return f"{self.split}/{self.name}"

    def write(self, ask: Ask, fill: Fill) -> dict[str, Any]:
        """Has the detailed and the short profile written; the record holds all that goes into files.

        Raises:
            UnusableError: What the model wrote cannot be kept.
        """
        values = {"character": self.name, "script": self.script, "language": prompt_language(self.script)}
        template = "profile_from_facts" if self.facts else "profile_from_text"
        detailed = read_detailed_profile(ask(*fill(template, {**values, "text": self.text, "facts": self.facts}), None))
        whole = json.dumps(detailed, ensure_ascii=False, indent=4)
        short = read_summary(ask(*fill("profile_summary", {**values, "detailed": whole}), None))
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
        role: Who has the last word; `partner` is whom it talks with, None for the human.
        information: What the image's annotation says.
        question: Of a comment.
        turns: Of the others.
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
        """What identifies it in the journal."""
        return dialogue_key(self.split, self.kind, self.role.name, self.image)

    def write(self, ask: Ask, fill: Fill) -> dict[str, Any]:
        """Has the dialogue written; the record says where it goes.

        Raises:
            UnusableError: What the model wrote cannot be kept.
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
        known = [f" - {key.removesuffix('_info')}: {text.strip()}" for key, text in self.information.items() if text]
        return {
            "character": self.role.name, "script": self.role.script, "profile": self.role.profile, "language": language,
            "partner": self.partner.name if self.partner else "", "question": self.question, "turns": str(self.turns),
            "partner_profile": self.partner.profile if self.partner else "",
            "image_information": "\n".join(["", "What is known about the image:", *known, ""]) if known else "",
        }  # fmt: skip


def plan_profile(root: Path, split: str, name: str, script: str, text_file: Path) -> ProfilePlan:
    """Plans a profile from a raw text.

    Raises:
        MMRoleError: The text cannot be read or is empty, the name cannot name a file, or it has a profile already.
    """
    try:
        text = text_file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MMRoleError("the text cannot be read", str(error), text_file, "choose a file of UTF-8 text") from None
    if not text:
        raise MMRoleError("the text is empty", None, text_file, "write down what is known about the character")
    plan = ProfilePlan(split, name, script, text=text)
    _check_new(root, [plan])
    return plan


def plan_person(root: Path, split: str, facts_file: Path) -> list[ProfilePlan]:
    """Plans the profiles of people who might exist, from a JSON file with the facts of one or of several.

    Raises:
        MMRoleError: The file is not of this form, two have one name, or someone has a profile already.
    """
    found = read_json(facts_file)
    people = found if isinstance(found, list) else [found]
    if not people:
        raise MMRoleError("there are no facts", None, facts_file, 'give {"name": "...", ...}, or a list of such')
    plans, problems = [], []
    for person in people:
        if not isinstance(person, dict) or not isinstance(person.get("name"), str):
            fix = 'give {"name": "...", ...}, or a list of such'
            problems.append(MMRoleError("facts without a name", person, facts_file, fix))
            continue
        facts = json.dumps(person, ensure_ascii=False, indent=4)
        if not_utf8(facts):
            problems.append(MMRoleError("facts hold half of a surrogate pair", facts, facts_file, "correct that text"))
        plans.append(ProfilePlan(split, person["name"], HYPOTHETICAL_CHARACTERS, facts=facts))
    raise_problems(problems)
    _check_new(root, plans)
    return plans


def plan_dialogues(
    root: Path,
    source: Path,
    split: str,
    questions: Mapping[str, Sequence[str]],
    *,
    characters: Sequence[str] | None,
    partner: str | None,
    kinds: Sequence[str],
    images: Sequence[str] | None,
    most: int | None,
    seed: int,
    again: Mapping[str, str],
) -> list[DialoguePlan]:
    """Plans dialogues: one of each kind for each character and image; those that are in `root` already are left out.

    No id of `root` or `source` is given again, so that both can be built from together.

    Args:
        root: The data root they are written to.
        source: The one that profiles and images come from.
        split: Of both.
        questions: What a comment is asked for with, by language.
        characters: Names, or None for all.
        partner: Who else speaks in inter-role, or None to draw one from the same script.
        kinds: Of dialogues.
        images: Names below `images`, or None for all in the folder named after the character's script.
        most: At most so many images for each character, drawn.
        seed: What is drawn from.
        again: Keys of dialogues to be grown once more, though they are there, and their ids.

    Raises:
        MMRoleError: A name is unknown or cannot name a file, an image is not there, there is nobody to talk with, or
            files of `source` or `root` are wrong.
    """
    cast, roles = _cast(source, split, characters)
    annotations = _annotations(source)
    if images is not None:
        raise_problems(_image_problems(source, images))
    ids = Ids(root, source, split, kinds, again)
    plans: list[DialoguePlan] = []
    for role in roles:
        name = role.name
        names = sorted(set(images) if images is not None else _script_images(source, role.script))
        rng = random.Random(f"{seed}/{name}")  # noqa: S311 - draws images, keeps no secret
        chosen = names if most is None or most >= len(names) else sorted(rng.sample(names, most))
        if not chosen:
            raise MMRoleError(
                "no images", role.script, source / "images", f"give --images for {name}, or put some there"
            )
        for kind in kinds:
            for image in chosen:
                dialogue_id = ids.of(kind, name, image)
                if dialogue_id is None:
                    continue
                draw = random.Random(f"{seed}/{name}/{kind}/{image}")  # noqa: S311
                other = _partner(cast, role, partner, draw) if kind == "inter-role" else None
                question, turns = draw.choice(questions[prompt_language(role.script)]), draw.choice(TURNS)
                path, information = _image(source, image), annotations.get(image, {})
                plan = DialoguePlan(split, kind, dialogue_id, image, path, role, other, information, question, turns)
                plans.append(plan)
    return plans


def check_images(plans: Iterable[DialoguePlan | ProfilePlan]) -> None:
    """Reads the images that will be sent.

    Raises:
        ProblemsError: Some cannot be read, with all of them.
    """
    problems = []
    for path in dict.fromkeys(plan.path for plan in plans if isinstance(plan, DialoguePlan)):
        try:
            image_url(path)
        except MMRoleError as error:
            problems.append(error)
    raise_problems(problems)


def image_url(path: Path) -> str:
    """A data URL of an image: as it is where endpoints take it, made smaller or a JPEG where they would not.

    Raises:
        MMRoleError: It is no image, or broken.
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


def _check_new(root: Path, plans: Sequence[ProfilePlan]) -> None:
    """Refuses names that cannot be used or would share files, and to replace a profile that was not grown here."""
    names = {name: what for p in plans for name, what in ((p.name, "the character's name"), (p.script, "the script"))}
    problems = _name_problems(names)
    if any(plan.name.casefold() == HUMAN for plan in plans):
        problems.append(MMRoleError("human is who talks with characters", None, "the name", "choose another name"))
    raise_problems(problems)
    there = {root / "profiles" / split: profiles_of(root, split) for split in SPLITS}
    journal = read_journal(root / "profiles" / JOURNAL)
    entries = journal.entries if journal is not None else {}
    places = {name: folder for folder, profiles in there.items() for name in profiles}
    for plan in plans:
        if plan.name in places and "grown" not in entries.get(plan.key, {}):
            fix = "choose another name or data root"
            problems.append(MMRoleError("there is a profile already", plan.name, places[plan.name], fix))
        alike = [name for name in places if file_name(name) == file_name(plan.name) and name != plan.name]
        if alike:
            fix = "choose another name"
            problems.append(MMRoleError(f"another character's files have this name: {alike[0]}", plan.name, root, fix))
    stems = [file_name(plan.name) for plan in plans]
    twice = sorted({plan.name for plan in plans if stems.count(file_name(plan.name)) > 1})
    if twice:
        problems.append(MMRoleError("several have the same name", twice, "the facts", "give each a name of its own"))
    raise_problems(problems)


def not_utf8(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which is also how bytes come that are not UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _name_problems(names: Mapping[str, str | Path]) -> list[MMRoleError]:
    """Why names, which come with where they are from, cannot be parts of files' names."""
    found = {name: file_name_problem(name) or text_problem(name) for name in names}
    return [
        MMRoleError(f"a name that cannot name a file: {problem}", name, names[name], "choose another name")
        for name, problem in found.items()
        if problem
    ]


def _cast(source: Path, split: str, wanted: Sequence[str] | None) -> tuple[Characters, list[Role]]:
    """Everybody of a data root's split, and who is wanted of them, whose names must be able to name files."""
    found, wrong = read_profiles(source, split)
    raise_problems(wrong)
    cast = Characters(found.profiles, found.scripts)
    roles: list[Role] = []
    problems: list[MMRoleError] = []
    for name in dict.fromkeys(wanted or sorted(cast.scripts)):
        try:
            roles.append(cast.role(name))
        except MMRoleError as error:
            problems.append(error)
    place = source / "profiles" / split / "roles.json"
    names = [name for role in roles for name in (role.name, role.script)]
    raise_problems([*problems, *_name_problems(dict.fromkeys(names, place))])
    return cast, roles


def _partner(cast: Characters, role: Role, wanted: str | None, draw: random.Random) -> Role:
    if wanted is not None and wanted != role.name:
        return cast.role(wanted)
    others = sorted(name for name, script in cast.scripts.items() if script == role.script and name != role.name)
    if not others:
        raise MMRoleError(
            "nobody else is in the script, so there is no inter-role dialogue", role.name, role.script,
            "give --partner, or leave inter-role out of --kinds",
        )  # fmt: skip
    return cast.role(draw.choice(others))


def _image(source: Path, name: str) -> Path:
    if not_utf8(name):
        raise MMRoleError("an image's name is not UTF-8 text", name, source / "images", "rename the file")
    path = find_image(source / "images", name, follow_links=True)
    if path is None:
        raise MMRoleError("no such image", name, source / "images", "put it there, or correct --images")
    return path


def _image_problems(source: Path, names: Iterable[str]) -> list[MMRoleError]:
    """Why images cannot be used, as far as their names tell."""
    problems = []
    for name in names:
        try:
            _image(source, name)
        except MMRoleError as error:
            problems.append(error)
    return problems


def _script_images(source: Path, script: str) -> list[str]:
    folder = source / "images" / file_name(script)
    return [
        f"{folder.name}/{path.name}"
        for path in folder.glob("*")
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
    ]


def _annotations(source: Path) -> dict[str, dict[str, str]]:
    rows, problems = read_annotations(source)
    raise_problems(problems)
    return {row["image"]: {key: row[key] for key in INFORMATION} for row in rows}
