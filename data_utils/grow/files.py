"""Where what was grown goes in the published layout, and what is there already."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import make_folder, write_json, write_text
from data_utils.prompts import prompt_language
from data_utils.roots import add_profile, dialogue_files, read_profiles
from data_utils.samples import speaker
from data_utils.schema import Dialogue, Row, read_rows

JOURNAL = "grown.journal"
IN_ID = {"comment": "comment", "human-role": "human-role-dialogue", "inter-role": "role-role-dialogue"}


def write_profile(root: Path, entries: Mapping[str, Any]) -> list[str]:
    """Writes grown profiles into the published layout, beside what stands there.

    Args:
        root: The data root.
        entries: Of a journal, those that are to be written.

    Returns:
        Whose profile was not written, since another is there that it was not grown to replace.
    """
    kept = []
    for entry in entries.values():
        record = entry["grown"]
        folder, name, stem = root / "profiles" / record["split"], record["name"], file_name(record["name"])
        profiles = profiles_of(root, record["split"])
        if "replaces" not in entry and profiles.get(name, record["profile"]) != record["profile"]:
            kept.append(name)
            continue
        if record["facts"]:
            _write(folder / "meta_info_hypo" / f"{stem}.json", json.loads(record["facts"]))
        else:
            language = "zh" if prompt_language(record["script"]) == "Chinese" else "en"
            _write(folder / f"raw_info_{language}" / f"{stem}.txt", record["text"])
        _write(folder / "detailed_profiles" / f"{stem}.json", record["detailed"])
        add_profile(root, record["split"], name, record["script"], record["profile"])
    return kept


def write_dialogues(root: Path, entries: Mapping[str, Any]) -> list[str]:
    """Writes grown dialogues into the published layout, beside what stands there or in the place of what they replace.

    Args:
        root: The data root.
        entries: Of a journal, those that are to be written.

    Returns:
        Nothing: no dialogue is left out.
    """
    files: dict[Path, list[Mapping[str, Any]]] = {}
    for entry in entries.values():
        files.setdefault(dialogue_file(root, entry["grown"]), []).append(entry)
    for path, grown in files.items():
        rows = _dialogues(path)
        places = {(row["id"], row["image"]): place for place, row in enumerate(rows)}
        known, new, replaced = {row["id"] for row in rows}, [], False
        for entry in grown:
            dialogue = entry["grown"]["dialogue"]
            place = places.get((entry.get("replaces", ""), dialogue["image"]))
            if place is not None:
                rows[place], replaced = dialogue, True
            elif dialogue["id"] not in known:
                new.append(dialogue)
        if new or replaced:
            _write(path, rows + sorted(new, key=lambda dialogue: int(dialogue["id"].rpartition("_")[2])))
    return []


def profiles_of(root: Path, split: str) -> dict[str, str]:
    """Return the profiles of a split.

    Raises:
        ProblemsError: A file is wrong, with everything that is.
    """
    found, problems = read_profiles(root, split, may_lack=True)
    raise_problems(problems)
    return found.profiles


def dialogues_there(root: Path, split: str, kinds: Sequence[str]) -> list[tuple[str, Row]]:
    """The dialogues of a data root, each with its kind.

    Raises:
        ProblemsError: A file of dialogues is wrong, with everything that is.
    """
    found: list[tuple[str, Row]] = []
    problems: list[MMRoleError] = []
    files = [(kind, path) for kind in kinds for path in dialogue_files(root, split, kind)]
    for kind, path in files:
        rows, wrong = read_rows(path, Dialogue)
        problems += wrong
        found += [(kind, row) for row in rows]
    raise_problems(problems)
    return found


def images_there(dialogues: Iterable[tuple[str, Row]]) -> dict[tuple[str, str], set[str]]:
    """The images that dialogues are about, by kind and the character that they are one's own of."""
    found: dict[tuple[str, str], set[str]] = {}
    for kind, row in dialogues:
        for name in {speaker(turn) for turn in row["conversations"]}:
            if row["id"].startswith(id_head(name, kind)):
                found.setdefault((kind, name), set()).add(row["image"])
    return found


def id_head(name: str, kind: str) -> str:
    """What the ids of a character's dialogues begin with."""
    return f"{file_name(name)}_{IN_ID[kind]}_"


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
