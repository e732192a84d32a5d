"""The sources of building, what it refuses, and what a stopped run leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_utils.build.__main__ import main
from data_utils.errors import MMRoleError
from data_utils.layout import KINDS, RM_TRAIN_FILE, SPLITS
from data_utils.roots import DataRoots, dialogue_files
from tests.closed import close

TRAIN = "data/train/train_85k.json"
TESTS = [f"{split}/{kind}_test.json" for split in SPLITS for kind in KINDS]
OUTSIDE = "dialogues/out-of-distribution"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TESTS}


def test_a_folder_beside_the_single_file_adds_to_it(world: Path) -> None:
    single = world / f"{OUTSIDE}/comment.json"
    published = read(single)
    write(world / f"{OUTSIDE}/comment/Grown_COCO.json", [{**published[0], "id": "Grown_comment_COCO_0"}])
    write(world / f"{OUTSIDE}/comment/._Grown_COCO.json", "not ours")
    assert [path.name for path in dialogue_files(world, SPLITS[1], "comment")] == ["comment.json", "Grown_COCO.json"]
    found = [dialogue["id"] for dialogue in DataRoots([world]).dialogues(SPLITS[1], "comment")]
    assert found == [*(dialogue["id"] for dialogue in published), "Grown_comment_COCO_0"]


def test_dialogues_that_may_not_be_read_are_not_taken_for_absent(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close(monkeypatch, world / "dialogues/in-distribution/comment")
    with pytest.raises(MMRoleError, match="cannot read: Permission denied"):
        dialogue_files(world, SPLITS[0], "comment")
    with pytest.raises(MMRoleError, match="cannot read: Permission denied"):
        main([str(world)])
    assert not (world / TRAIN).exists()


def test_half_a_test_set_is_reported_and_can_be_made_whole(world: Path) -> None:
    out = world / "data/test"
    shutil.rmtree(out)
    main([str(world), "--test", "--out", str(out)])
    whole = contents(out)
    for name in TESTS[3:]:
        (out / name).unlink()
    with pytest.raises(MMRoleError, match="six files, and 3 of this one are missing") as caught:
        main([str(world), "--test", "--out", str(world / "other")])
    assert TESTS[3] in str(caught.value) and not (world / "other").exists()
    main([str(world), "--test", "--out", str(out)])
    assert contents(out) == whole


def test_half_a_published_test_set_is_not_replaced_by_a_drawn_one(world: Path) -> None:
    out = world / "data/test"
    (out / TESTS[3]).unlink()
    before = (out / TESTS[0]).read_bytes()
    with pytest.raises(MMRoleError, match="test samples would be lost"):
        main([str(world), "--test", "--out", str(out)])
    assert (out / TESTS[0]).read_bytes() == before and not (out / TESTS[3]).exists()


@pytest.mark.parametrize("flags", [[], ["--test", "--out", "built"]])
@pytest.mark.parametrize("name", ["world", "link", "nothere"])
def test_roots_that_are_the_same_or_not_there(world: Path, name: str, flags: list[str]) -> None:
    (world.parent / "link").symlink_to(world)
    flags = [str(world / flag) if flag == "built" else flag for flag in flags]
    with pytest.raises(MMRoleError) as caught:
        main([str(world), "--extra_root", str(world.parent / name), *flags])
    assert ("no such data root" if name == "nothere" else "given twice") in str(caught.value)
    assert str(world.parent / name) in str(caught.value) and "to do:" in str(caught.value)
    assert not (world / TRAIN).exists() and not (world / "built").exists()


@pytest.mark.parametrize("split", SPLITS)
def test_ids_that_come_again_in_another_root(world: Path, split: str) -> None:
    (first, *_) = dialogue_files(world, split, "comment")
    dialogue = read(first)[0]
    again = world.parent / f"mine/dialogues/{split}/comment.json"
    write(again, [{**dialogue, "place_info": "somewhere else"}])
    flags = [] if split == SPLITS[0] else ["--test", "--out", str(world / "built")]
    with pytest.raises(MMRoleError, match="have the same id") as result:
        main([str(world), "--extra_root", str(world.parent / "mine"), *flags])
    assert all(part in str(result.value) for part in (dialogue["id"], str(first), str(again), "to do:"))
    assert not (world / TRAIN).exists() and not (world / "built").exists()


@pytest.mark.parametrize("function", ["os:getcwd", "os:sep", "builtins:len", "builtins:dict"])
def test_a_function_that_makes_no_prompts(world: Path, tmp_path: Path, function: str) -> None:
    rows = read(world / "data/test" / TESTS[0])
    for row in rows:
        row["conversations"][1]["answer"] = "I am Ada."
        row["rm_review"] = {"Fluency": {"review": "Fine.", "score": [8.0, 9.0]}}
    write(tmp_path / "eval/in-test_reviews/ada/comment_test.json", rows)
    command = [str(world), "--reviews", str(tmp_path / "eval"), "--validation", "1", "--review_prompts", function]
    with pytest.raises(MMRoleError, match="it makes no prompts") as caught:
        main(command)
    assert caught.value.value == function and caught.value.where == "--review_prompts" and caught.value.fix
    assert not (world / RM_TRAIN_FILE).exists()
