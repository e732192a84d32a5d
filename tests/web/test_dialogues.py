"""A saved chat is a dialogue for `check` and `build`."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from data_utils.build.__main__ import main as build
from data_utils.check.roots import check_roots
from data_utils.errors import MMRoleError
from data_utils.prompts import ImageInformation, Role
from web.cast import read_cast
from web.chats import ChatError, Scene, Turn
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


def test_the_picture_that_was_seen_and_ids_of_their_own(tmp_path: Path) -> None:
    own = Image.new("RGB", (8, 6), "blue")
    said = [Turn(False, "Hello."), Turn(True, "Well?")]
    path = save_dialogue(tmp_path, Scene(ADA), said, own)
    save_dialogue(tmp_path, Scene(ADA), [*said, *said], own)
    (first, second) = json.loads(path.read_text(encoding="utf-8"))
    with Image.open(tmp_path / "images" / first["image"]) as image:
        assert image.getpixel((0, 0)) == (0, 0, 255)
    path.write_text(json.dumps([second]), encoding="utf-8")  # the first was taken out by hand
    save_dialogue(tmp_path, Scene(ADA), said, own)
    ids = [dialogue["id"] for dialogue in json.loads(path.read_text(encoding="utf-8"))]
    assert len(set(ids)) == 2


def test_visits_that_save_at_once_lose_nothing(tmp_path: Path) -> None:
    chats = [[Turn(False, f"{number}?"), Turn(True, "Hm.")] for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        (path, *_) = pool.map(lambda turns: save_dialogue(tmp_path, Scene(ADA), turns), chats)
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 12


def test_a_file_that_is_no_list_of_dialogues_is_left_alone(tmp_path: Path) -> None:
    path = save_dialogue(tmp_path, Scene(ADA), CHAT)
    path.write_text('[{"id": 7}]', encoding="utf-8")
    with pytest.raises(MMRoleError):
        save_dialogue(tmp_path, Scene(ADA), [*CHAT, *CHAT])
    assert path.read_text(encoding="utf-8") == '[{"id": 7}]'


def test_a_picture_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    save_dialogue(tmp_path, Scene(ADA, None, ImageInformation("Ada Reed", "", "")), CHAT)
    save_dialogue(tmp_path, Scene(ADA, None, ImageInformation("", "Here", "")), CHAT[1:])
    broken, whole = read_cast(tmp_path).pictures_of(ADA.name)
    assert (broken.information.role, whole.information.place) == ("Ada Reed", "Here")
    broken.path.write_bytes(b"no picture")
    found = read_cast(tmp_path).first_picture(ADA.name)
    assert found is not None
    assert found[1] == whole.information
    whole.path.write_bytes(b"no picture")
    assert read_cast(tmp_path).first_picture(ADA.name) is None


def test_what_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(MMRoleError, match="no answer of the character"):
        save_dialogue(tmp_path, Scene(ADA), CHAT[:1])
    save_dialogue(tmp_path, Scene(ADA), CHAT)
    other = Role(ADA.name, ADA.script, "Somebody else.")
    with pytest.raises(MMRoleError, match="different profile"):
        save_dialogue(tmp_path, Scene(other), CHAT)


def test_without_characters_the_data_root_is_asked_for() -> None:
    with pytest.raises(ChatError, match="give a data root"):
        read_cast(None).role("Ada Reed")
