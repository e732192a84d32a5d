"""What is to be grown, how each piece is written, and where it goes in the published layout."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_utils.build import SPLITS, Characters, iterate_dialogues, load_characters, speaker
from data_utils.errors import MMRoleError
from data_utils.files import read_journal, read_json, write_error, write_json, write_text
from data_utils.grow_checks import (
    UnusableError,
    dialogue_problem,
    read_comment,
    read_detailed_profile,
    read_summary,
    read_turns,
)
from data_utils.image_files import find_image, image_name_problem
from data_utils.prompts import HUMAN, HYPOTHETICAL_CHARACTERS, Role, prompt_language

JOURNAL = "grown.journal"
IN_ID = {"comment": "comment", "human-role": "human-role-dialogue", "inter-role": "role-role-dialogue"}
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


def dialogue_key(split: str, kind: str, name: str, image: str) -> str:
    """What identifies a dialogue: there is one of each kind for a character and an image."""
    return f"{split}/{kind}/{name}/{image}"


def plan_profile(root: Path, split: str, name: str, script: str, text_file: Path) -> ProfilePlan:
    """Plans a profile from a raw text.

    Raises:
        MMRoleError: The text cannot be read or is empty, the name cannot name a file, or it has a profile already.
    """
    try:
        text = text_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MMRoleError("the text cannot be read", str(error), text_file, "choose a file of UTF-8 text") from None
    if not text:
        raise MMRoleError("the text is empty", None, text_file, "write down what is known about the character")
    plan = ProfilePlan(split, name, script, text=text)
    _check_new(root, plan)
    return plan


def plan_person(root: Path, split: str, facts_file: Path) -> list[ProfilePlan]:
    """Plans the profiles of people who might exist, from a JSON file with the facts of one or of several.

    Raises:
        MMRoleError: The file is not of this form, or someone has a profile already.
    """
    found = read_json(facts_file)
    people = found if isinstance(found, list) else [found]
    plans = []
    for person in people:
        if not isinstance(person, dict) or not isinstance(person.get("name"), str):
            raise MMRoleError(
                "facts without a name", person, facts_file, 'give {"name": "...", ...}, or a list of such'
            )
        facts = json.dumps(person, ensure_ascii=False, indent=4)
        plans.append(ProfilePlan(split, person["name"], HYPOTHETICAL_CHARACTERS, facts=facts))
        _check_new(root, plans[-1])
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
) -> list[DialoguePlan]:
    """Plans dialogues: one of each kind for each character and image; those that are in `root` already are left out.

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

    Raises:
        MMRoleError: A name is unknown, an image is not there, or there is nobody to talk with.
    """
    cast = load_characters(source, [split])
    annotations = _annotations(source)
    plans: list[DialoguePlan] = []
    for name in characters or sorted(cast.scripts):
        role = cast.role(name)
        names = sorted(images if images is not None else _script_images(source, role.script))
        rng = random.Random(f"{seed}/{name}")  # noqa: S311 - draws images, keeps no secret
        chosen = names if most is None or most >= len(names) else sorted(rng.sample(names, most))
        if not chosen:
            raise MMRoleError(
                "no images", role.script, source / "images", f"give --images for {name}, or put some there"
            )
        for kind in kinds:
            there = _there(root, split, kind, name)
            new = [image for image in chosen if image not in there]
            numbers = _free_numbers(there, len(new))
            for image, number in zip(new, numbers, strict=True):
                draw = random.Random(f"{seed}/{name}/{kind}/{image}")  # noqa: S311
                other = _partner(cast, role, partner, draw) if kind == "inter-role" else None
                question, turns = draw.choice(questions[prompt_language(role.script)]), draw.choice(TURNS)
                dialogue_id = f"{_file_name(name)}_{IN_ID[kind]}_{_sort(image)}_{number}"
                path, information = _image(source, image), annotations.get(image, {})
                plan = DialoguePlan(split, kind, dialogue_id, image, path, role, other, information, question, turns)
                plans.append(plan)
    return plans


def write_profile(root: Path, entries: Mapping[str, Any]) -> None:
    """Writes all grown profiles of a journal into the published layout, beside what stands there."""
    for record in (entry["grown"] for entry in entries.values() if "grown" in entry):
        folder, name, file_name = root / "profiles" / record["split"], record["name"], _file_name(record["name"])
        if record["facts"]:
            _write(folder / "meta_info_hypo" / f"{file_name}.json", json.loads(record["facts"]))
        else:
            language = "zh" if prompt_language(record["script"]) == "Chinese" else "en"
            _write(folder / f"raw_info_{language}" / f"{file_name}.txt", record["text"])
        _write(folder / "detailed_profiles" / f"{file_name}.json", record["detailed"])
        _write(folder / "profiles.json", {**_read(folder / "profiles.json", {}), name: record["profile"]})
        roles = _read(folder / "roles.json", {})
        if name not in roles.setdefault(record["script"], []):
            roles[record["script"]].append(name)
        _write(folder / "roles.json", roles)


def write_dialogues(root: Path, entries: Mapping[str, Any]) -> None:
    """Writes all grown dialogues of a journal into the published layout, beside what stands there."""
    files: dict[Path, list[dict[str, Any]]] = {}
    for record in (entry["grown"] for entry in entries.values() if "grown" in entry):
        files.setdefault(_dialogue_file(root, record), []).append(record["dialogue"])
    for path, grown in files.items():
        rows = _read(path, [])
        known = {row["id"] for row in rows}
        new = [dialogue for dialogue in grown if dialogue["id"] not in known]
        if new:
            _write(path, rows + sorted(new, key=lambda dialogue: int(dialogue["id"].rpartition("_")[2])))


def forget(root: Path, journal: Path) -> None:
    """Takes the dialogues that a journal says were grown out of their files."""
    content = read_journal(journal)
    for record in (entry["grown"] for entry in (content.entries if content else {}).values() if "grown" in entry):
        path = _dialogue_file(root, record)
        if path.is_file():
            write_json(path, [row for row in read_json(path) if row["id"] != record["dialogue"]["id"]])


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


def _check_new(root: Path, plan: ProfilePlan) -> None:
    """Refuses a name that cannot be used, and to replace a profile that was not grown here."""
    if image_name_problem(plan.name) or "/" in plan.name or "\\" in plan.name or plan.name.startswith("."):
        raise MMRoleError("a name that cannot name a file", plan.name, "the character's name", "leave out / and \\")
    journal = read_journal(root / "profiles" / JOURNAL)
    if journal is not None and plan.key in journal.entries:
        return
    for folder in (root / "profiles" / split for split in SPLITS):
        if plan.name in _read(folder / "profiles.json", {}):
            raise MMRoleError("there is a profile already", plan.name, folder, "choose another name or data root")


def _there(root: Path, split: str, kind: str, name: str) -> dict[str, str]:
    """The dialogues of a character in a data root: their ids by image."""
    try:
        dialogues = list(iterate_dialogues(root, split, kind))
    except MMRoleError:
        return {}
    own = [d for d in dialogues if d["id"].startswith(f"{_file_name(name)}_{IN_ID[kind]}_")]
    return {d["image"]: d["id"] for d in own if any(speaker(turn) == name for turn in d["conversations"])}


def _free_numbers(there: Mapping[str, str], count: int) -> range:
    numbers = [int(number) for number in (name.rpartition("_")[2] for name in there.values()) if number.isdigit()]
    first = max(numbers, default=-1) + 1
    return range(first, first + count)


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
    path = find_image(source / "images", name, follow_links=True)
    if path is None:
        raise MMRoleError("no such image", name, source / "images", "put it there, or correct --images")
    return path


def _script_images(source: Path, script: str) -> list[str]:
    folder = source / "images" / _file_name(script)
    return [
        f"{folder.name}/{path.name}"
        for path in folder.glob("*")
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
    ]


def _annotations(source: Path) -> dict[str, dict[str, str]]:
    rows = _read(source / "images" / "annotations.json", [])
    return {row["image"]: {key: row.get(key, "") for key in INFORMATION} for row in rows}


def _dialogue_file(root: Path, record: Mapping[str, Any]) -> Path:
    sort = _sort(record["dialogue"]["image"])
    return root / "dialogues" / record["split"] / record["kind"] / f"{_file_name(record['name'])}_{sort}.json"


def _sort(image: str) -> str:
    return "COCO" if image.startswith("COCO/") else "script"


def _file_name(name: str) -> str:
    return name.replace(" ", "_")


def _read(path: Path, nothing: Any) -> Any:
    return read_json(path) if path.is_file() else nothing


def _write(path: Path, content: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path.parent, error, "what was grown is kept in the journal") from error
    if isinstance(content, str):
        write_text(path, content)
    else:
        write_json(path, content)
