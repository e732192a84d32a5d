"""A saved chat is a dialogue that `check` and `build` take as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from data_utils.build.__main__ import main as build
from data_utils.check.roots import check_roots
from data_utils.errors import MMRoleError
from data_utils.prompts import ImageInformation, Role
from web.chats import Scene, Turn
from web.dialogues import save_dialogue

ADA, TOM = Role("Ada Reed", "The Lighthouse", "Keeps a light."), Role("Tom Marsh", "The Lighthouse", "Rows.")
CHAT = [Turn(False, "What is it?", (Image.new("RGB", (8, 6), "red"),)), Turn(True, "Red."), Turn(False, "Sure?")]


def test_a_chat_trains(tmp_path: Path) -> None:
    scene = Scene(ADA, None, ImageInformation("", "", "A red square."))
    save_dialogue(tmp_path, scene, [*CHAT, Turn(True, "Yes.")])
    save_dialogue(tmp_path, scene, [*CHAT, Turn(True, "Yes.")])  # the same is not added again
    save_dialogue(tmp_path, Scene(ADA, TOM), [Turn(True, "Letters?"), Turn(False, "Two."), Turn(True, "Hm.")])
    assert "error" not in check_roots(tmp_path)[0][1].counts()
    assert build([str(tmp_path)]) in (None, 0)
    rows = json.loads((tmp_path / "data/train/train_85k.json").read_text(encoding="utf-8"))
    assert [row["conversations"][1]["value"] for row in rows] == ["Red.", "Yes.", "Letters?", "Two.", "Hm."]
    assert " - Scene information: A red square.\n" in rows[0]["conversations"][0]["value"]


def test_what_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(MMRoleError, match="no answer of the character"):
        save_dialogue(tmp_path, Scene(ADA), CHAT[:1])
    save_dialogue(tmp_path, Scene(ADA), CHAT)
    other = Role(ADA.name, ADA.script, "Somebody else.")
    with pytest.raises(MMRoleError, match="another profile"):
        save_dialogue(tmp_path, Scene(other), CHAT)
