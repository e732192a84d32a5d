"""The benchmark runs on every task, and its figures are those requested; speed is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_utils.demo.world import draw_world, write_world
from tests.eval.made_reviews import made_row, write_rows
from tests.qwen_vl.conftest import small_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"


def benchmark(folder: Path, *arguments: object) -> tuple[dict, str]:
    out = folder / "figures.json"
    command = [sys.executable, SCRIPT, *arguments, "--json", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "checkpoint"
    small_model(max_position_embeddings=60_000).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("task", "requests"), [("answer", 2), ("review", 16)])
def test_both_ways_of_writing(task: str, requests: int, checkpoint: Path, tmp_path: Path) -> None:
    rows = [{**made_row(i), "system": "You are Ada."} for i in range(3)]
    write_rows(tmp_path / f"published/in-test_{task}s/ada/comment_test.json", rows)
    (tmp_path / "images").mkdir()
    Image.radial_gradient("L").save(tmp_path / "images" / "a.jpg")
    given = ["--data_root", tmp_path, "--checkpoint", checkpoint, "--agent", "ada", "--rows", 2]
    figures, result = benchmark(tmp_path, task, *given, "--released_requests", 2, "--device", "cpu", "--sample")
    assert figures["ours"]["requests"] == requests
    assert figures["ours"]["written tokens"] == sum(len(text) + 1 for text in _texts(task, rows[:2]))
    assert figures["released"]["requests"] == 2
    if task == "answer":  # the same requests for both
        assert figures["released way, seconds for all requests"] == pytest.approx(figures["released"]["seconds"])
    if task == "review":
        assert figures["ours"]["prefill saved"] > 0.4
    assert "times the released way's requests per second" in result
    assert "floor:" in result


def _texts(task: str, rows: list[dict]) -> list[str]:
    """The published texts, with one token per byte."""
    if task == "answer":
        return [row["conversations"][1]["answer"] for row in rows]
    return [record["review"] for row in rows for record in row["rm_review"].values()]


@pytest.mark.slow
def test_both_ways_of_training(checkpoint: Path, tmp_path: Path) -> None:
    write_world(draw_world(0), tmp_path / "world")
    given = ["--data_root", tmp_path / "world", "--checkpoint", checkpoint, "--layers", 1, "--steps", 1]
    trainer = ["--global_batch_size", 4, "--use_cpu", True, "--bf16", False, "--dataloader_num_workers", 0]
    figures, result = benchmark(tmp_path, "train", *given, *trainer)
    ours, released = figures["ours"], figures["released"]
    assert ours["first_loss"] == pytest.approx(released["first_loss"], abs=1e-4)
    assert (ours["padding_share"], released["padding_share"] > 0) == (0, True)
    assert min(*ours.values()) >= 0
    assert "times the released way's samples per second" in result


def test_the_scheduler(tmp_path: Path) -> None:
    figures, result = benchmark(tmp_path, "schedule", "--requests", 16, 48)
    assert [row["requests"] for row in figures["schedule"]] == [16, 48]
    assert all(row["peak cache tokens"] <= 40_000 for row in figures["schedule"])
    assert "ms each" in result


def test_nothing_to_measure_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "answer", "--data_root", tmp_path, "--checkpoint", checkpoint]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no published texts" in done.stderr
