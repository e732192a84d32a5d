"""The complete pipeline on real input through the users' scripts: answer, review, result."""

import csv
import json
import os
import subprocess
from pathlib import Path

import pytest

from eval.judging.metrics import METRIC_NAMES
from tests.conftest import ROOT

FILES = ("comment_test", "human-role_test", "inter-role_test")
FOLDERS = {"in": "in-distribution", "out": "out-of-distribution"}


def run(script: str, *arguments: str, cwd: Path, **environment: object) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {name: str(value) for name, value in environment.items()}
    command = ["bash", str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_answer_review_result_on_the_real_test_set(shared: Path, tiny_a: Path, tmp_path: Path) -> None:
    """One row of each real test file, answered and reviewed by the golden checkpoint, from another directory."""
    data, results = shared / "mmrole_data", tmp_path / "eval"
    places = {"MODEL_PATH": tiny_a, "DATA_ROOT": data, "EVAL_DIR": results, "cwd": tmp_path}
    few = ("--limit", "1", "--missing_image", "skip", "--max_new_tokens", "8")
    answered = run("inference.sh", *few, **places)
    assert answered.returncode == 0, answered.stderr
    reviewed = run("eval/RM_review.sh", *few, "--retries", "0", **places)
    # An untrained judge writes no readable score: the status is 1, and no score is guessed.
    assert reviewed.returncode in (0, 1), reviewed.stderr
    result = run("eval/RM_result.sh", EVAL_DIR=results, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for split, folder in FOLDERS.items():
        for name in FILES:
            samples = json.loads((data / "data" / "test" / folder / f"{name}.json").read_text(encoding="utf-8"))
            there = [row for row in samples if (data / "images" / row["image"]).is_file()]
            [answer] = json.loads((results / f"{split}-test_answers/mmrole-agent/{name}.json").read_text("utf-8"))
            assert answer["id"] == there[0]["id"]
            assert answer["conversations"][1]["answer"]
            [review] = json.loads((results / f"{split}-test_reviews/mmrole-agent/{name}.json").read_text("utf-8"))
            assert list(review["rm_review"]) == list(METRIC_NAMES)
            assert all(r["review"] or r["failure"] for r in review["rm_review"].values())
            with (results / f"{split}-test_results/mmrole-agent/{name}.csv").open(newline="") as file:
                header, line = list(csv.reader(file))
            assert header == ["count", *METRIC_NAMES]
            assert line[0] == "1"
    for name in ("table.md", "table.csv", "radar.png", "report.json"):
        assert (results / "report" / name).is_file() or name == "radar.png", result.stdout
    assert "failed" in result.stdout
