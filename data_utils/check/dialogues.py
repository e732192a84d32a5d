"""The data doctor's look at characters, annotations and dialogues."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_utils.check.root import COCO, UNREADABLE, Examination, image_files
from data_utils.check.samples import check_rebuilt
from data_utils.errors import MMRoleError
from data_utils.layout import KINDS, SPLITS
from data_utils.prompts import HUMAN
from data_utils.roots import dialogue_files
from data_utils.samples import speaker
from data_utils.schema import Annotation, Dialogue, Profiles, Roles, Row, validate_value

INFORMATION = ("role_info", "place_info", "scene_info")


def read_characters(examination: Examination) -> tuple[dict[str, str], dict[str, str]]:
    """The profiles and scripts of a data root's own characters; what is wrong with them is reported."""
    profiles: dict[str, str] = {}
    scripts: dict[str, str] = {}
    report = examination.report
    for split in SPLITS:
        folder = examination.root / "profiles" / split
        if not folder.is_dir():
            report.absent.append(f"profiles/{split}")
            continue
        for path in sorted(folder.glob("*/*.json")):
            examination.read(path)
        own = _values(examination, folder / "profiles.json", Profiles)
        roles = _values(examination, folder / "roles.json", Roles)
        listed = [(name, script) for script, names in roles.items() for name in names]
        for name, script in listed:
            if name in scripts:
                report.add(
                    "duplicate_id", examination.name(folder / "roles.json"), name, "the character is listed twice"
                )
            scripts[name] = script
            if name not in own and own:
                report.add("missing_profile", examination.name(folder / "profiles.json"), name)
        for name, text in own.items():
            if name not in scripts and roles:
                report.add("unlisted_profile", examination.name(folder / "profiles.json"), name)
            examination.check_text(examination.name(folder / "profiles.json"), name, text)
        profiles.update(own)
    report.checked["characters"] = len(scripts)
    return profiles, scripts


def check_annotations(examination: Examination) -> None:
    """Looks at images/annotations.json."""
    path = examination.root / "images" / "annotations.json"
    if not path.is_file():
        examination.report.absent.append("images/annotations.json")
        return
    there = {name.casefold(): name for name in image_files(examination.root)}
    report, name = examination.report, examination.name(path)
    seen: set[str] = set()
    for row in examination.rows(path, Annotation, ""):
        report.checked["annotations"] += 1
        image = row["image"]
        if image in seen:
            report.add("duplicate_id", name, image, "the image is annotated twice")
        seen.add(image)
        if examination.find_image(image) is None:
            _report_unfound(examination, name, image, there.get(image.casefold()))
        blank = [key for key in INFORMATION if row[key] != row[key].strip()]
        if blank:
            report.add("scene_blanks", name, f"{image}, {', '.join(blank)}", row[blank[0]][-20:])
        for key in INFORMATION:
            examination.check_text(name, f"{image}, {key}", row[key])


def _report_unfound(examination: Examination, name: str, image: str, other: str | None) -> None:
    """Reports an annotated image that is not there; `other` is what has its name in whatever case."""
    kind = "missing_coco" if image.startswith(COCO) else "unknown_image"
    if other is not None and other != image:
        examination.report.add("misnamed_image", name, image, f"there is {other}")
    elif (examination.root / "images" / image).is_symlink():
        examination.report.add(kind, name, image, "its link leads nowhere")
    else:
        examination.report.add(kind, name, image)


def check_dialogues(examination: Examination) -> None:
    """Looks at all dialogues; those that test samples were drawn from are held against these."""
    answers: dict[str, tuple[str, str]] = {}
    shared: dict[str, list[tuple[str, str]]] = {}
    odd_elsewhere = 0
    for split, kind in itertools.product(SPLITS, KINDS):
        for path in _files(examination, split, kind):
            for row in examination.rows(path, Dialogue, "dialogue"):
                examination.report.checked["dialogues"] += 1
                odd_elsewhere += _check_dialogue(examination, path, row, split, kind)
                _collect_answers(row, examination.name(path), answers, shared)
    for text, places in shared.items():
        file, first = answers[text]
        others = ", ".join(name for _, name in places)
        examination.report.add("duplicate_answer", file, f"{first}, {others}", text)
    blank_dialogues = examination.report.checked.pop("_blank", 0)
    examination.report.remark("turn_blanks", f"in {blank_dialogues:,} dialogues")
    if odd_elsewhere:
        examination.report.remark("odd_inter_role", f"and {odd_elsewhere:,} {SPLITS[1]}, which train nothing")


def _files(examination: Examination, split: str, kind: str) -> list[Path]:
    """The files of a split's dialogues of a kind; none is a word in the report."""
    try:
        files = dialogue_files(examination.root, split, kind)
    except MMRoleError as error:  # a folder that may not be read
        examination.report.add("unreadable_file", f"dialogues/{split}/{kind}", detail=error.what)
        return []
    if not files:
        examination.report.absent.append(f"dialogues/{split}/{kind}")
    return files


def _check_dialogue(examination: Examination, path: Path, row: Row, split: str, kind: str) -> int:
    """Looks at one dialogue; gives 1 if it is of odd length but trains nothing."""
    report, file, name = examination.report, examination.name(path), row["id"]
    examination.images.setdefault(row["image"], (file, name))
    turns = row["conversations"]
    if not turns:
        report.add("empty_dialogue", file, name)
        return 0
    if split == SPLITS[0] and name not in examination.tested:
        examination.trained.add(row["image"])
    check_rebuilt(examination, row)
    speakers = [speaker(turn) for turn in turns]
    _check_speakers(examination, file, name, speakers)
    if kind == "comment" and speakers[-1] == HUMAN:
        report.add("no_answer", file, name)
    if kind == "human-role" and speakers[-1] == HUMAN:
        report.add("ends_on_human", file, name)
    for number, turn in enumerate(turns):
        where = f"{name}, turn {number}"
        if not turn["value"].strip():
            report.add("empty_turn", file, where)
        elif turn["value"] != turn["value"].strip():
            report.add("turn_blanks", file, where, _edges(turn["value"]))
        examination.check_text(file, where, turn["value"])
    report.checked["_blank"] += any(t["value"] != t["value"].strip() for t in turns if t["value"].strip())
    if kind == "inter-role" and len(turns) % 2:
        if split == SPLITS[0]:
            report.add("odd_inter_role", file, name, f"{len(turns)} turns")
        return int(split != SPLITS[0])
    return 0


def _check_speakers(examination: Examination, file: str, name: str, speakers: list[str]) -> None:
    characters = examination.characters
    for who in dict.fromkeys(speakers):
        if who != HUMAN and who not in characters.scripts:
            examination.report.add("unknown_speaker", file, name, who)
        elif who != HUMAN and who not in characters.profiles:
            examination.report.add("missing_profile", file, name, who)
    twice = [number for number, (a, b) in enumerate(itertools.pairwise(speakers)) if a == b]
    if twice or len(set(speakers)) > 2:
        detail = f"turn {twice[0] + 1}, {speakers[twice[0]]}" if twice else ", ".join(dict.fromkeys(speakers))
        examination.report.add("broken_alternation", file, name, detail)


def _collect_answers(
    row: Row, file: str, answers: dict[str, tuple[str, str]], shared: dict[str, list[tuple[str, str]]]
) -> None:
    for turn in row["conversations"]:
        if speaker(turn) == HUMAN or not turn["value"].strip():
            continue
        first = answers.setdefault(turn["value"], (file, row["id"]))
        if first[1] != row["id"]:
            shared.setdefault(turn["value"], []).append((file, row["id"]))


def _values(examination: Examination, path: Path, form: Any) -> Mapping[str, Any]:
    found = examination.read(path)
    if found is UNREADABLE:
        return {}
    problems = validate_value(found, form, path)
    for problem in problems:
        examination.problem(path, problem)
    return {} if problems else found


def _edges(text: str) -> str:
    lead, trail = len(text) - len(text.lstrip()), len(text) - len(text.rstrip())
    return " and ".join(filter(None, [f"{lead} before" if lead else "", f"{trail} after" if trail else ""]))
