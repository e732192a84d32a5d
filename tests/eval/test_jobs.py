"""Several processes make what one would have made, whoever dies in between."""

import errno
import io
import json
import os
import random
import signal
import threading
import time

import pytest
from tqdm import tqdm

import inference
from eval import RM_review
from eval.running import team
from tests.eval.test_RM_review import make_answers
from tests.fake_backend import FakeBackend, fake_answer, fake_review, flags, kill_at, make_model, make_world, results
from tests.processes import Processes, kill

ROWS = 5
TEXTS = 6 * ROWS


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A dead process is missed after seconds instead of a minute; not so few that a busy machine seems dead."""
    monkeypatch.setattr(team, "_BEAT", 0.1)
    monkeypatch.setattr(team, "_LOST_AFTER", 15.0)


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path / "world", rows=ROWS)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What one undisturbed process makes."""
    other = make_world(tmp_path_factory.mktemp("undisturbed") / "world", rows=ROWS)
    assert inference.main(flags(other), FakeBackend()) == 0
    return results(other / "eval")


def own_rank():
    return int(os.environ["RANK"])


def answer_with(world, size, *more, backend=None, script=inference, reply=fake_answer):
    """The script in so many processes with the fake engine."""
    backend = backend or FakeBackend(reply)
    return Processes(lambda: script.main(flags(world, *more), backend), size, world / "output")


def asked(world, process):
    """The requests that a process has journalled, as whole lines."""
    journals = (world / "eval").rglob(f"*.journal.part-{process}")
    return sum(path.read_bytes().count(b"\n") - 1 for path in journals)


# ---- undisturbed


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_makes_the_same_files(world, expected, size):
    run = answer_with(world, size)
    assert run.wait() == [0] * size, run.output()
    assert results(world / "eval") == expected
    assert [asked(world, process) for process in range(size)] == [TEXTS // size] * size
    assert run.output().count("model fingerprint") == 1
    assert run.output().count(f"5 of {ROWS} rows, 0 failed") == 6
    again = FakeBackend()
    assert inference.main(flags(world), again) == 0
    assert again.requests == []


def test_more_processes_than_rows(world):
    run = answer_with(world, 3, "--limit", 1, "--input_dir", world / "data/test/in-distribution", "--output_dir",
                      world / "one", "--input_file", "comment_test.json")  # fmt: skip
    assert run.wait() == [0, 0, 0], run.output()
    assert len(json.loads((world / "one/comment_test.json").read_text())) == 1


def test_reviews_with_retries(tmp_path):
    alone, together = (make_answers(make_world(tmp_path / name)) for name in ("alone", "together"))
    status = RM_review.main(flags(alone), FakeBackend(fake_review))
    run = answer_with(together, 3, script=RM_review, reply=fake_review)
    assert run.wait()[0] == status
    assert results(together / "eval") == results(alone / "eval")
    for journal in (together / "eval").rglob("*.journal.part-*"):
        rows = [json.loads(line)["key"].split(": ")[1] for line in journal.read_text().splitlines()[1:]]
        assert all(len({k for k in rows if k == row}) == 1 and rows.count(row) >= 8 for row in rows)


def test_overwrite_begins_anew(world, expected):
    assert answer_with(world, 3).wait() == [0, 0, 0]
    run = answer_with(world, 2, "--seed", 4, "--overwrite")
    assert run.wait() == [0, 0], run.output()
    assert results(world / "eval") != expected
    assert asked(world, 2) == 0
    assert answer_with(world, 2, "--overwrite").wait() == [0, 0]
    assert results(world / "eval") == expected


class Unloadable(FakeBackend):
    def run(self, requests):
        raise team.MMRoleError("the checkpoint cannot be loaded", "cuda", "model", "check it")


def everything_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


def test_overwrite_destroys_nothing_before_the_first_text(world, expected):
    assert answer_with(world, 3).wait() == [0, 0, 0]
    before = everything_below(world / "eval")
    assert answer_with(world, 2, "--seed", 4, "--overwrite", backend=Unloadable()).wait()[0] == 2
    assert everything_below(world / "eval") == before
    run = answer_with(world, 2)
    assert run.wait() == [0, 0], run.output()
    assert run.output().count("finished already, left alone") == 6
    assert results(world / "eval") == expected


def test_a_run_without_a_text_locks_nobody_to_its_settings(world, expected):
    assert answer_with(world, 3, "--seed", 4, backend=Unloadable()).wait()[0] == 2
    assert answer_with(world, 2).wait() == [0, 0]
    assert results(world / "eval") == expected


def test_an_overwriting_run_that_dies_is_gone_on_with(world, tmp_path):
    """What three processes made before is neither counted nor mixed in."""
    assert answer_with(world, 3).wait() == [0, 0, 0]
    run = answer_with(world, 2, "--seed", 4, "--overwrite", backend=Doomed(1, lambda: kill_at(7)))
    assert run.wait()[0] == 2, run.output()
    backend = FakeBackend()
    assert inference.main(flags(world, "--seed", 4), backend) == 0
    assert 0 < len(backend.requests) < TEXTS
    straight = make_world(tmp_path / "straight", rows=ROWS)
    assert inference.main(flags(straight, "--seed", 4), FakeBackend()) == 0
    assert results(world / "eval") == results(straight / "eval")
    assert asked(world, 2) == 0


def test_the_text_before_an_error_is_kept_across_processes(tmp_path):
    """The first run leaves unreadable reviews; further attempts by other processes all end in an error."""
    world = make_answers(make_world(tmp_path / "world"))
    told = flags(world, "--agent", "two", "--retries", 0)
    assert RM_review.main(told, FakeBackend(lambda request: "I like both.")) == 1

    def broken(request):
        raise ValueError("out of memory")

    for size in (3, 2):
        run = answer_with(world, size, "--agent", "two", "--retries", 2, script=RM_review, reply=broken)
        assert run.wait()[0] == 1, run.output()
        (row,) = json.loads((world / "eval/in-test_reviews/two/comment_test.json").read_text())
        assert {record["review"] for record in row["rm_review"].values()} == {"I like both."}
        assert {record["failure"] for record in row["rm_review"].values()} == {
            "out of memory (the text before: no [Scores] marker)"
        }


# ---- what is wrong is told once


def test_nodes_without_a_shared_folder_are_told(world):
    """What another node has made cannot be seen: that is no success, and it is not lost there."""

    def main():
        own = world / f"eval{os.environ['RANK']}"
        return inference.main(flags(world, "--eval_dir", own), FakeBackend())

    run = Processes(main, 2, world / "output")
    assert run.wait()[0] == 2
    assert "were made by other processes and cannot be found here" in run.output()
    assert "all nodes must see the same results folder" in run.output()
    assert list((world / "eval1").rglob("*.journal.part-*"))


def test_errors_before_loading_are_told_once(world):
    (world / "model" / "config.json").unlink()
    run = answer_with(world, 3)
    assert run.wait()[0] == 2
    assert run.output().count("the checkpoint is not complete") == 1
    assert not (world / "eval").exists()


@pytest.mark.parametrize(("flag", "status"), [("--bogus", 2), ("--help", 0)])
def test_the_usage_is_told_once(world, flag, status):
    run = answer_with(world, 2, flag)
    assert run.wait()[0] == status
    assert run.output().count("usage:") == 1


def test_failures_are_told_once_and_tried_again(world, expected):
    def fails(request):
        if "in-distribution_comment_1" in request.text:
            raise ValueError("not a readable image")
        return fake_answer(request)

    run = answer_with(world, 2, reply=fails)
    assert run.wait()[0] == 1
    assert run.output().count("1 failed: not a readable image: in-distribution_comment_1") == 1
    assert answer_with(world, 3).wait() == [0, 0, 0]
    assert results(world / "eval") == expected


def test_a_node_with_another_model_is_told(world, tmp_path):
    other = make_model(tmp_path / "other", b"other weights")

    def main():
        more = ["--model_path", str(other)] if own_rank() == 1 else []
        return inference.main([*flags(world), *more], FakeBackend())

    run = Processes(main, 2, tmp_path / "output")
    assert run.wait()[0] == 2
    assert "process 2 of 2 has other inputs, another model or other settings" in run.output()


def test_the_same_error_of_all_is_told_once(world):
    class Broken(FakeBackend):
        def run(self, requests):
            raise team.MMRoleError("the checkpoint cannot be loaded", "cuda", "model", "check it")

    run = answer_with(world, 3, backend=Broken())
    assert run.wait()[0] == 2
    assert run.output().count("the checkpoint cannot be loaded") == 1
    assert run.output().count("unfinished: 5 of 5 texts are missing") == 6


def test_a_silent_engine_is_told(world, expected):
    class Silent(FakeBackend):
        def run(self, requests):
            yield from super().run(list(requests)[: None if own_rank() == 0 else 4])

    run = answer_with(world, 2, backend=Silent())
    assert run.wait()[0] == 2
    assert "the engine ended without a result for 11 request(s)" in run.output()
    assert answer_with(world, 2).wait() == [0, 0]
    assert results(world / "eval") == expected


# ---- processes that die


class Doomed(FakeBackend):
    """Something happens to one process when its work begins."""

    def __init__(self, rank, happen):
        super().__init__()
        self.rank, self.happen = rank, happen

    def run(self, requests):
        if own_rank() == self.rank:
            self.happen()
        yield from super().run(requests)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("moment", [1, 5, 10])
def test_a_process_that_dies_while_it_writes_loses_only_its_own(world, expected, rank, moment):
    """In the middle of the first, fifth or last of its ten lines; the half-written one is dropped."""
    run = answer_with(world, 3, backend=Doomed(rank, lambda: kill_at(moment)))
    assert run.wait()[0] == 2, run.output()
    assert run.output().count(f"process {rank + 1} of 3 was killed by signal 9") == 1
    others = [process for process in range(3) if process != rank]
    assert [asked(world, process) for process in [rank, *others]] == [moment - 1, 10, 10]
    assert "texts are missing" in run.output()
    assert answer_with(world, 2).wait() == [0, 0]
    assert results(world / "eval") == expected


def test_a_full_disk_is_told_and_the_rest_goes_on(world, expected):
    def fill():
        write, left = os.write, [10]

        def full(descriptor, data):
            left[0] -= 1
            if left[0] > 0:
                return write(descriptor, data)
            write(descriptor, bytes(data)[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

        os.write = full

    run = answer_with(world, 2, backend=Doomed(1, fill))
    assert run.wait()[0] == 2
    assert run.output().count("cannot write: No space left on device") == 1
    assert "free some space, then run the same command again; everything finished so far is kept" in run.output()
    assert asked(world, 0) == TEXTS // 2
    assert inference.main(flags(world), FakeBackend()) == 0
    assert results(world / "eval") == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_keeper_dies_hangs_nobody(world, expected, rank, monkeypatch):
    """As on a node that is switched off: the child ends with its parent, and the others within seconds."""

    def slow(request):
        time.sleep(0.3)
        return fake_answer(request)

    with monkeypatch.context() as hurried:
        hurried.setattr(team, "_LOST_AFTER", 3.0)
        run = answer_with(world, 3, reply=slow)
    wait_for(run, lambda: asked(world, rank) > 1)
    kill(run.pids[rank])
    statuses = run.wait(60)
    assert statuses[rank] == -signal.SIGKILL
    told = "process 2 of 3 has not been heard of" if rank == 1 else "has lost the first one"
    assert told in run.output()
    assert answer_with(world, 3).wait() == [0, 0, 0]
    assert results(world / "eval") == expected


def test_a_child_that_dies_while_it_draws_a_bar_stops_nobody_elses():
    class Loading(tqdm):
        """As transformers has its own kind."""

    kinds = [Loading, tqdm]
    for kind in kinds:
        kind(total=1, file=io.StringIO()).close()

    def work():
        for kind in kinds:
            kind.get_lock().acquire()
        kill(os.getpid())

    ((what, *_),) = team.in_child(work, lambda: None, "process 2 of 3", os.getppid())
    assert what.startswith("process 2 of 3 was killed by signal 9")
    drawing = threading.Thread(target=lambda: [kind(total=1, file=io.StringIO()).close() for kind in kinds])
    drawing.daemon = True
    drawing.start()
    drawing.join(10)
    assert not drawing.is_alive()


def wait_for(run, condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            run.kill_all()
            raise AssertionError(f"it did not happen:\n{run.output()}")
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_at_30_random_moments(tmp_path, expected, monkeypatch):
    """kill -9 of one worker, of one that keeps it, or of all; then any number of processes goes on."""
    chance = random.Random(1)
    kills = number = 0

    def slow(request):
        time.sleep(0.01)
        return fake_answer(request)

    while kills < 30:
        world = make_world(tmp_path / f"world{number}", rows=ROWS)
        number += 1
        while list(results(world / "eval").values()) != list(expected.values()):
            monkeypatch.setattr(team, "_LOST_AFTER", 3.0 if kills < 30 else 15.0)
            run = answer_with(world, chance.choice([2, 3]), reply=slow)
            if kills < 30:
                time.sleep(chance.uniform(0.05, 0.6))
                victims = chance.choice([run.children, lambda run=run: run.pids, lambda: None])()
                if victims is None:
                    run.kill_all()
                elif victims:
                    kill(chance.choice(victims))
                kills += -signal.SIGKILL in run.wait() or "was killed by signal 9" in run.output()
            else:
                assert run.wait()[0] == 0, run.output()
        assert results(world / "eval") == expected
        assert not list((world / "eval").rglob("*.tmp"))
    assert number > 2
