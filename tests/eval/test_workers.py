"""Several workers make what one process would have made, whoever dies in between."""

import json
import os
import random
import shutil
import signal
from collections import deque
from pathlib import Path

import pytest
from PIL import Image

import inference
from data_utils.errors import MMRoleError
from eval import RM_review
from eval.running.workers import share_size
from tests.eval.test_RM_review import make_answers
from tests.fake_backend import (
    TEST_FILES,
    FakeBackend,
    Unloadable,
    dies,
    dies_at_one_row,
    dies_at_one_row_once,
    fake_review,
    flags,
    make_world,
    results,
    sample,
    waits_for_ever,
    write_rows,
)
from tests.processes import killed_at
from tests.qwen_vl.conftest import small_model


def made_alone(tmp_path, rows=3):
    other = make_world(tmp_path / "alone", rows=rows)
    assert inference.main(flags(other), FakeBackend()) == 0
    return results(other / "eval")


def test_two_workers_make_the_same_files(tmp_path, capfd):
    world = make_world(tmp_path / "world")
    assert inference.main(flags(world, "--processes", 2), FakeBackend()) == 0
    assert results(world / "eval") == made_alone(tmp_path)
    out = capfd.readouterr().out
    assert "worker 1 of 2 (auto): fake on auto" in out and "worker 2 of 2 (auto): fake on auto" in out
    assert out.count("model fingerprint") == 2


@pytest.mark.parametrize(
    ("rows", "prompts", "workers", "size"),
    [(294, 8, 8, 37), (294, 1, 8, 37), (2352, 8, 8, 147), (10_000, 1, 4, 1250), (1500, 1, 2, 512), (3, 8, 2, 2)],
)
def test_how_many_rows_a_worker_gets(rows, prompts, workers, size):
    assert share_size(deque([[None] * prompts] * rows), workers) == size


def test_reviews_with_retries(tmp_path, monkeypatch):
    alone, together = (make_answers(make_world(tmp_path / name)) for name in ("alone", "together"))
    status = RM_review.main(flags(alone), FakeBackend(fake_review))
    monkeypatch.setenv("PROCESSES", "2")
    assert RM_review.main(flags(together), FakeBackend(fake_review)) == status
    assert results(together / "eval") == results(alone / "eval")


def test_the_row_of_a_worker_that_died_goes_to_another(tmp_path, capfd):
    world = make_world(tmp_path / "world")
    assert inference.main(flags(world, "--processes", 2), FakeBackend(dies_at_one_row_once)) == 0
    assert capfd.readouterr().err.count("was killed by signal 9; an unexpected kill often means") == 1
    assert results(world / "eval") == made_alone(tmp_path)


def test_a_row_that_kills_two_workers_fails_alone(tmp_path, capfd):
    world = make_world(tmp_path / "world")
    assert inference.main(flags(world, "--processes", 3), FakeBackend(dies_at_one_row)) == 1
    err = capfd.readouterr().err
    assert "1 failed: two workers died while they worked on this row: in-distribution_comment_1" in err
    assert "missing" not in err
    again = FakeBackend()
    assert inference.main(flags(world), again) == 0
    assert len(again.prompts) == 1
    assert results(world / "eval") == made_alone(tmp_path)


def everything_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


def test_what_is_left_when_the_last_worker_dies_is_missing(tmp_path, capfd):
    """Nothing is destroyed before the first text, and the next run goes on."""
    world = make_world(tmp_path / "world")
    assert inference.main(flags(world), FakeBackend()) == 0
    before = everything_below(world / "eval")
    more = ("--processes", 2, "--seed", 4, "--overwrite")
    assert inference.main(flags(world, *more), FakeBackend(dies)) == 1
    captured = capfd.readouterr()
    assert "unfinished: 3 of 3 texts are missing" in captured.out
    assert "18 missing: run the same command again" in captured.err
    assert everything_below(world / "eval") == before
    assert inference.main(flags(world), FakeBackend()) == 0


def test_the_same_error_of_all_workers_is_raised_once(tmp_path):
    world = make_world(tmp_path / "world")
    with pytest.raises(MMRoleError, match="the checkpoint cannot be loaded") as caught:
        inference.main(flags(world, "--processes", 2), Unloadable())
    assert "problems" not in str(caught.value)
    assert not results(world / "eval")


def test_workers_end_with_their_parent(tmp_path):
    world = make_world(tmp_path / "world")
    pipe = world / "images/西游记/pids"
    os.mkfifo(pipe)
    parent = os.fork()
    if not parent:
        try:
            inference.main(flags(world, "--processes", 2), FakeBackend(waits_for_ever))
        finally:
            os._exit(70)
    with pipe.open() as pids:
        assert pids.readline() != pids.readline() != ""
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        assert pids.read() == ""  # which ends when both workers have


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("NNODES", "2", "run on one machine"), ("PROCESSES", "x", "whole number"), ("PROCESSES", "0", "whole number")],
)
def test_variables_that_cannot_be_followed(tmp_path, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(MMRoleError, match=message) as caught:
        inference.main(flags(make_world(tmp_path / "world")), Unloadable())
    assert caught.value.problems[0].where == name
    assert caught.value.problems[0].fix


# ---- the real engine

WORDS = ["lamp", "speaks", "softly", "of", "rivers", "stones", "evening", "falls", "on", "quiet", "roofs", "西游记"]


def make_real_world(root: Path, tokenizer) -> Path:
    """Twelve samples of all lengths on three pictures, and a tiny random checkpoint that samples."""
    make_world(root)
    chance = random.Random(0)
    for number, gradient in enumerate([Image.radial_gradient("L"), Image.linear_gradient("L")]):
        gradient.save(root / "images" / "西游记" / f"g{number}.png")
    for folder in ("in-distribution", "out-of-distribution"):
        for name in TEST_FILES:
            rows = []
            for number in range(2):
                row = sample(f"{folder}_{name}_{number}", image=f"西游记/{chance.choice(['01', 'g0', 'g1'])}.png")
                row["conversations"][0]["value"] = " ".join(chance.choices(WORDS, k=chance.choice([5, 40, 150])))
                rows.append(row)
            write_rows(root / "data/test" / folder / name, rows)
    model = small_model()
    model.generation_config.update(do_sample=True, top_p=0.8, top_k=0, max_new_tokens=12)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root


@pytest.mark.slow
def test_the_real_engine_whatever_the_workers_the_batch_or_a_resume(tmp_path, tokenizer):
    """Answers, then reviews with retries: one process; two; two that are killed, gone on with by one."""
    made = {}
    for name in ("one", "two", "killed"):
        world = make_real_world(tmp_path / name, tokenizer)
        common = ["--device", "cpu", "--dtype", "float32"]
        workers = [] if name == "one" else ["--processes", "2"]
        batch = ["--max_batch_tokens", "900"] if name == "killed" else []
        if name == "killed":
            two = flags(world, *common, "--processes", 2)
            assert killed_at(11, lambda two=two: inference.main(two)) == -signal.SIGKILL
            workers = []
        assert inference.main(flags(world, *common, *workers, *batch)) == 0
        answers = results(world / "eval")
        folder = world / "in"
        for number, data in enumerate(list(answers.values())[:2]):
            folder.mkdir(exist_ok=True)
            (folder / f"{number}.json").write_bytes(data)
        more = ("--input_dir", folder, "--output_dir", world / "out", "--limit", 1, "--retries", 1)
        assert RM_review.main(flags(world, *common, *workers, *batch, *more, "--max_new_tokens", 6)) == 1
        made[name] = (answers, results(world / "out"))
        shutil.rmtree(world / "images")
    assert len(set(made["one"][0].values())) == 6
    assert all(json.loads(data)[0]["rm_review"] for data in made["one"][1].values())
    assert made["one"] == made["two"] == made["killed"]
