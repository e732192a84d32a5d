"""Review files as records, the published CSV, all agents of an evaluation folder, and the paper's weighing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_utils.errors import MMRoleError
from eval.judging.metrics import METRIC_NAMES
from eval.judging.scores import ScoreReading, review_record
from eval.results.reviews import (
    FAILED,
    FILES,
    NO_ANSWER,
    NOT_REVIEWED,
    ZERO_DENOMINATOR,
    Record,
    csv_bytes,
    describe,
    ranked,
    ratios_of,
    read_agents,
    read_reviews,
    sequential_mean,
    unexplained_csvs,
)
from tests.closed import close
from tests.eval.made_reviews import link_published, made_row, record, review_path, write_agent, write_rows


def test_every_published_csv_byte_for_byte(shared: Path) -> None:
    published = shared / "mmrole_data" / "published"
    files = sorted(published.glob("*-test_reviews/*/*.json"))
    assert len(files) == 48
    for path in files:
        folder = path.parent.parent.name.replace("reviews", "results")
        expected = published / folder / path.parent.name / f"{path.stem}.csv"
        assert csv_bytes(read_reviews(path)) == expected.read_bytes(), path


def test_csv_has_published_form(tmp_path: Path) -> None:
    rows = [made_row(0, (1, 3)), made_row(1, (9, 10)), made_row(2, (0, 7))]
    mean = (1 / 3 + 9 / 10 + 0 / 7) / 3
    heading = f"count,{','.join(METRIC_NAMES)}"
    expected = f"{heading}\r\n3,{','.join([repr(mean)] * 8)}\r\n"
    assert csv_bytes(read_reviews(write_rows(tmp_path / "a.json", rows))) == expected.encode()


def test_published_sum_is_sequential_and_in_file_order() -> None:
    """Neither Python 3.12's compensated `sum` nor numpy's pairwise one: both would give other digits."""
    values = [1e16, 1.0, -1e16, 1.0]
    assert sequential_mean(values) == 0.25  # the first 1.0 is lost, as it was when the paper's numbers were made
    assert math.fsum(values) / 4 == 0.5
    assert sequential_mean([1.0, 1.0, 1e16, -1e16]) == 0.5


def test_mean_skips_failures_and_is_nan_when_nothing_is_left() -> None:
    assert sequential_mean([0.5, math.nan, 1.0]) == 0.75
    assert math.isnan(sequential_mean([math.nan]))
    assert math.isnan(sequential_mean([]))


def failed(reason: str = "no [Scores] marker", attempts: int = 3) -> dict[str, Any]:
    return review_record("?", ScoreReading(None, None, reason), attempts)


def test_failures_are_left_out_of_the_mean_and_not_of_the_count(tmp_path: Path) -> None:
    rows = [
        made_row(0, (5, 10)),
        made_row(1, (10, 10), records={"Fluency": failed(), "Coherency": {}}),
        made_row(2, (10, 10), records={"Fluency": record((10, 0)), "Tone Consistency": {"review": "x", "score": {}}}),
        made_row(3, answer=""),
    ]
    del rows[1]["rm_review"]["Response Accuracy"]
    result = read_reviews(write_rows(tmp_path / "a.json", rows))
    assert (len(result.rows), result.reviewed, result.ids(NO_ANSWER), result.ids(NOT_REVIEWED)) == (4, 3, ["row_3"], [])
    means = dict(zip(METRIC_NAMES, result.means.tolist(), strict=True))
    assert means["Instruction Adherence"] == (0.5 + 1 + 1) / 3
    assert means["Fluency"] == 0.5
    assert means["Coherency"] == means["Tone Consistency"] == means["Response Accuracy"] == 0.75
    assert [(failure.row, failure.metric, failure.reason) for failure in result.failures] == [
        ("row_1", "Fluency", "no [Scores] marker"),
        ("row_1", "Coherency", "no review stored"),
        ("row_1", "Response Accuracy", "no review stored"),
        ("row_2", "Fluency", ZERO_DENOMINATOR),
        ("row_2", "Tone Consistency", "no scores stored"),
    ]
    assert csv_bytes(result).splitlines()[1].startswith(b"3,0.8333333333333334,0.5,0.75,")


def test_description_tells_counted_empty_failed_and_why(tmp_path: Path) -> None:
    rows = [
        made_row(0),
        made_row(1, records={"Fluency": failed()}),
        made_row(2, records={"Fluency": record((10, 0))}),
        made_row(3, answer=""),
        {**made_row(4), "rm_review": {}},
        made_row(5, records={"Coherency": {**record((8, 10)), "read_by": "forgiving", "attempts": 2}}),
    ]
    result = read_reviews(write_rows(tmp_path / "a.json", rows))
    assert describe(result) == [
        "6 rows, 4 counted, 1 without an answer, 1 not reviewed, failed reviews: 2",
        "without an answer: row_3",
        "not reviewed: row_4",
        f"Fluency: mean over 2 of 4 (1 × no [Scores] marker; 1 × {ZERO_DENOMINATOR})",
        "pairs read by the forgiving reader only: 1",
    ]


def test_no_valid_ratio_gives_nan(tmp_path: Path) -> None:
    rows = [made_row(0, records=dict.fromkeys(METRIC_NAMES, failed()))]
    assert csv_bytes(read_reviews(write_rows(tmp_path / "a.json", rows))).endswith(b"\r\n1" + b",nan" * 8 + b"\r\n")
    assert csv_bytes(read_reviews(write_rows(tmp_path / "b.json", []))).endswith(b"\r\n0" + b",nan" * 8 + b"\r\n")


@pytest.mark.parametrize("least", [5e-324, 1e-300, 1e-7, math.nan, -math.inf])
def test_a_score_of_no_sense_fails_its_row_alone(tmp_path: Path, least: float) -> None:
    rows = [made_row(0, (5, 10)), made_row(1, (10, least))]
    assert np.array_equal(read_reviews(write_rows(tmp_path / "a.json", rows)).means, np.full(8, 0.5))


@pytest.mark.parametrize("reviews", [["x"], "text", 5, {"Fluency": [8, 9]}])
def test_reviews_of_a_wrong_shape_are_failures(tmp_path: Path, reviews: Any) -> None:
    result = read_reviews(write_rows(tmp_path / "a.json", [{"id": "x", "rm_review": reviews}]))
    assert result.reviewed == 1 and len(result.failures) == 8


@pytest.mark.parametrize("row", [{}, {"conversations": None}, {"conversations": []}, {"conversations": [{}, {}]}])
def test_a_bare_row_is_one_without_an_answer(tmp_path: Path, row: Any) -> None:
    assert len(read_reviews(write_rows(tmp_path / "a.json", [row])).ids(NO_ANSWER)) == 1


@pytest.mark.parametrize("rows", [{"a": 1}, [made_row(), 5], "text", None])
def test_a_file_of_something_else_is_refused(tmp_path: Path, rows: Any) -> None:
    path = write_rows(tmp_path / "a.json", rows)
    with pytest.raises(MMRoleError, match="list of rows") as caught:
        read_reviews(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", '[{"id": ', "not json", "[" * 100_000])
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MMRoleError) as caught:
        read_reviews(path)
    assert str(path) in str(caught.value)


def test_every_cell_of_the_papers_table(shared: Path, tmp_path: Path) -> None:
    table = json.loads((shared / "golden" / "paper_table_5.json").read_text(encoding="utf-8"))
    agents = {agent.folder: agent for agent in read_agents(link_published(shared, tmp_path / "eval"))}
    checked = 0
    for row in table["rows"]:
        folder, _, split = row["folder"].partition(":")
        if folder in agents:
            scores = agents[folder].paper_scores(split or None)
            assert [f"{score:.3f}" for score in scores] == [row[column] for column in table["columns"]], row["name"]
            assert split or agents[folder].name == row["name"]
            checked += 1
    assert checked == 10  # eight agents, and In-Test and Out-Test of MMRole-Agent
    assert {agent.status for agent in agents.values()} == {"complete"}


def write_uneven(eval_dir: Path) -> None:
    """Six files with a ratio each of 0.1 to 0.6, and unequal numbers of rows."""
    for i, (split, kind) in enumerate(FILES, 1):
        rows = [made_row(number, (i, 10)) for number in range(i)]
        write_rows(review_path(eval_dir, "made", split, kind), rows)


def test_published_weights_are_of_files_and_splits_not_of_samples(tmp_path: Path) -> None:
    write_uneven(tmp_path)
    (agent,) = read_agents(tmp_path)
    assert agent.paper_scores("in") == pytest.approx(np.full(9, 0.2))
    assert agent.paper_scores("out") == pytest.approx(np.full(9, 0.5))
    assert agent.paper_scores() == pytest.approx(np.full(9, 0.75 * 0.2 + 0.25 * 0.5))
    assert ratios_of(agent.records()).mean() == pytest.approx(9.1 / 21)


@pytest.mark.parametrize("missing", FILES)
def test_incomplete_agent_never_has_the_papers_number(tmp_path: Path, missing: tuple[str, str]) -> None:
    write_agent(tmp_path, "made", [made_row()], skip=[missing])
    (agent,) = read_agents(tmp_path)
    assert not agent.complete
    assert f"incomplete: no readable {missing[0]}-test/{missing[1]}" in agent.status
    assert np.isnan(agent.paper_scores()).all() and np.isnan(agent.paper_scores(missing[0])).all()
    other = "out" if missing[0] == "in" else "in"
    assert np.isfinite(agent.paper_scores(other)).all()
    assert ratios_of(agent.records()).shape == (5, 8)


def test_answers_that_wait_for_their_review_make_it_incomplete(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row()])
    waiting = made_row(1)
    del waiting["rm_review"]
    write_rows(review_path(tmp_path, "made", "in", "comment"), [made_row(), waiting])
    (agent,) = read_agents(tmp_path)
    assert agent.status.startswith("incomplete: answers not reviewed: 1") and np.isnan(agent.paper_scores()).all()


def test_empty_answers_do_not_make_it_incomplete(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row(), made_row(1, answer="")])
    (agent,) = read_agents(tmp_path)
    assert agent.complete and np.isfinite(agent.paper_scores()).all()
    assert agent.status == "complete; 12 rows where the published files have 294"


def test_unreadable_file_is_a_problem_of_its_agent_alone(tmp_path: Path) -> None:
    write_agent(tmp_path, "good", [made_row()])
    write_agent(tmp_path, "bad", [made_row()])
    review_path(tmp_path, "bad", "out", "comment").write_text("[{", encoding="utf-8")
    bad, good = read_agents(tmp_path)
    assert good.complete and not good.problems
    assert len(bad.problems) == 1 and "incomplete: no readable out-test/comment" in bad.status


def test_nothing_there_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "in-test_reviews" / "empty").mkdir(parents=True)
    for eval_dir in (tmp_path, tmp_path / "absent"):
        with pytest.raises(MMRoleError, match="no reviews here") as caught:
            read_agents(eval_dir)
        assert "RM_review.sh" in str(caught.value)


def test_ranked_by_overall_with_incomplete_ones_last(tmp_path: Path) -> None:
    write_agent(tmp_path, "worst", [made_row(0, (1, 10))])
    write_agent(tmp_path, "best", [made_row(0, (9, 10))])
    write_agent(tmp_path, "part_high", [made_row(0, (10, 5))], skip=[("in", "comment")])
    write_agent(tmp_path, "part_low", [made_row(0, (2, 10))], skip=[("in", "comment")])
    write_agent(tmp_path, "nothing", [made_row(0, (2, 0))])
    assert [agent.folder for agent in ranked(read_agents(tmp_path))] == [
        "best", "worst", "part_high", "part_low", "nothing",
    ]  # fmt: skip


def test_names_that_cannot_be_printed_are_escaped(tmp_path: Path) -> None:
    for folder in ("qwen-vl-chat", "我的 agent", "two\nlines"):
        write_agent(tmp_path, folder, [made_row()])
    names = {agent.folder: agent.name for agent in read_agents(tmp_path)}
    assert names == {"qwen-vl-chat": "QWen-VL-Chat", "我的 agent": "我的 agent", "two\nlines": "two\\nlines"}


def test_all_failed_has_no_number_and_does_not_crash(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row(0, (5, 0))])
    (agent,) = read_agents(tmp_path)
    assert agent.complete and math.isnan(agent.paper_scores()[-1])


def test_a_closed_folder_is_reported_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_agent(tmp_path, "open", [made_row()])
    write_agent(tmp_path, "shut", [made_row()])
    close(monkeypatch, tmp_path / "in-test_reviews" / "shut")
    sound, shut = read_agents(tmp_path)
    assert sound.complete and not sound.problems
    assert [len(shut.files), len(shut.unreadable)] == [3, 3]
    (problem,) = shut.problems
    assert problem.value == tmp_path / "in-test_reviews" / "shut"
    (csv := tmp_path / "in-test_results" / "shut" / "comment_test.csv").parent.mkdir(parents=True)
    csv.write_text("")
    assert unexplained_csvs(tmp_path) == []


def test_a_closed_split_is_reported_with_every_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_agent(tmp_path, "a", [made_row()])
    write_agent(tmp_path, "b", [made_row()])
    close(monkeypatch, tmp_path / "in-test_reviews")
    for agent in read_agents(tmp_path):
        assert len(agent.files) == 3 and not agent.complete
        assert [problem.value for problem in agent.problems] == [tmp_path / "in-test_reviews"]


def test_a_closed_evaluation_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_agent(tmp_path / "eval", "a", [made_row()])
    close(monkeypatch, tmp_path / "eval")
    with pytest.raises(MMRoleError, match="cannot read: Permission denied"):
        read_agents(tmp_path / "eval")


def test_a_record_says_what_it_is_about(tmp_path: Path) -> None:
    row = {**made_row(4, (9, 10), answer="Quite long."), "script": "西游记", "role": "孙悟空"}
    row["rm_review"]["Fluency"] = {**record((6, 8)), "read_by": "forgiving", "attempts": 2}
    file = read_reviews(
        write_rows(tmp_path / "a.json", [made_row(), row]), judge="me", agent="x", split="in", kind="comment"
    )
    assert len(file.records) == 2 * len(METRIC_NAMES)
    first, second = file.records[len(METRIC_NAMES) :][:2]
    expected = Record(
        judge="me", agent="x", split="in", kind="comment", number=1, row="row_4", character="孙悟空", script="西游记",
        category="fictional", language="Chinese", picture="a.jpg", metric="Fluency", a=6, b=8, ratio=0.75,
        answer_length=11, reference_length=5, status="read", reader="forgiving", reason="", attempts=2, swapped=False,
    )  # fmt: skip
    assert second == expected
    assert (first.metric, first.ratio, first.reader, first.attempts) == (METRIC_NAMES[0], 0.9, "published", 1)


def test_swapped_scores_are_stored_as_written_and_read_the_other_way_round(tmp_path: Path) -> None:
    stored = {**record((10, 8)), "swapped": True}  # model A was the reference
    row = made_row(0, records=dict.fromkeys(METRIC_NAMES, stored))
    path = write_rows(tmp_path / "a.json", [row])
    found = read_reviews(path, swapped=True).records[0]
    assert (found.a, found.b, found.ratio, found.swapped) == (8, 10, 0.8, True)
    with pytest.raises(MMRoleError, match="exchanged"):  # the published numbers are made from the usual order
        read_reviews(path)


def test_failed_records_have_no_ratio_and_a_reason(tmp_path: Path) -> None:
    row = made_row(0, records={"Fluency": record((8, 0)), "Coherency": failed("no marker", 3)})
    file = read_reviews(write_rows(tmp_path / "a.json", [row]))
    assert [(f.metric, f.a, f.status, f.reason, f.attempts) for f in file.failures[:1]] == [
        ("Fluency", 8, FAILED, ZERO_DENOMINATOR, 1)
    ]
    assert (file.failures[1].reason, file.failures[1].attempts) == ("no marker", 3)
