"""Saves a chat as a dialogue in a data root, ready for `build`, `check`, training and testing."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import make_folder, write_bytes, write_json
from data_utils.layout import KIND_IN_ID, SPLITS, dialogues_folder, file_name, profiles_folder
from data_utils.paths import is_file
from data_utils.prompts import HUMAN, Role
from data_utils.roots import add_profile, read_annotations, read_profiles, write_annotations
from data_utils.schema import Dialogue, read_rows
from web.chats import PLAIN_PICTURE, Chat, Scene, Turn

_KEPT = "files already written are kept"
_SPLIT = SPLITS[0]
_WRITING = threading.Lock()  # two visits may save at once


def save_dialogue(root: Path, scene: Scene, turns: Sequence[Turn], picture: Image.Image = PLAIN_PICTURE) -> Path:
    """Add a chat, its picture and its characters to a data root, unless it is already there.

    Args:
        root: A data root, new or existing.
        scene: Who talked with whom, and what is known about the picture.
        turns: The turns, at least one by the character. The dialogue gets the latest picture.
        picture: What the character saw if the turns show none.

    Returns:
        The file of dialogues.

    Raises:
        MMRoleError: There is nothing to save, a character's profile differs there, or a file cannot be written.
    """
    said = [turn for turn in turns if turn.text]
    if not any(turn.by_assistant for turn in said):
        raise MMRoleError("the chat has no answer of the character yet", None, None, "let the character answer first")
    with _WRITING:
        return _save(root, scene, said, Chat("", tuple(turns)).picture or picture)


def _save(root: Path, scene: Scene, said: Sequence[Turn], picture: Image.Image) -> Path:
    for role in filter(None, (scene.role, scene.partner)):
        _add_character(root, role)
    content = io.BytesIO()
    picture.save(content, "PNG")
    image = f"{file_name(scene.role.script)}/chat-{hashlib.sha256(content.getvalue()).hexdigest()[:16]}.png"
    information = scene.information.fields()
    partner = HUMAN if scene.partner is None else scene.partner.name
    conversation = [{"role": scene.role.name if turn.by_assistant else partner, "value": turn.text} for turn in said]
    kind, name = "human-role" if scene.partner is None else "inter-role", file_name(scene.role.name)
    path = dialogues_folder(root, _SPLIT, kind) / f"{name}_chat.json"
    dialogues, problems = read_rows(path, Dialogue) if is_file(path) else ([], [])
    raise_problems(problems)
    dialogue = {"image": image, **information, "conversations": conversation}
    if any({**dialogue, "id": saved["id"]} == saved for saved in dialogues):
        return path
    taken = {saved["id"] for saved in dialogues}
    ids = (f"{name}_{KIND_IN_ID[kind]}_chat_{number}" for number in count(len(dialogues)))
    new_id = next(one for one in ids if one not in taken)
    _write(root / "images" / image, content.getvalue())
    annotations, problems = read_annotations(root)
    raise_problems(problems)
    if not any(row["image"] == image for row in annotations):
        write_annotations(root, [*annotations, {"image": image, **information}])
    _write(path, [*dialogues, {"id": new_id, **dialogue}])
    return path


def _add_character(root: Path, role: Role) -> None:
    characters, problems = read_profiles(root, _SPLIT, may_lack=True)
    raise_problems(problems)
    profile = characters.profiles.get(role.name)
    if profile not in (None, role.profile):
        fix = "save into another data root, or give both the same profile"
        raise MMRoleError("a character of this name has a different profile there", role.name, root / "profiles", fix)
    if profile is None:
        make_folder(profiles_folder(root, _SPLIT), _KEPT)
        add_profile(root, _SPLIT, role.name, role.script, role.profile)


def _write(path: Path, content: Any) -> None:
    make_folder(path.parent, _KEPT)
    if isinstance(content, bytes):
        write_bytes(path, content)
    else:
        write_json(path, content)
