"""The same files from the real engine, whatever the number of processes, the order, or a resume in between."""

import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import inference
from eval import RM_review
from eval.running.flags import native_backend
from tests.fake_backend import TEST_FILES, flags, make_world, results, sample, write_rows
from tests.processes import Processes, kill
from tests.qwen_vl.conftest import small_model

WORDS = [
    "lamp",
    "speaks",
    "softly",
    "of",
    "rivers",
    "and",
    "stones",
    "while",
    "evening",
    "falls",
    "on",
    "quiet",
    "roofs",
    "西游记",
    "喝茶",
]


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


class Shuffled:
    """The real engine, asked in another order."""

    def __init__(self, options):
        self._backend = native_backend(options)

    def run(self, requests):
        requests = list(requests)
        random.Random(5).shuffle(requests)
        return self._backend.run(requests)


class Slow:
    """The real engine, with so much time after each result that a process is never done before it is killed."""

    def __init__(self, options):
        self._backend = native_backend(options)

    def run(self, requests):
        for result in self._backend.run(requests):
            yield result
            time.sleep(2)


def together(world, size, *more, script=inference, make_backend=native_backend, main=None):
    def run():
        torch.set_num_threads(1)  # threads of a forked process are not its own
        return script.main(flags(world, "--device", "cpu", *more), make_backend)

    return Processes(main or run, size, world / f"output{time.monotonic()}")


def review_flags(world):
    """One row of two files, each review asked for twice: a checkpoint that knows nothing writes no scores."""
    return ("--input_dir", world / "in", "--output_dir", world / "out", "--limit", 1, "--retries", 1,
            "--max_new_tokens", 6)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """A world in which one process has answered and reviewed everything."""
    world = make_real_world(tmp_path_factory.mktemp("one") / "world", tokenizer)
    assert inference.main(flags(world, "--device", "cpu")) == 0
    for data in (made := list(results(world / "eval").values())):
        (world / "in").mkdir(exist_ok=True)
        (world / "in" / f"{made.index(data) % 2}.json").write_bytes(data)
    assert RM_review.main(flags(world, "--device", "cpu", *review_flags(world))) == 1
    assert len(set(made)) == 6
    return world


@pytest.fixture
def world(tmp_path, tokenizer):
    return make_real_world(tmp_path / "world", tokenizer)


def answers(world):
    return results(world / "eval")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "make_backend"), [(2, native_backend), (3, native_backend), (2, Shuffled)])
def test_answers(made, world, size, make_backend):
    run = together(world, size, make_backend=make_backend)
    assert run.wait(120) == [0] * size, run.output()
    assert answers(world) == answers(made)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "make_backend"), [(2, native_backend), (3, Shuffled)])
def test_reviews_retries_included(made, world, size, make_backend):
    shutil.copytree(made / "in", world / "in")
    run = together(world, size, *review_flags(world), script=RM_review, make_backend=make_backend)
    assert run.wait(120)[0] == 1, run.output()
    assert len(results(world / "out")) == 2
    assert results(world / "out") == results(made / "out")


@pytest.mark.slow
def test_batch_flags_change_nothing(made, world):
    run = together(world, 2, "--batch_size", 2, "--max_batch_tokens", 900, "--limit", 1)
    assert run.wait(120) == [0, 0], run.output()
    run = together(world, 2, "--batch_size", 1)
    assert run.wait(120) == [0, 0], run.output()
    assert answers(world) == answers(made)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_and_resumed_by_another_number_of_processes(made, world, seed):
    chance = random.Random(seed)
    journalled = chance.choice([0, 2, 5])
    run = together(world, 3, "--batch_size", 2, make_backend=Slow)
    end = time.monotonic() + 60
    while sum(p.read_bytes().count(b"\n") - 1 for p in world.rglob("*.journal.part-*")) < journalled:
        assert time.monotonic() < end
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.3))
    children = run.children()
    if seed % 2 or not children:
        run.kill_all()
    else:
        kill(chance.choice(children))
    assert run.wait(120)[0] in (-9, 2), run.output()
    assert answers(world) != answers(made)
    run = together(world, chance.choice([1, 2]))
    assert set(run.wait(120)) == {0}, run.output()
    assert answers(world) == answers(made)
