import io
import json

import pytest

from data_utils.errors import MMRoleError
from data_utils.files import published_json
from data_utils.journal import read_journal
from eval.running.console import Progress
from eval.running.journal import journal_path, part_journal, part_journals
from eval.running.result_files import ResultFile, Settings, State, Unit, inspect
from eval.running.runs import derive_seed, run_files
from tests.fake_backend import FakeBackend, write_rows

SETTINGS = Settings({"model": "abc"}, {"names": {"model": "/a"}})


def make_file(tmp_path, count=3, *, text="ask"):
    keys = [f"row{number}" for number in range(count)]
    units = [Unit(key, tmp_path / "1.png", "1.png", "system", f"{text} {key}") for key in keys]
    return ResultFile(
        tmp_path / "out" / "x.json",
        units,
        count,
        lambda outcomes: [{"id": key, "t": outcomes[key].text} for key in keys],
    )


def run(file, backend=None, settings=SETTINGS, *, overwrite=False):
    reports, problems = inspect([file], settings, overwrite=overwrite)
    if problems:
        raise problems[0]
    backend = backend or FakeBackend()
    (report,) = run_files(reports, settings, backend, unit_name="text", overwrite=overwrite)
    return report, backend


def test_a_file_is_made_and_then_left_alone(tmp_path):
    file = make_file(tmp_path)
    report, backend = run(file)
    assert report.state is State.OPEN
    assert len(backend.requests) == 3
    made = file.target.read_bytes()
    assert made == published_json(json.loads(made))
    report, backend = run(file)
    assert report.state is State.FINISHED
    assert backend.requests == []
    assert file.target.read_bytes() == made


def test_a_lost_result_file_comes_back_from_the_journal(tmp_path):
    file = make_file(tmp_path)
    run(file)
    made = file.target.read_bytes()
    file.target.unlink()
    _, backend = run(file)
    assert backend.requests == []
    assert file.target.read_bytes() == made


def test_order_and_company_do_not_change_a_seed(tmp_path):
    class Backwards(FakeBackend):
        def run(self, requests):
            return super().run(list(requests)[::-1])

    run(make_file(tmp_path / "a"))
    run(make_file(tmp_path / "b"), Backwards())
    assert (tmp_path / "a/out/x.json").read_bytes() == (tmp_path / "b/out/x.json").read_bytes()
    assert derive_seed(0, "a") == derive_seed(0, "a") != derive_seed(1, "a")
    assert 0 <= derive_seed(0, "a") < 2**63
    assert len({derive_seed(0, f"row{number}") for number in range(1000)}) == 1000


def test_a_larger_limit_goes_on_and_a_smaller_one_takes_nothing_away(tmp_path):
    run(make_file(tmp_path, 2))
    _, backend = run(make_file(tmp_path, 5))
    assert len(backend.requests) == 3
    made = (tmp_path / "out/x.json").read_bytes()
    report, backend = run(make_file(tmp_path, 2))
    assert report.state is State.LARGER
    assert backend.requests == []
    assert (tmp_path / "out/x.json").read_bytes() == made
    run(make_file(tmp_path / "straight", 5))
    assert (tmp_path / "straight/out/x.json").read_bytes() == made


def test_a_file_without_a_journal_is_left_alone_unless_overwritten(tmp_path):
    file = make_file(tmp_path)
    write_rows(file.target, ["published"])
    report, backend = run(file)
    assert report.state is State.FOREIGN
    assert backend.requests == []
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
        def run(self, requests):
            yield next(super().run(requests))
            raise KeyboardInterrupt

    file = make_file(tmp_path)
    write_rows(file.target, ["old"])
    with pytest.raises(KeyboardInterrupt):
        run(file, Dying(), overwrite=True)
    assert json.loads(file.target.read_bytes()) == ["old"]
    report, backend = run(file)
    assert report.state is State.OPEN
    assert len(backend.requests) == 2
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
    def fails_once(request):
        if request.text == "ask row1" and not mended:
            raise ValueError("no such image")
        return "fine"

    mended = False
    file = make_file(tmp_path)
    report, _ = run(file, FakeBackend(fails_once))
    assert report.failures(SETTINGS) == [("row1", "no such image")]
    assert [row["t"] for row in json.loads(file.target.read_bytes())] == ["fine", "", "fine"]
    mended = True
    report, backend = run(file, FakeBackend(fails_once))
    assert [request.text for request in backend.requests] == ["ask row1"]
    assert report.failures(SETTINGS) == []
    assert [row["t"] for row in json.loads(file.target.read_bytes())] == ["fine"] * 3


def never(text):
    return "unreadable"


def test_unreadable_texts_are_asked_for_again_sampled_and_with_fresh_seeds(tmp_path):
    settings = Settings({}, {}, do_sample=False, attempts=3, complaint=never)
    report, backend = run(make_file(tmp_path, 1), settings=settings)
    assert [request.do_sample for request in backend.requests] == [False, True, True]
    assert len({request.seed for request in backend.requests}) == 3
    assert report.outcomes["row0"].attempt == 2
    assert report.failures(settings) == [("row0", "unreadable")]


def test_more_attempts_later_give_what_they_would_have_given_at_once(tmp_path):
    few, many = (Settings({}, {}, attempts=attempts, complaint=never) for attempts in (2, 4))
    run(make_file(tmp_path / "a"), settings=few)
    _, backend = run(make_file(tmp_path / "a"), settings=few)
    assert backend.requests == []
    run(make_file(tmp_path / "a"), settings=many)
    run(make_file(tmp_path / "b"), settings=many)
    assert (tmp_path / "a/out/x.json").read_bytes() == (tmp_path / "b/out/x.json").read_bytes()


def test_every_text_is_journalled_before_the_next_one_is_asked_for(tmp_path):
    file = make_file(tmp_path)
    seen = []

    def looks(request):
        seen.append(len(read_journal(file.journal).entries))
        return "x"

    run(file, FakeBackend(looks))
    assert seen == [0, 1, 2]


def test_half_surrogates_from_a_model_do_not_stop_a_run(tmp_path):
    file = make_file(tmp_path, 1)
    run(file, FakeBackend(lambda request: "a \udc80 b"))
    assert json.loads(file.target.read_bytes())[0]["t"] == "a ? b"


def test_journals_of_several_processes_count_together(tmp_path):
    """Two processes made a part each and died; the third goes on, and makes what one alone would have made."""
    file, alone = make_file(tmp_path / "a", 4), make_file(tmp_path / "b", 4)
    run(alone)
    header, *lines = alone.journal.read_bytes().splitlines(keepends=True)
    file.journal.parent.mkdir(parents=True)
    file.journal.write_bytes(header + lines[0])
    failed = json.dumps({"key": "row0", "value": {"prompt": file.units[0].prompt, "attempt": 0, "error": "x"}})
    file.journal.with_suffix(".journal.part-1").write_bytes(header + failed.encode() + b"\n" + lines[2])
    _, backend = run(file)
    assert [request.text for request in backend.requests] == ["ask row1", "ask row3"]
    assert file.target.read_bytes() == alone.target.read_bytes()
    other = header.replace(b"abc", b"xyz")
    file.journal.with_suffix(".journal.part-2").write_bytes(other + lines[0])
    with pytest.raises(MMRoleError, match="different settings"):
        run(file)
    run(file, overwrite=True)
    assert sorted(path.name for path in file.target.parent.iterdir()) == ["x.journal", "x.json"]


class Unloadable(FakeBackend):
    """A model that cannot be loaded: nothing comes of any request."""

    def run(self, requests):
        raise MMRoleError("the checkpoint cannot be loaded")


OTHER = Settings({"model": "xyz"}, {"names": {"model": "/b"}})


@pytest.mark.parametrize("name", ["x.journal", "x.journal.part-0"])
def test_a_run_without_a_text_locks_nobody_to_its_settings(tmp_path, name):
    file = make_file(tmp_path)
    with pytest.raises(MMRoleError, match="cannot be loaded"):
        run(file, Unloadable())
    file.journal.rename(file.target.with_name(name))
    report, backend = run(file, settings=OTHER)
    assert (report.state, len(backend.requests)) == (State.OPEN, 3)
    assert run(file, settings=OTHER)[0].state is State.FINISHED


def folder_of(file):
    return {path.name: path.read_bytes() for path in file.target.parent.iterdir()}


def test_overwrite_destroys_nothing_before_the_first_text(tmp_path):
    file = make_file(tmp_path)
    run(file)
    header, *lines = file.journal.read_bytes().splitlines(keepends=True)
    file.target.with_name("x.journal.part-1").write_bytes(header + lines[0])
    before = folder_of(file)
    with pytest.raises(MMRoleError, match="cannot be loaded"):
        run(file, Unloadable(), settings=OTHER, overwrite=True)
    assert folder_of(file) == before
    assert run(file)[0].state is State.FINISHED
    _, backend = run(file, settings=OTHER, overwrite=True)
    assert len(backend.requests) == 3
    assert sorted(folder_of(file)) == ["x.journal", "x.json"]
    assert run(file, settings=OTHER)[0].state is State.FINISHED
    with pytest.raises(MMRoleError, match="different settings"):
        run(file)


def test_what_overwrite_replaces_counts_no_longer_after_its_first_text(tmp_path):
    """Even if the run then dies: a part of an earlier run, in another model's words, is not mixed in."""

    class Dying(FakeBackend):
        def run(self, requests):
            yield next(super().run(requests))
            raise KeyboardInterrupt

    file, straight = make_file(tmp_path / "a"), make_file(tmp_path / "b")
    run(file)
    file.journal.rename(file.target.with_name("x.journal.part-1"))
    with pytest.raises(KeyboardInterrupt):
        run(file, Dying(lambda request: "new"), settings=OTHER, overwrite=True)
    _, backend = run(file, FakeBackend(lambda request: "new"), settings=OTHER)
    run(straight, FakeBackend(lambda request: "new"), settings=OTHER)
    assert len(backend.requests) == 2
    assert file.target.read_bytes() == straight.target.read_bytes()
    assert sorted(folder_of(file)) == ["x.journal", "x.json"]


@pytest.mark.parametrize("content", [b"\0\0\n{}\n", b'{"journal": 1, "settings": {}, "info": 3}\n{"key": 3}\n'])
def test_overwrite_replaces_damaged_journals(tmp_path, content):
    file = make_file(tmp_path)
    run(file)
    file.journal.write_bytes(content)
    file.target.with_name("x.journal.part-1").write_bytes(content)
    assert len(run(file, overwrite=True)[1].requests) == 3
    assert run(file)[0].state is State.FINISHED


ENTRY = {"prompt": "0" * 16, "attempt": 0, "text": "x"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("row0", 3),
        ("row0", {"text": "no prompt", "attempt": 0}),
        ("row0", {**ENTRY, "attempt": "first"}),
        ("row0", {**ENTRY, "text": None}),
        ("row0", {"prompt": "0" * 16, "attempt": 0}),
        ("", ENTRY),
        ("", {"sha256": [], "rows": 3}),
    ],
)
@pytest.mark.parametrize("number", [2, 5])
def test_a_journal_of_the_wrong_shape_is_told_with_its_line(tmp_path, number, key, value):
    file = make_file(tmp_path)
    run(file)
    lines = file.journal.read_text().splitlines()
    lines[number - 1] = json.dumps({"key": key, "value": value})
    file.journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(MMRoleError, match="the journal is damaged") as caught:
        run(file)
    assert f"line {number}" in str(caught.value)
    assert "--overwrite" in caught.value.fix


def rows_of(tmp_path, names, input_ids):
    units = [Unit(name, tmp_path / "1.png", "1.png", "system", name) for name in names]
    return ResultFile(
        tmp_path / "out" / "x.json", units, len(names), lambda outcomes: [{"id": name} for name in names], input_ids
    )


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
    assert json.loads((tmp_path / "out/x.json").read_bytes()) == [{"id": name} for name in names]


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
    assert backend.requests == [] and (tmp_path / "out/x.json").read_bytes() == made


def test_names_that_look_like_a_part_of_another_file(tmp_path):
    """`x.part-1.json` and `x.journal.json` beside `x.json`, in all of which several processes work."""
    targets = [tmp_path / f"{name}.json" for name in ("x", "x.part-1", "x.journal", "x.journal.part-1")]
    journals = [journal_path(target) for target in targets]
    parts = [part_journal(target, process) for target in targets for process in range(3)]
    assert len({*targets, *journals, *parts}) == 4 + 4 + 12
    for path in (*targets, *journals, *parts):
        path.write_text("{}")
    assert {part for target in targets for part in part_journals(target)} == set(parts)
    assert all(len(part_journals(target)) == 3 for target in targets)


def test_an_error_at_a_further_attempt_leaves_the_text_before(tmp_path):
    def breaks_at_the_second(request):
        if request.do_sample:
            raise ValueError("out of memory")
        return "I like both."

    settings = Settings({}, {}, do_sample=False, attempts=3, complaint=never)
    file = make_file(tmp_path, 1)
    report, _ = run(file, FakeBackend(breaks_at_the_second), settings)
    for known in (report, *inspect([file], settings)[0]):
        assert known.outcomes["row0"].text == "I like both."
        assert known.failures(settings) == [("row0", "out of memory (the text before: unreadable)")]
    report, backend = run(file, settings=settings)
    assert [request.do_sample for request in backend.requests] == [True, True]
    assert report.outcomes["row0"].error is None


def test_a_silent_engine_is_an_error(tmp_path):
    class Silent(FakeBackend):
        def run(self, requests):
            yield next(super().run(requests))

    with pytest.raises(MMRoleError, match="without a result") as caught:
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
