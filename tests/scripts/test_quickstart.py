"""scripts/quickstart.sh: once for real, and with stubs in place of what it calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from eval.judging.scores import parse_scores

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {
    "answers": "eval/{}-test_answers/mmrole-agent/{}_test.json",
    "reviews": "eval/{}-test_reviews/mmrole-agent/{}_test.json",
    "results": "eval/{}-test_results/mmrole-agent/{}_test.csv",
}
KINDS = ("comment", "human-role", "inter-role")


def quickstart(root: Path, demo: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(root / "scripts" / "quickstart.sh")]
    environ = {**os.environ, "DEMO_DIR": str(demo)}
    return subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_whole_road(tmp_path: Path) -> None:
    demo = tmp_path / "a demo"
    first = quickstart(ROOT, demo)
    assert first.returncode == 0, first.stdout + first.stderr
    made = {key: [demo / path.format(s, k) for s in ("in", "out") for k in KINDS] for key, path in RESULTS.items()}
    assert all(path.stat().st_size for paths in made.values() for path in paths)
    reviews = [review for path in made["reviews"] for row in read(path) for review in row["rm_review"].values()]
    assert len(reviews) == 18 * 8
    assert sum(parse_scores(review["review"]) is not None for review in reviews) >= 0.95 * len(reviews)
    assert all(row["conversations"][1]["answer"].strip() for path in made["answers"] for row in read(path))
    for name in ("MMRole-Agent", "MMRole-Eval_RM"):
        losses = [e["loss"] for e in read(demo / "model_weights" / name / "trainer_state.json")["log_history"][:-1]]
        assert losses[-1] < 0.2 * losses[0]
        assert (demo / "model_weights" / name / "loss.png").stat().st_size
    for result in (str(demo), "loss.png", "inference.sh", "On real data"):
        assert result in first.stdout
    assert "## On real data" in (ROOT / "README.md").read_text(encoding="utf-8")
    before = {path: path.read_bytes() for paths in made.values() for path in paths}
    second = quickstart(ROOT, demo)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("kept: ") == 4
    read_at_once = {path: data for path, data in before.items() if b'"failure"' not in data}
    assert {path: path.read_bytes() for path in read_at_once} == read_at_once


PYTHON = """#!/bin/bash
folder=$3; [ "$1" = -m ] || folder=$2
mkdir "$folder" && echo made "$folder"
"""
TRAIN = """mkdir -p "$OUTPUT_DIR"; echo trained "$OUTPUT_DIR" on "$DATA_ROOT" from "$MODEL_PATH"
echo '{"state": "finished"}' > "$OUTPUT_DIR/training.json"
"""
INFERENCE = 'mkdir -p "$EVAL_DIR/in-test_answers/$AGENT"; touch "$EVAL_DIR/in-test_answers/$AGENT/comment_test.json"'
REVIEW = 'mkdir -p "$EVAL_DIR/in-test_reviews/$AGENT"; touch "$EVAL_DIR/in-test_reviews/$AGENT/comment_test.json"'


def stubbed(root: Path, *, inference: str = INFERENCE, review: str, train: str = TRAIN) -> Path:
    """A copy of the quickstart in which the scripts it calls are the given lines."""
    stubs = {
        "scripts/environment.sh": f"ROOT={root}\nPYTHON={root}/python",
        "finetune/finetune_ds.sh": train,
        "finetune/finetune_RM_ds.sh": train,
        "inference.sh": inference,
        "eval/RM_review.sh": review,
        "eval/RM_result.sh": "echo the results",
        "python": PYTHON,
    }
    for name, text in stubs.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "python").chmod(0o755)
    shutil.copy(ROOT / "scripts" / "quickstart.sh", root / "scripts" / "quickstart.sh")
    return root


@pytest.mark.parametrize(
    ("review", "status", "expected"),
    [
        (REVIEW, 0, False),
        (f"{REVIEW}; exit 1", 0, True),
        ("exit 1", 1, None),
        (f"{REVIEW}; exit 2", 2, None),
        (f"{REVIEW}; kill -9 $$", 137, None),
    ],
    ids=["all read", "some unreadable", "broken down", "user error", "killed"],
)
def test_only_unreadable_reviews_are_forgiven(tmp_path: Path, review: str, status: int, expected: bool | None) -> None:
    result = quickstart(stubbed(tmp_path / "root", review=review), tmp_path / "demo")
    assert result.returncode == status, result.stderr
    assert ("the results" in result.stdout) == (status == 0)
    if expected is not None:
        assert ("Some reviews could not be read" in result.stdout) == expected


def test_failed_answers_stop_it(tmp_path: Path) -> None:
    result = quickstart(stubbed(tmp_path / "root", inference="exit 1", review=REVIEW), tmp_path / "demo")
    assert result.returncode == 1
    assert "the results" not in result.stdout


def test_a_failed_training_stops_it(tmp_path: Path) -> None:
    result = quickstart(stubbed(tmp_path / "root", review=REVIEW, train="exit 3"), tmp_path / "demo")
    assert result.returncode == 3
    assert "5/7" not in result.stdout


def test_trained_models_are_kept_and_half_trained_ones_are_not(tmp_path: Path) -> None:
    root, models = stubbed(tmp_path / "root", review=REVIEW), tmp_path / "demo" / "model_weights"
    first = quickstart(root, tmp_path / "demo")
    for name in ("MMRole-Agent", "MMRole-Eval_RM"):
        assert f"trained {models / name} on {tmp_path}/demo/world from {models}/Qwen-VL-Chat\n" in first.stdout
    (models / "MMRole-Eval_RM" / "training.json").write_text('{"state": "running"}')
    second = quickstart(root, tmp_path / "demo")
    assert f"kept: {models}/MMRole-Agent\n" in second.stdout
    assert second.stdout.count("trained ") == 1
    assert f"trained {models}/MMRole-Eval_RM " in second.stdout


def test_what_was_being_made_when_it_was_killed_is_made_again(tmp_path: Path) -> None:
    root = stubbed(tmp_path / "root", review=REVIEW)
    (tmp_path / "demo" / "world.part").mkdir(parents=True)
    (tmp_path / "demo" / "world.part" / "half").touch()
    result = quickstart(root, tmp_path / "demo")
    assert result.returncode == 0, result.stderr
    assert f"made {tmp_path}/demo/world\n" in result.stdout
    assert list((tmp_path / "demo" / "world").iterdir()) == []
    assert not list((tmp_path / "demo").glob("*.part"))
