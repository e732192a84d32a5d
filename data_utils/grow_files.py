"""Where what was grown goes in the published layout, and what is there already."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_utils.build import dialogue_files, speaker
from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import make_folder, read_journal, write_json, write_text
from data_utils.prompts import prompt_language
from data_utils.schema import Dialogue, Profiles, Roles, Row, read_rows, read_value

JOURNAL = "grown.journal"
IN_ID = {"comment": "comment", "human-role": "human-role-dialogue", "inter-role": "role-role-dialogue"}


def write_profile(root: Path, entries: Mapping[str, Any]) -> None:
    """Writes all grown profiles of a journal into the published layout, beside what stands there."""
    for record in (entry["grown"] for entry in entries.values() if "grown" in entry):
        folder, name, stem = root / "profiles" / record["split"], record["name"], file_name(record["name"])
        if record["facts"]:
            _write(folder / "meta_info_hypo" / f"{stem}.json", json.loads(record["facts"]))
        else:
            language = "zh" if prompt_language(record["script"]) == "Chinese" else "en"
            _write(folder / f"raw_info_{language}" / f"{stem}.txt", record["text"])
        _write(folder / "detailed_profiles" / f"{stem}.json", record["detailed"])
        profiles, roles = profiles_of(folder)
        _write(folder / "profiles.json", {**profiles, name: record["profile"]})
        if name not in roles.setdefault(record["script"], []):
            roles[record["script"]].append(name)
        _write(folder / "roles.json", roles)


def write_dialogues(root: Path, entries: Mapping[str, Any]) -> None:
    """Writes all grown dialogues of a journal into the published layout, beside what stands there."""
    files: dict[Path, list[dict[str, Any]]] = {}
    for record in (entry["grown"] for entry in entries.values() if "grown" in entry):
        files.setdefault(dialogue_file(root, record), []).append(record["dialogue"])
    for path, grown in files.items():
        rows = _dialogues(path)
        known = {row["id"] for row in rows}
        new = [dialogue for dialogue in grown if dialogue["id"] not in known]
        if new:
            _write(path, rows + sorted(new, key=lambda dialogue: int(dialogue["id"].rpartition("_")[2])))


def forget(root: Path, journal: Path) -> None:
    """Takes the dialogues that a journal says were grown out of their files."""
    content = read_journal(journal)
    for record in (entry["grown"] for entry in (content.entries if content else {}).values() if "grown" in entry):
        path = dialogue_file(root, record)
        if path.is_file():
            write_json(path, [row for row in _dialogues(path) if row["id"] != record["dialogue"]["id"]])


def profiles_of(folder: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The profiles and the roles of a split's folder; empty where there are none.

    Raises:
        ProblemsError: A file is wrong, with everything that is.
    """
    forms = {folder / "profiles.json": Profiles, folder / "roles.json": Roles}
    found = [read_value(path, form) if path.is_file() else ({}, []) for path, form in forms.items()]
    raise_problems(problem for _, problems in found for problem in problems)
    (profiles, _), (roles, _) = found
    return profiles, roles


def dialogues_there(root: Path, split: str, kinds: Sequence[str]) -> dict[tuple[str, str], dict[str, str]]:
    """The dialogues of a data root, by kind and character: the image of each id.

    Raises:
        ProblemsError: A file of dialogues is wrong, with everything that is.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    problems: list[MMRoleError] = []
    files = [(kind, path) for kind in kinds for path in dialogue_files(root, split, kind)]
    for kind, path in files:
        rows, wrong = read_rows(path, Dialogue)
        problems += wrong
        for row in rows:
            for name in {speaker(turn) for turn in row["conversations"]}:
                if row["id"].startswith(f"{file_name(name)}_{IN_ID[kind]}_"):
                    found.setdefault((kind, name), {})[row["id"]] = row["image"]
    raise_problems(problems)
    return found


def sort_of(image: str) -> str:
    """What sort of image a dialogue is about, as published ids and file names say it."""
    return "COCO" if image.startswith("COCO/") else "script"


def file_name(name: str) -> str:
    """A character's or a script's name, in the names of files and folders."""
    return name.replace(" ", "_")


def dialogue_file(root: Path, record: Mapping[str, Any]) -> Path:
    """The file of dialogues that a grown one goes into."""
    sort = sort_of(record["dialogue"]["image"])
    return root / "dialogues" / record["split"] / record["kind"] / f"{file_name(record['name'])}_{sort}.json"


def _dialogues(path: Path) -> list[Row]:
    rows, problems = read_rows(path, Dialogue) if path.is_file() else ([], [])
    raise_problems(problems)
    return rows


def _write(path: Path, content: Any) -> None:
    make_folder(path.parent, "what was grown is kept in the journal")
    if isinstance(content, str):
        write_text(path, content)
    else:
        write_json(path, content)
