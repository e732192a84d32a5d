"""Result files and their journals: what is kept, what goes on, what is refused, what is left alone."""

import io
import json
from argparse import Namespace
from dataclasses import replace

import pytest

from data_utils.errors import MMRoleError
from data_utils.files import published_json
from data_utils.journal import read_journal
from data_utils.schema import TestSample
from eval.backends.backend import Prompt
from eval.running.console import Progress
from eval.running.job import complete_files
from eval.running.journal import ResultFile, Settings, State, inspect
from eval.running.task import Task, derive_seed
from tests.fake_backend import FakeBackend, write_rows

SETTINGS = Settings({"model": "abc"}, {"names": {"model": "/a"}})
TASK = Task("texts", "text", TestSample, prompts=None, fill=None, notes=None, advice="")
FLAGS = {"no_random": False, "temperature": None, "top_p": None, "max_new_tokens": None, "seed": 0}
FLAGS |= {"processes": None, "device": "cpu", "device_map": None, "model_path": "x"}


def rows_of(tmp_path, names, input_ids, *, text="ask"):
    prompts = [Prompt(name, name, tmp_path / "1.png", "1.png", "system", f"{text} {name}") for name in names]
    fill = lambda row, completions: {**row, "t": completions[row["id"]].text}  # noqa: E731
    return ResultFile(tmp_path / "out" / "x.json", [{"id": name} for name in names], prompts, fill, input_ids)


def make_file(tmp_path, count=3, *, text="ask"):
    keys = [f"row{number}" for number in range(count)]
    return rows_of(tmp_path, keys, [f"row{number}" for number in range(10)], text=text)


def run(file, backend=None, settings=SETTINGS, *, overwrite=False, task=TASK, **changes):
    options = Namespace(**FLAGS | changes, overwrite=overwrite)
    reports, problems = inspect([file], task, settings, overwrite=overwrite)
    if problems:
        raise problems[0]
    backend = (backend or FakeBackend())(options)
    (report,) = complete_files(reports, task, settings, options, backend, backend)
    return report, backend


def test_a_file_is_made_and_then_left_alone(tmp_path):
    file = make_file(tmp_path)
    report, backend = run(file)
    assert report.state is State.OPEN
    assert len(backend.prompts) == 3
    made = file.target.read_bytes()
    assert made == published_json(json.loads(made))
    report, backend = run(file)
    assert report.state is State.FINISHED
    assert backend.prompts == []
    assert file.target.read_bytes() == made


def test_a_lost_result_file_comes_back_from_the_journal(tmp_path):
    file = make_file(tmp_path)
    run(file)
    made = file.target.read_bytes()
    file.target.unlink()
    _, backend = run(file)
    assert backend.prompts == []
    assert file.target.read_bytes() == made


def test_order_and_company_do_not_change_a_seed(tmp_path):
    class Backwards(FakeBackend):
        def run(self, prompts):
            return super().run(list(prompts)[::-1])

    run(make_file(tmp_path / "a"))
    run(make_file(tmp_path / "b"), Backwards())
    assert (tmp_path / "a/out/x.json").read_bytes() == (tmp_path / "b/out/x.json").read_bytes()
    assert derive_seed(0, "a") == derive_seed(0, "a") != derive_seed(1, "a")
    assert 0 <= derive_seed(0, "a") < 2**63
    assert len({derive_seed(0, f"row{number}") for number in range(1000)}) == 1000


def test_a_larger_limit_goes_on_and_a_smaller_one_takes_nothing_away(tmp_path):
    run(make_file(tmp_path, 2))
    _, backend = run(make_file(tmp_path, 5))
    assert len(backend.prompts) == 3
    made = (tmp_path / "out/x.json").read_bytes()
    report, backend = run(make_file(tmp_path, 2))
    assert report.state is State.LARGER
    assert backend.prompts == []
    assert (tmp_path / "out/x.json").read_bytes() == made
    run(make_file(tmp_path / "straight", 5))
    assert (tmp_path / "straight/out/x.json").read_bytes() == made


def test_a_file_without_a_journal_is_left_alone_unless_overwritten(tmp_path):
    file = make_file(tmp_path)
    write_rows(file.target, ["published"])
    report, backend = run(file)
    assert report.state is State.FOREIGN
    assert backend.prompts == []
    assert not file.journal.exists()
    run(file, overwrite=True)
    assert json.loads(file.target.read_bytes())[0]["id"] == "row0"


def test_a_file_that_somebody_changed_is_left_alone(tmp_path):
    file = make_file(tmp_path)
    run(file)
    write_rows(file.target, ["mended by hand"])
    report, _ = run(file)
    assert report.state is State.CHANGED
    assert json.loads(file.target.read_bytes()) == ["mended by hand"]


def test_an_interrupted_overwrite_goes_on_without_the_flag(tmp_path):
    class Dying(FakeBackend):
        def run(self, prompts):
            yield next(super().run(prompts))
            raise KeyboardInterrupt

    file = make_file(tmp_path)
    write_rows(file.target, ["old"])
    with pytest.raises(KeyboardInterrupt):
        run(file, Dying(), overwrite=True)
    assert json.loads(file.target.read_bytes()) == ["old"]
    report, backend = run(file)
    assert report.state is State.OPEN
    assert len(backend.prompts) == 2
    assert len(json.loads(file.target.read_bytes())) == 3


def test_other_settings_and_other_prompts_are_refused(tmp_path):
    run(make_file(tmp_path))
    made = (tmp_path / "out/x.json").read_bytes()
    with pytest.raises(MMRoleError) as caught:
        run(make_file(tmp_path), settings=Settings({"model": "xyz"}, {"names": {"model": "/b"}}))
    assert 'model: "abc" (/a) there, "xyz" (/b) now' in str(caught.value)
    with pytest.raises(MMRoleError, match="the input has changed") as caught:
        run(make_file(tmp_path, text="ask otherwise"))
    assert "row0: prompt " in str(caught.value)
    assert (tmp_path / "out/x.json").read_bytes() == made


def test_a_failure_is_data_and_is_tried_again(tmp_path):
    def fails_once(prompt):
        if prompt.text == "ask row1" and not mended:
            raise ValueError("no such image")
        return "fine"

    mended = False
    file = make_file(tmp_path)
    report, _ = run(file, FakeBackend(fails_once))
    assert report.failures(TASK) == [("row1", "no such image")]
    assert [row["t"] for row in json.loads(file.target.read_bytes())] == ["fine", "", "fine"]
    mended = True
    report, backend = run(file, FakeBackend(fails_once))
    assert [prompt.text for prompt in backend.prompts] == ["ask row1"]
    assert report.failures(TASK) == []
    assert [row["t"] for row in json.loads(file.target.read_bytes())] == ["fine"] * 3


def never(text):
    return "unreadable"


def test_unreadable_texts_are_requested_again_sampled_and_with_fresh_seeds(tmp_path):
    task = replace(TASK, attempts=3, complaint=never)
    report, backend = run(make_file(tmp_path, 1), task=task, no_random=True)
    assert [prompt.decoding.do_sample for prompt in backend.prompts] == [False, True, True]
    assert len({prompt.seed for prompt in backend.prompts}) == 3
    assert report.completions["row0"].attempt == 2
    assert report.failures(task) == [("row0", "unreadable")]


def test_more_attempts_later_give_what_they_would_have_given_at_once(tmp_path):
    few, many = (replace(TASK, attempts=attempts, complaint=never) for attempts in (2, 4))
    run(make_file(tmp_path / "a"), task=few)
    _, backend = run(make_file(tmp_path / "a"), task=few)
    assert backend.prompts == []
    run(make_file(tmp_path / "a"), task=many)
    run(make_file(tmp_path / "b"), task=many)
    assert (tmp_path / "a/out/x.json").read_bytes() == (tmp_path / "b/out/x.json").read_bytes()


def test_every_text_is_journalled_before_the_next_one_is_requested(tmp_path):
    file = make_file(tmp_path)
    seen = []

    def looks(prompt):
        content = read_journal(file.journal)
        seen.append(len(content.entries) if content else 0)
        return "x"

    run(file, FakeBackend(looks))
    assert seen == [0, 1, 2]


def test_half_surrogates_from_a_model_do_not_stop_a_run(tmp_path):
    file = make_file(tmp_path, 1)
    run(file, FakeBackend(lambda prompt: "a \udc80 b"))
    assert json.loads(file.target.read_bytes())[0]["t"] == "a ? b"


def test_a_journal_of_the_earlier_version_is_resumed(tmp_path):
    """It wrote the dtype as it was given."""
    settings = Settings({"model": "abc", "dtype": "float32"}, {"options": {"dtype": "auto"}})
    file, alone = make_file(tmp_path / "a"), make_file(tmp_path / "b")
    run(alone, settings=settings)
    lines = alone.journal.read_bytes().replace(b'"dtype": "float32"', b'"dtype": "auto"').splitlines(True)
    file.journal.parent.mkdir(parents=True)
    file.journal.write_bytes(b"".join(lines[:2]))
    _, backend = run(file, settings=settings)
    assert [prompt.text for prompt in backend.prompts] == ["ask row1", "ask row2"]
    assert file.target.read_bytes() == alone.target.read_bytes()
    assert run(file, settings=settings)[0].state is State.FINISHED
    with pytest.raises(MMRoleError, match="different settings"):
        run(file, settings=Settings({"model": "abc", "dtype": "float32"}, {"options": {"dtype": "float32"}}))


def test_journals_that_the_earlier_version_wrote_in_parts_are_refused(tmp_path):
    file = make_file(tmp_path)
    run(file)
    part = file.target.with_name("x.journal.part-1")
    part.write_bytes(file.journal.read_bytes())
    with pytest.raises(MMRoleError, match="in parts") as caught:
        run(file)
    assert caught.value.value == [str(part)] and "--overwrite" in caught.value.fix
    run(file, overwrite=True)
    assert sorted(folder_of(file)) == ["x.journal", "x.json"]


class Unloadable(FakeBackend):
    """A model that cannot be loaded: nothing comes of any prompt."""

    def run(self, prompts):
        raise MMRoleError("the checkpoint cannot be loaded")


OTHER = Settings({"model": "xyz"}, {"names": {"model": "/b"}})


def test_a_run_without_a_text_locks_nobody_to_its_settings(tmp_path):
    file = make_file(tmp_path)
    with pytest.raises(MMRoleError, match="cannot be loaded"):
        run(file, Unloadable())
    report, backend = run(file, settings=OTHER)
    assert (report.state, len(backend.prompts)) == (State.OPEN, 3)
    assert run(file, settings=OTHER)[0].state is State.FINISHED


def folder_of(file):
    return {path.name: path.read_bytes() for path in file.target.parent.iterdir()}


def test_overwrite_destroys_nothing_before_the_first_text(tmp_path):
    file = make_file(tmp_path)
    run(file)
    before = folder_of(file)
    with pytest.raises(MMRoleError, match="cannot be loaded"):
        run(file, Unloadable(), settings=OTHER, overwrite=True)
    assert folder_of(file) == before
    assert run(file)[0].state is State.FINISHED
    _, backend = run(file, settings=OTHER, overwrite=True)
    assert len(backend.prompts) == 3
    assert sorted(folder_of(file)) == ["x.journal", "x.json"]
    assert run(file, settings=OTHER)[0].state is State.FINISHED
    with pytest.raises(MMRoleError, match="different settings"):
        run(file)


@pytest.mark.parametrize("content", [b"\0\0\n{}\n", b'{"journal": 1, "settings": {}, "info": 3}\n{"key": 3}\n'])
def test_overwrite_replaces_damaged_journals(tmp_path, content):
    file = make_file(tmp_path)
    run(file)
    file.journal.write_bytes(content)
    file.target.with_name("x.journal.part-1").write_bytes(content)
    assert len(run(file, overwrite=True)[1].prompts) == 3
    assert run(file)[0].state is State.FINISHED


@pytest.mark.parametrize("names", [["b0", "b1"], ["b0"], ["b0", "b1", "b2"], ["a0", "b1"]])
def test_another_input_does_not_replace_a_file(tmp_path, names):
    run(rows_of(tmp_path, ["a0", "a1"], ["a0", "a1", "a2"]))
    made = (tmp_path / "out/x.json").read_bytes()
    other = rows_of(tmp_path, names, names)
    with pytest.raises(MMRoleError, match="made from another input") as caught:
        run(other)
    assert "a1" in str(caught.value)
    assert "--overwrite" in caught.value.fix
    assert (tmp_path / "out/x.json").read_bytes() == made
    run(other, overwrite=True)
    assert [row["id"] for row in json.loads((tmp_path / "out/x.json").read_bytes())] == names


def test_rows_of_the_same_input_may_become_more_or_fewer(tmp_path):
    everything = ["a0", "a1", "a2"]
    run(rows_of(tmp_path, everything[1:], everything))
    run(rows_of(tmp_path, everything, everything))
    assert len(json.loads((tmp_path / "out/x.json").read_bytes())) == 3
    assert run(rows_of(tmp_path, everything[:1], everything))[0].state is State.LARGER


def test_other_rows_of_the_same_input_push_nothing_out(tmp_path):
    """As with a limit and images that came later."""
    everything = ["a0", "a1", "a2"]
    run(rows_of(tmp_path, everything[1:], everything))
    made = (tmp_path / "out/x.json").read_bytes()
    report, backend = run(rows_of(tmp_path, everything[:2], everything))
    assert report.state is State.LARGER
    assert backend.prompts == [] and (tmp_path / "out/x.json").read_bytes() == made


def test_an_error_at_a_further_attempt_leaves_the_text_before(tmp_path):
    def breaks_at_the_second(prompt):
        if prompt.decoding.do_sample:
            raise ValueError("out of memory")
        return "I like both."

    task = replace(TASK, attempts=3, complaint=never)
    file = make_file(tmp_path, 1)
    report, _ = run(file, FakeBackend(breaks_at_the_second), task=task, no_random=True)
    for known in (report, *inspect([file], task, SETTINGS)[0]):
        assert known.completions["row0"].text == "I like both."
        assert known.failures(task) == [("row0", "out of memory (the text before: unreadable)")]
    report, backend = run(file, task=task, no_random=True)
    assert [prompt.decoding.do_sample for prompt in backend.prompts] == [True, True]
    assert report.completions["row0"].error is None


def test_a_silent_backend_is_an_error(tmp_path):
    class Silent(FakeBackend):
        def run(self, prompts):
            yield next(super().run(prompts))

    with pytest.raises(MMRoleError, match="without a text") as caught:
        run(make_file(tmp_path), Silent())
    assert "row2" in str(caught.value)


def test_no_rows_make_an_empty_list(tmp_path):
    run(make_file(tmp_path, 0))
    assert (tmp_path / "out/x.json").read_bytes() == b"[]"


def test_progress_prints_plain_lines_off_a_terminal():
    stream = io.StringIO()
    with Progress(2, "text", every=0, stream=stream) as progress:
        progress.advance()
        progress.advance(again=True)
        progress.advance(failed=True)
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["1/2 texts", "2/3 texts", "3/3 texts"]
    assert "/s, 00:00 left, 1 failed" in lines[-1]
