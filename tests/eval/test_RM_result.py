"""eval/RM_result.py and .sh from the command line."""

# ruff: noqa: N999 - mirrors the released file name
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_utils.errors import MMRoleError
from eval.results.reviews import FILES
from eval.RM_result import REPORT_FILES, build_parser, main
from tests.conftest import ROOT
from tests.eval.made_reviews import link_published, made_row, record, review_path, write_agent, write_rows

QUICK_FILES = [name for name in REPORT_FILES if name != "report.html"]


def run(*arguments: object, html: bool = False) -> int:
    return main([*map(str, arguments), *([] if html else ["--no_html"])])


def test_published_reviews_give_the_published_files(shared: Path, tmp_path: Path) -> None:
    eval_dir = link_published(shared, tmp_path / "eval")
    assert run("--eval_dir", eval_dir, "--data_root", shared / "mmrole_data", html=True) == 0
    published = shared / "mmrole_data" / "published"
    expected = sorted(published.glob("*_results/*/*.csv"))
    assert len(expected) == 48
    for path in expected:
        assert (eval_dir / path.relative_to(published)).read_bytes() == path.read_bytes()
    assert all((eval_dir / "report" / name).stat().st_size for name in REPORT_FILES)
    assert (eval_dir / "report" / "report.html").stat().st_size < 10_000_000


def test_one_folder_with_the_released_flags(tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "comment_test.json", [made_row(0, (9, 10))])
    write_rows(tmp_path / "in" / "other.json", [made_row(0, (8, 10))])
    assert run("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out" / "deep") == 0
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["comment_test.csv", "other.csv"]
    with (tmp_path / "out" / "deep" / "other.csv").open(newline="") as file:
        assert [row["Fluency"] for row in csv.DictReader(file)] == ["0.8"]


def test_one_file_with_the_released_flags(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        write_rows(tmp_path / "in" / name, [made_row()])
    assert run("--input_dir", tmp_path / "in", "--input_file", "b.json", "--output_dir", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.csv"]


@pytest.mark.parametrize("flags", [["--input_dir", "x"], ["--output_dir", "x"], ["--input_file", "x"]])
def test_half_of_the_released_flags_is_refused(flags: list[str]) -> None:
    with pytest.raises(MMRoleError, match="must be given together"):
        run(*flags)


def test_empty_or_missing_input_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(MMRoleError, match="no review files"):
            run("--input_dir", folder, "--output_dir", tmp_path / "out")
    with pytest.raises(MMRoleError, match="no reviews here"):
        run("--eval_dir", tmp_path)


def test_broken_file_is_reported_and_the_rest_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_agent(tmp_path, "good", [made_row()])
    write_agent(tmp_path, "bad", [made_row()])
    broken = review_path(tmp_path, "bad", "in", "comment")
    broken.write_text('[{"id": 1,]', encoding="utf-8")
    assert run("--eval_dir", tmp_path) == 1
    result = capsys.readouterr()
    assert all(part in result.err for part in ("problem:", "value:", "where:", "to do:", str(broken)))
    assert "bad (incomplete: no readable in-test/comment" in result.out
    assert len(list(tmp_path.glob("*_results/*/*.csv"))) == 11
    assert not (tmp_path / "in-test_results" / "bad" / "comment_test.csv").exists()
    assert all((tmp_path / "report" / name).is_file() for name in QUICK_FILES)


def test_an_agent_with_a_slash_in_its_name_is_not_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_agent(tmp_path, "Org/model", [made_row()])
    with pytest.raises(MMRoleError, match="a folder too deep"):
        run("--eval_dir", tmp_path)
    write_agent(tmp_path, "good", [made_row()])
    assert run("--eval_dir", tmp_path) == 1
    assert str(tmp_path / "out-test_reviews" / "Org-model") in capsys.readouterr().err
    assert len(list(tmp_path.glob("*_results/*/*.csv"))) == 6


def test_a_csv_of_earlier_reviews_is_not_left_as_if_it_were_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_agent(tmp_path, "made", [made_row()])
    assert run("--eval_dir", tmp_path) == 0
    assert "stale" not in capsys.readouterr().out
    review_path(tmp_path, "made", "in", "comment").write_text("[", encoding="utf-8")
    review_path(tmp_path, "made", "out", "comment").unlink()
    broken, gone = (tmp_path / f"{split}-test_results" / "made" / "comment_test.csv" for split in ("in", "out"))
    before = broken.read_bytes()
    assert run("--eval_dir", tmp_path) == 1
    result = capsys.readouterr().out
    assert f"stale: {broken} was computed from earlier reviews; it is comment_test.csv.stale now" in result
    assert not broken.exists()
    assert broken.with_name("comment_test.csv.stale").read_bytes() == before
    assert f"stale: {gone} has no reviews; it was left unchanged" in result
    assert gone.is_file()


def test_a_stale_csv_of_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "in" / "a.json", [made_row()])
    assert run("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    path.write_text("[", encoding="utf-8")
    assert run("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out") == 1
    assert "stale: " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.csv.stale"]


def test_a_reader_that_has_seen_enough_stops_nothing(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row()])
    command = [sys.executable, str(ROOT / "eval" / "RM_result.py"), "--eval_dir", str(tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(list(tmp_path.glob("*_results/*/*.csv"))) == len(FILES)
    assert all((tmp_path / "report" / name).is_file() for name in REPORT_FILES)


def test_a_page_of_earlier_reviews_is_not_left(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row()])
    assert run("--eval_dir", tmp_path, html=True) == 0 and (tmp_path / "report" / "report.html").is_file()
    assert run("--eval_dir", tmp_path) == 0 and not (tmp_path / "report" / "report.html").exists()


def test_another_judges_reviews_have_their_own_results_and_report(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row()])
    other = tmp_path / "judges" / "strict"
    write_agent(other, "made", [made_row(0, (2, 10))])
    assert run("--eval_dir", tmp_path, "--judge", "strict") == 0
    line = (other / "in-test_results" / "made" / "comment_test.csv").read_bytes().splitlines()[1]
    assert line == b"1" + b",0.2" * 8
    assert all((other / "report" / name).is_file() for name in QUICK_FILES)
    tables = [
        (other / "report" / name).read_text(encoding="utf-8") for name in ("table.md", "table.csv", "records.csv")
    ]
    assert all("strict" in table and "reward-model" not in table for table in tables)
    assert not (tmp_path / "report").exists()
    with pytest.raises(MMRoleError, match="no reviews here"):
        run("--eval_dir", tmp_path, "--judge", "absent")
    with pytest.raises(MMRoleError, match="the name of one folder"):
        run("--eval_dir", tmp_path, "--judge", "../strict")


def test_the_folder_of_evaluations_is_that_of_the_other_scripts() -> None:
    assert build_parser().parse_args([]).eval_dir == ROOT / "eval"


@pytest.mark.parametrize("seed", ["-1", "1.5", "x"])
def test_a_seed_that_is_none_is_refused(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--seed", seed)
    assert caught.value.code == 2
    assert f"'{seed}' is not a whole number" in capsys.readouterr().err


def test_one_broken_file_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "in" / "b.json", [made_row()])
    write_rows(tmp_path / "in" / "a.json", {"not": "rows"})
    assert run("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.csv"]
    assert "not a file of reviews" in capsys.readouterr().err


def test_says_what_was_counted_and_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [made_row(0), made_row(1, answer=""), made_row(2, records={"Fluency": record((8, 0)), "Coherency": {}})]
    write_agent(tmp_path, "made", rows)
    assert run("--eval_dir", tmp_path) == 0
    result = capsys.readouterr().out
    assert result.count("3 rows, 2 counted, 1 without an answer, failed reviews: 2") == 6
    assert result.count("Fluency: mean over 1 of 2 (1 × model B scored 0, so the ratio is undefined)") == 6
    assert result.count("Coherency: mean over 1 of 2 (1 × no review stored)") == 6
    assert "failed reviews: 12" in result


def test_agent_with_nothing_but_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_agent(tmp_path, "made", [made_row(0, (8, 0))])
    old_chart = write_rows(tmp_path / "report" / "radar.png", "an old chart")
    assert run("--eval_dir", tmp_path, html=True) == 0  # a page without figures
    assert "no chart" in capsys.readouterr().out and not old_chart.exists()
    line = (tmp_path / "in-test_results" / "made" / "comment_test.csv").read_bytes().splitlines()[1]
    assert line == b"1" + b",nan" * 8


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file where a folder should be: unlike permissions, it also stops root."""
    write_agent(tmp_path, "made", [made_row()])
    (tmp_path / "in-test_results").write_text("a file", encoding="utf-8")
    assert run("--eval_dir", tmp_path) == 1
    assert capsys.readouterr().err.count("cannot write") == 1  # one folder, reported once
    assert len(list(tmp_path.glob("out-test_results/*/*.csv"))) == 3
    (tmp_path / "report.txt").write_text("a file", encoding="utf-8")
    with pytest.raises(MMRoleError, match="cannot write"):
        run("--eval_dir", tmp_path, "--report_dir", tmp_path / "report.txt")
    with pytest.raises(MMRoleError, match="cannot write"):
        run("--eval_dir", tmp_path, "--report_dir", tmp_path / "report.txt" / "deeper")


def test_reports_are_the_same_each_time(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row(i, (i, 10)) for i in range(1, 9)])
    for name in ("first", "again"):
        assert run("--eval_dir", tmp_path, "--report_dir", tmp_path / name, "--seed", 7, html=True) == 0
    for name in REPORT_FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert json.loads((tmp_path / "first" / "report.json").read_text())["settings"]["seed"] == 7


def test_reviews_are_never_touched(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row()])
    paths = [review_path(tmp_path, "made", *key) for key in FILES]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    run("--eval_dir", tmp_path)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before


def test_script_runs_from_any_directory(tmp_path: Path) -> None:
    write_agent(tmp_path / "my eval", "我的 $agent_1$", [made_row()])
    environment = {**os.environ, "EVAL_DIR": "my eval", "VIRTUAL_ENV": sys.prefix}
    script = ROOT / "eval" / "RM_result.sh"
    done = subprocess.run(
        ["bash", script, "--seed", "3"], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "我的 $agent_1$" in done.stdout and "The paper's table" in done.stdout
    assert all((tmp_path / "my eval" / "report" / name).is_file() for name in REPORT_FILES)


def test_script_tells_user_errors_without_a_traceback(tmp_path: Path) -> None:
    environment = {**os.environ, "EVAL_DIR": str(tmp_path), "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(
        ["bash", ROOT / "eval" / "RM_result.sh"], env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 2
    assert "no reviews here" in done.stderr and "Traceback" not in done.stderr
