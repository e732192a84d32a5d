"""Checks characters, annotations and dialogues."""

from __future__ import annotations

import itertools
from pathlib import Path

from data_utils.check.checker import Checker
from data_utils.check.samples import check_rebuilt
from data_utils.errors import MMRoleError
from data_utils.files import Row, read_json
from data_utils.images import images_below
from data_utils.layout import COCO, KINDS, SPLITS, annotations_path, profiles_folder
from data_utils.paths import is_file, is_folder, listed
from data_utils.prompts import HUMAN, INFORMATION_FIELDS
from data_utils.roots import Characters, dialogue_files, read_profiles
from data_utils.samples import speaker
from data_utils.schema import Annotation, Dialogue


def check_characters(checker: Checker) -> Characters:
    """Check and return the characters of a data root."""
    profiles: dict[str, str] = {}
    scripts: dict[str, str] = {}
    report = checker.report
    for split in SPLITS:
        folder = profiles_folder(checker.root, split)
        if not is_folder(folder):
            report.absent.append(f"profiles/{split}")
            continue
        _check_sources(checker, folder)
        found, problems = read_profiles(checker.root, split)
        for problem in problems:
            checker.problem(_file_of(problem, folder), problem)
        profiles_name, roles_name = (checker.name(folder / name) for name in ("profiles.json", "roles.json"))
        for name, script in ((name, script) for script, names in found.roles.items() for name in names):
            if name in scripts:
                report.add("duplicate_id", roles_name, name, "the character is listed twice")
            scripts[name] = script
            if name not in found.profiles and found.profiles:
                report.add("missing_profile", profiles_name, name)
        for name, text in found.profiles.items():
            if name not in scripts and found.roles:
                report.add("unlisted_profile", profiles_name, name)
            checker.check_text(profiles_name, name, text)
        profiles.update(found.profiles)
    report.checked["characters"] = len(scripts)
    return Characters(profiles, scripts)


def _check_sources(checker: Checker, folder: Path) -> None:
    """Read the JSON files that profiles were made from."""
    for path in (path for below in listed(folder) if is_folder(below) for path in listed(below, "*.json")):
        try:
            read_json(path)
        except MMRoleError as error:
            checker.problem(path, error)


def _file_of(problem: MMRoleError, folder: Path) -> Path:
    place = f"{problem.value} {problem.where}"
    return folder / ("roles.json" if str(folder / "roles.json") in place else "profiles.json")


def check_annotations(checker: Checker) -> None:
    """Check images/annotations.json."""
    path = annotations_path(checker.root)
    if not is_file(path):
        checker.report.absent.append("images/annotations.json")
        return
    names = {name.casefold(): name for name, _ in images_below(checker.root)}
    report, name = checker.report, checker.name(path)
    seen: set[str] = set()
    for row in checker.rows(path, Annotation, ""):
        report.checked["annotations"] += 1
        image = row["image"]
        if image in seen:
            report.add("duplicate_id", name, image, "the image is annotated twice")
        seen.add(image)
        if checker.find_image(image) is None:
            _report_unfound(checker, name, image, names.get(image.casefold()))
        blank = [key for key in INFORMATION_FIELDS if row[key] != row[key].strip()]
        if blank:
            report.add("scene_blanks", name, f"{image}, {', '.join(blank)}", row[blank[0]][-20:])
        for key in INFORMATION_FIELDS:
            checker.check_text(name, f"{image}, {key}", row[key])


def _report_unfound(checker: Checker, name: str, image: str, other: str | None) -> None:
    """Report an annotated image that does not exist; `other` is a file whose name differs only in case, if any."""
    kind = "missing_coco" if image.startswith(COCO) else "unknown_image"
    if other is not None and other != image:
        checker.report.add("misnamed_image", name, image, f"there is {other}")
    elif (checker.root / "images" / image).is_symlink():
        checker.report.add(kind, name, image, "its link is broken")
    else:
        checker.report.add(kind, name, image)


def check_dialogues(checker: Checker) -> None:
    """Check all dialogues, and compare test samples with what is built from their dialogue."""
    answers: dict[str, tuple[str, str]] = {}
    shared: dict[str, list[tuple[str, str]]] = {}
    blank = odd_elsewhere = 0
    report = checker.report
    for split, kind in itertools.product(SPLITS, KINDS):
        for path in _files(checker, split, kind):
            for row in checker.rows(path, Dialogue, "dialogue"):
                report.checked["dialogues"] += 1
                before = report.count("turn_blanks")
                _check_dialogue(checker, path, row, split, kind)
                blank += report.count("turn_blanks") > before
                odd_elsewhere += split != SPLITS[0] and kind == "inter-role" and len(row["conversations"]) % 2
                _collect_answers(row, checker.name(path), answers, shared)
    for text, places in shared.items():
        file, first = answers[text]
        others = ", ".join(name for _, name in places)
        report.add("duplicate_answer", file, f"{first}, {others}", text)
    report.remark("turn_blanks", f"in {blank:,} dialogues")
    if odd_elsewhere:
        report.remark("odd_inter_role", f"and {odd_elsewhere:,} {SPLITS[1]}, which train nothing")


def _files(checker: Checker, split: str, kind: str) -> list[Path]:
    """Return the files of a split's dialogues of a kind; the report names a kind without any."""
    try:
        files = dialogue_files(checker.root, split, kind)
    except MMRoleError as error:  # an unreadable folder
        checker.report.add("unreadable_file", f"dialogues/{split}/{kind}", detail=error.what)
        return []
    if not files:
        checker.report.absent.append(f"dialogues/{split}/{kind}")
    return files


def _check_dialogue(checker: Checker, path: Path, row: Row, split: str, kind: str) -> None:
    report, file, name = checker.report, checker.name(path), row["id"]
    checker.images.setdefault(row["image"], (file, name))
    turns = row["conversations"]
    if not turns:
        report.add("empty_dialogue", file, name)
        return
    if split == SPLITS[0] and name not in checker.tested:
        checker.trained.add(row["image"])
    check_rebuilt(checker, row)
    speakers = [speaker(turn) for turn in turns]
    _check_speakers(checker, file, name, speakers)
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
        checker.check_text(file, where, turn["value"])
    if split == SPLITS[0] and kind == "inter-role" and len(turns) % 2:
        report.add("odd_inter_role", file, name, f"{len(turns)} turns")


def _check_speakers(checker: Checker, file: str, name: str, speakers: list[str]) -> None:
    characters = checker.characters
    for who in dict.fromkeys(speakers):
        if who != HUMAN and who not in characters.scripts:
            checker.report.add("unknown_speaker", file, name, who)
        elif who != HUMAN and who not in characters.profiles:
            checker.report.add("missing_profile", file, name, who)
    twice = [number for number, (a, b) in enumerate(itertools.pairwise(speakers)) if a == b]
    if twice or len(set(speakers)) > 2:
        detail = f"turn {twice[0] + 1}, {speakers[twice[0]]}" if twice else ", ".join(dict.fromkeys(speakers))
        checker.report.add("broken_alternation", file, name, detail)


def _collect_answers(
    row: Row, file: str, answers: dict[str, tuple[str, str]], shared: dict[str, list[tuple[str, str]]]
) -> None:
    for turn in row["conversations"]:
        if speaker(turn) == HUMAN or not turn["value"].strip():
            continue
        first = answers.setdefault(turn["value"], (file, row["id"]))
        if first[1] != row["id"]:
            shared.setdefault(turn["value"], []).append((file, row["id"]))


def _edges(text: str) -> str:
    lead, trail = len(text) - len(text.lstrip()), len(text) - len(text.rstrip())
    return " and ".join(filter(None, [f"{lead} before" if lead else "", f"{trail} after" if trail else ""]))
