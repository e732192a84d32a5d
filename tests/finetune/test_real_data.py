"""Two steps on real data through the scripts: role-play samples from dialogues, judge samples from real reviews."""

import json
import os
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from data_utils.build.reviews import reward_model_samples
from data_utils.files import read_json, write_json
from data_utils.roots import DataRoots
from data_utils.samples import training_samples
from eval.judging.prompt import review_prompts
from tests.conftest import ROOT

SAMPLES = 8


def agent_rows(data: Path) -> Iterator[dict[str, Any]]:
    return (
        row
        for row in training_samples(DataRoots([data]), kinds=["human-role"])
        if (data / "images" / row["image"]).is_file()
    )


def judge_rows(data: Path) -> Iterator[dict[str, Any]]:
    rows = read_json(data / "published" / "in-test_reviews" / "gpt-4-turbo" / "comment_test.json")
    there = [row for row in rows if (data / "images" / row["image"]).is_file()]
    return reward_model_samples(there, review_prompts, agent="gpt-4-turbo")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "rows"), [("finetune_ds.sh", agent_rows), ("finetune_RM_ds.sh", judge_rows)], ids=["agent", "judge"]
)
def test_two_real_steps(shared: Path, tiny_a: Path, tmp_path: Path, script: str, rows: Any) -> None:
    data = shared / "mmrole_data"
    write_json(tmp_path / "train.json", list(islice(rows(data), SAMPLES)))
    places = {"DATA_PATH": tmp_path / "train.json", "OUTPUT_DIR": tmp_path / "out"}
    places |= {"DATA_ROOT": data, "MODEL_PATH": tiny_a, "GLOBAL_BATCH": 8, "PROCESSES": 1}
    environ = os.environ | {name: str(value) for name, value in places.items()}
    flags = ["--bf16", "False", "--max_steps", "2"]
    command = ["bash", str(ROOT / "finetune" / script), *flags]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 2
    assert all(11 < loss < 14 for loss in losses)  # a checkpoint that knows nothing: about the log of the vocabulary
    assert (tmp_path / "out" / "loss.png").is_file()
    assert (tmp_path / "out" / "model.safetensors").is_file()
