"""The demo world: deterministic, in the released formats, and every sample what the real builder makes of it."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_utils.demo.__main__ import main
from data_utils.demo.pictures import COLOURS, PLACES, THINGS, TIMES, Scene, draw_scene, fitting_places
from data_utils.demo.reviews import FAULTS, GOOD, VERDICTS
from data_utils.demo.world import ROWS_PER_AGENT, draw_world, write_world
from data_utils.errors import MMRoleError
from data_utils.layout import KINDS, RM_TRAIN_FILE, SPLITS, TRAIN_FILE
from data_utils.roots import DataRoots, dialogue_id
from data_utils.samples import iterate_samples
from data_utils.schema import TestSample, TrainSample, read_rows
from eval.judging.metrics import METRIC_NAMES
from eval.judging.prompt import review_prompts
from eval.judging.scores import parse_scores

HEADINGS = {
    False: ["Brief Introduction", "Personality", "Life Story", "Main Interpersonal Relationships", "Catchphrases"],
    True: ["简要介绍", "性格特点", "人物经历", "人际关系", "名言"],
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "world"
    write_world(draw_world(0), folder, review_prompts)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_samples(demo: Path, split: str) -> list[dict[str, Any]]:
    return [s for kind in KINDS for s in read(demo / "data" / "test" / split / f"{kind}_test.json")]


def dialogues(demo: Path) -> dict[str, dict[str, Any]]:
    found = [d for split in SPLITS for kind in KINDS for d in DataRoots([demo]).dialogues(split, kind)]
    assert len({d["id"] for d in found}) == len(found)
    return {d["id"]: d for d in found}


def test_the_same_seed_gives_the_same_bytes_in_another_process(demo: Path, tmp_path: Path):
    command = [sys.executable, "-m", "data_utils.demo", str(tmp_path / "again"), "--seed", "0"]
    command += ["--review_prompts", "eval.review_prompt:review_prompts"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert contents(tmp_path / "again") == contents(demo)
    assert "6 characters" in done.stdout


def test_another_seed_draws_another_world(demo: Path, tmp_path: Path):
    write_world(draw_world(1), tmp_path / "other")
    other, first = contents(tmp_path / "other"), contents(demo)
    assert other[TRAIN_FILE] != first[TRAIN_FILE]
    assert other["images/中国唐代/01.jpg"] != first["images/中国唐代/01.jpg"]


def test_the_cast_shows_every_branch_of_the_prompt(demo: Path):
    inside, outside = (read(demo / "profiles" / split / "roles.json") for split in SPLITS)
    assert [len(names) for names in inside.values()] == [2, 2]
    assert "中国唐代" in inside
    assert list(outside) == ["Hypothetical Characters"]
    prompts = [s["conversations"][0]["value"] for split in SPLITS for s in read_samples(demo, split)]
    for part in ("in Chinese using", "in English using", "auxiliary information", "history between", "another person"):
        assert any(part in prompt for prompt in prompts), part


def test_profiles_are_short_and_under_the_published_headings(demo: Path):
    for split in SPLITS:
        for name, text in read(demo / "profiles" / split / "profiles.json").items():
            chinese = bool(re.search("[一-龥]", name))
            size = len(re.findall("[一-龥]", text)) if chinese else len(text.split())
            assert 60 <= size <= 120
            assert re.findall("^### (.+)$", text, re.MULTILINE) == HEADINGS[chinese]


def test_test_and_training_samples_are_what_the_builder_makes_of_the_dialogues(demo: Path):
    characters = DataRoots([demo]).characters
    built = {s["id"]: s for s in iterate_samples(dialogues(demo).values(), characters)}
    for split in SPLITS:
        for sample in read_samples(demo, split):
            assert sample == built[sample["id"]]
    trained = {s["id"]: s for s in iterate_samples(dialogues(demo).values(), characters, training=True)}
    for sample in read(demo / TRAIN_FILE):
        assert sample == trained[sample["id"]]


def test_each_character_is_tested_once_in_each_kind_and_never_trained_on_the_same_dialogue(demo: Path):
    for split in SPLITS:
        names = sorted(name for names in read(demo / "profiles" / split / "roles.json").values() for name in names)
        for kind in KINDS:
            samples = read(demo / "data" / "test" / split / f"{kind}_test.json")
            # An inter-role sample may be of the dialogue's other speaker.
            assert len(samples) == len(names)
            if kind != "inter-role":
                assert sorted(s["role"] for s in samples) == names
    tested = {dialogue_id(s["id"]) for split in SPLITS for s in read_samples(demo, split)}
    trained = {dialogue_id(s["id"]) for s in read(demo / TRAIN_FILE)}
    assert not tested & trained
    inside = [d for kind in KINDS for d in DataRoots([demo]).dialogues(SPLITS[0], kind)]
    assert trained <= {d["id"] for d in inside} <= trained | tested


def test_the_files_pass_the_checks_that_real_data_gets(demo: Path):
    for file in sorted((demo / "data" / "test").rglob("*.json")):
        assert read_rows(file, TestSample)[1] == []
    for file in (TRAIN_FILE, RM_TRAIN_FILE):
        rows, problems = read_rows(demo / file, TrainSample)
        assert problems == []
        assert len(rows) > 100


def test_every_picture_is_there_and_every_one_of_a_script_is_annotated(demo: Path):
    files = {p.relative_to(demo / "images").as_posix() for p in (demo / "images").rglob("*.jpg")}
    assert {d["image"] for d in dialogues(demo).values()} <= files
    annotations = {a["image"]: a for a in read(demo / "images" / "annotations.json")}
    assert set(annotations) == {name for name in files if not name.startswith("COCO/")}
    for dialogue in dialogues(demo).values():
        annotation = annotations.get(dialogue["image"], {})
        assert {k: dialogue[k] for k in dialogue if k.endswith("_info")} == {
            k: v for k, v in annotation.items() if k.endswith("_info")
        }
    for name in files:
        with Image.open(demo / "images" / name) as picture:
            assert (picture.format, picture.size) == ("JPEG", (400, 300))


def test_reviews_follow_the_rules_and_can_be_read(demo: Path):
    samples = read(demo / RM_TRAIN_FILE)
    assert len(samples) == len(FAULTS) * ROWS_PER_AGENT * len(METRIC_NAMES)
    assert len({s["id"] for s in samples}) == len(samples)
    for sample in samples:
        agent, metric = sample["id"].split("_")[0], sample["id"].split("_")[-1]
        parsed = parse_scores(sample["conversations"][1]["value"])
        assert (parsed[0], parsed[1]) == (FAULTS[agent].get(metric, GOOD[metric]), GOOD[metric])
        assert sample["conversations"][0]["value"].startswith(
            f"Picture 1: <img>images/{sample['image']}</img>\n## **[Q"
        )


def test_the_rules_know_the_eight_metrics_and_every_metric_can_be_failed():
    assert tuple(VERDICTS) == tuple(GOOD) == METRIC_NAMES
    assert {metric for faults in FAULTS.values() for metric in faults} == set(METRIC_NAMES)


def test_writing_the_same_demo_again_changes_nothing_and_another_is_refused(tmp_path: Path):
    write_world(draw_world(3), tmp_path)
    before = contents(tmp_path)
    write_world(draw_world(3), tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(MMRoleError, match="another demo"):
        write_world(draw_world(4), tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_with_other_content_is_never_written_to(tmp_path: Path):
    (tmp_path / "data").mkdir()
    with pytest.raises(MMRoleError, match="not empty"):
        main([str(tmp_path)])
    assert contents(tmp_path) == {}


def test_an_unknown_prompt_function_is_reported_before_anything_is_written(tmp_path: Path):
    with pytest.raises(MMRoleError, match="no such function"):
        main([str(tmp_path / "world"), "--review_prompts", "eval.review_prompt:nothing"])
    assert not (tmp_path / "world").exists()


@pytest.mark.parametrize("thing", sorted(THINGS))
@pytest.mark.parametrize("colour", sorted(COLOURS))
def test_a_picture_shows_the_thing_in_its_colour(thing: str, colour: str):
    scene = Scene(thing, colour, fitting_places(thing)[0], "evening")
    picture = draw_scene(scene, random.Random(5))
    other = next(name for name in COLOURS if name != colour)
    without = draw_scene(Scene(thing, other, scene.place, scene.time), random.Random(5))
    assert share_of(picture, COLOURS[colour]) > share_of(without, COLOURS[colour]) + 0.01


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("time", TIMES)
def test_people_stand_in_every_landscape_in_their_coats(place: str, time: str):
    scene = Scene("balloon", "yellow", place, time, ("red", "purple"))
    picture = draw_scene(scene, random.Random(5))
    for coat in scene.coats:
        assert share_of(picture, COLOURS[coat]) > 0.005


def share_of(picture: Image.Image, colour: tuple[int, int, int]) -> float:
    """Return the share of pixels with nearly this colour."""
    apart = np.abs(np.asarray(picture, dtype=int) - np.array(colour)).max(axis=-1)
    return float((apart < 8).mean())


def test_a_file_is_no_folder_for_a_world(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MMRoleError, match="a file, not a folder"):
        main([str(tmp_path / "file")])
