"""The data for other trainers: every text and picture is exported unchanged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_utils.build.__main__ import main as build
from data_utils.errors import MMRoleError
from data_utils.export.__main__ import main
from data_utils.files import read_json, write_json
from data_utils.layout import RM_TRAIN_FILE, TRAIN_FILE, paths_of_tests
from data_utils.prompts import TRAINING_SYSTEM, picture_line
from tests.conftest import ROOT

Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sample_of(row: Row, system: str, images: Path) -> tuple[str, ...]:
    """Return the content of an exported row in either form: id, system message, picture, prompt, answer."""
    parts = [message["content"] for message in row["messages"]]
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    if isinstance(parts[0], str):
        assert parts[1].startswith("<image>")
        texts = [parts[0], parts[1].removeprefix("<image>"), parts[2]]
        (path,) = row["images"]
    else:
        assert [[part["type"] for part in content] for content in parts] == [["text"], ["image", "text"], ["text"]]
        texts = [content[-1]["text"] for content in parts]
        path = parts[1][0]["path"]
        assert row["images"] == [path]
    assert Path(path).is_absolute() and Path(path).is_file()
    assert texts[0] == system
    return (row["id"], Path(path).relative_to(images).as_posix(), *texts[1:])


def samples_of(rows: list[Row]) -> list[tuple[str, ...]]:
    return [
        (
            row["id"],
            row["image"],
            row["conversations"][0]["value"].removeprefix(picture_line(row["image"])),
            row["conversations"][1]["value"],
        )
        for row in rows
    ]


@pytest.mark.parametrize("form", ["llamafactory", "ms-swift", "messages"])
def test_texts_and_pictures_come_back(world: Path, tmp_path: Path, form: str) -> None:
    build([str(world)])
    training = read_json(world / TRAIN_FILE)
    reviews = [{**training[0], "id": "judge", "system": "You judge."}]
    write_json(world / RM_TRAIN_FILE, reviews)
    tests = [row for path in paths_of_tests(world) for row in read_json(path)]
    main([str(world), "--format", form, "--output", str(tmp_path / "out")])
    for name, samples in (("train", training), ("rm_train", reviews), ("test", tests)):
        rows = rows_of(tmp_path / "out" / f"{name}.jsonl")
        system = tests[0]["system"] if name == "test" else TRAINING_SYSTEM
        assert [sample_of(row, system, world / "images") for row in rows] == samples_of(samples)
    main([str(world), "--format", form, "--output", str(tmp_path / "own"), "--system", "role-play"])
    for name, samples in (("train", training), ("rm_train", reviews)):
        rows = rows_of(tmp_path / "own" / f"{name}.jsonl")
        assert [sample_of(row, samples[0]["system"], world / "images") for row in rows] == samples_of(samples)
    described = tmp_path / "out/dataset_info.json"
    assert described.is_file() == (form == "llamafactory")
    if form == "llamafactory":
        files = {entry["file_name"] for entry in read_json(described).values()}
        assert files == {path.name for path in (tmp_path / "out").glob("*.jsonl")}


def test_pictures_can_lie_elsewhere_on_the_machine_that_trains(world: Path, tmp_path: Path, capsys) -> None:
    command = [str(world), "--format", "ms-swift", "--output", str(tmp_path / "out"), "--image_dir", "/mnt/images"]
    main(command)
    (row, *_) = rows_of(tmp_path / "out/train.jsonl")
    assert row["images"][0].startswith("/mnt/images/")
    assert "pictures are not below /mnt/images" in capsys.readouterr().out


def test_a_placeholder_in_a_text_is_refused(world: Path, tmp_path: Path) -> None:
    (path, *_) = sorted((world / "dialogues/in-distribution/inter-role").glob("*.json"))
    dialogues = read_json(path)
    dialogues[0]["conversations"][0]["value"] += " <image>"
    write_json(path, dialogues)
    command = [str(world), "--output", str(tmp_path / "out"), "--format"]
    with pytest.raises(MMRoleError, match="a placeholder") as caught:
        main([*command, "llamafactory"])
    assert dialogues[0]["id"] in str(caught.value) and "messages" in caught.value.fix
    assert not (tmp_path / "out/train.jsonl").exists()
    main([*command, "messages"])


def test_a_root_with_tests_alone(world: Path, tmp_path: Path) -> None:
    (world / "dialogues").rename(tmp_path / "dialogues")
    main([str(world), "--format", "messages", "--output", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test.jsonl"]
    (world / "data/test").rename(tmp_path / "test")
    with pytest.raises(MMRoleError, match="nothing to export"):
        main([str(world), "--format", "messages", "--output", str(tmp_path / "none")])


# In a separate process: pytest's memory would be counted too.
EXPORT = """
import resource, sys
from data_utils.export.__main__ import main
main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_snapshot_is_exported_in_little_memory(shared: Path, tmp_path: Path) -> None:
    command = [str(shared / "mmrole_data"), "--format", "llamafactory", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "train: 72,551 samples" in done.stdout and "test: 294 samples" in done.stdout
    kilobytes = int(done.stdout.splitlines()[-1])
    assert kilobytes < 1.5 * 2**20
