"""Counting one file of reviews, and its published CSV."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_utils.errors import MMRoleError
from eval.judging.metrics import METRIC_NAMES
from eval.judging.scores import ScoreReading, review_record
from eval.results.reviews import ZERO_DENOMINATOR, csv_bytes, describe, read_reviews, sequential_mean
from tests.eval.made_reviews import made_row, record, write_rows


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
    assert (result.rows, result.reviewed, result.empty, result.not_reviewed) == (4, 3, ["row_3"], [])
    means = dict(zip(METRIC_NAMES, result.means.tolist(), strict=True))
    assert means["Instruction Adherence"] == (0.5 + 1 + 1) / 3
    assert means["Fluency"] == 0.5
    assert means["Coherency"] == means["Tone Consistency"] == means["Response Accuracy"] == 0.75
    assert [(failure.id, failure.metric, failure.reason) for failure in result.failures] == [
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
        "pairs that only the forgiving reader could read: 1",
    ]
    assert (result.forgiven, result.retried) == (1, 2)


def test_no_valid_ratio_gives_nan(tmp_path: Path) -> None:
    rows = [made_row(0, records=dict.fromkeys(METRIC_NAMES, failed()))]
    assert csv_bytes(read_reviews(write_rows(tmp_path / "a.json", rows))).endswith(b"\r\n1" + b",nan" * 8 + b"\r\n")
    assert csv_bytes(read_reviews(write_rows(tmp_path / "b.json", []))).endswith(b"\r\n0" + b",nan" * 8 + b"\r\n")


@pytest.mark.parametrize("least", [5e-324, 1e-300, 1e-7, math.nan, -math.inf])
def test_a_score_of_no_sense_costs_its_own_row_alone(tmp_path: Path, least: float) -> None:
    rows = [made_row(0, (5, 10)), made_row(1, (10, least))]
    assert np.array_equal(read_reviews(write_rows(tmp_path / "a.json", rows)).means, np.full(8, 0.5))


@pytest.mark.parametrize("reviews", [["x"], "text", 5, {"Fluency": [8, 9]}])
def test_reviews_of_a_wrong_shape_are_failures(tmp_path: Path, reviews: Any) -> None:
    result = read_reviews(write_rows(tmp_path / "a.json", [{"id": "x", "rm_review": reviews}]))
    assert result.reviewed == 1 and len(result.failures) == 8


@pytest.mark.parametrize("row", [{}, {"conversations": None}, {"conversations": []}, {"conversations": [{}, {}]}])
def test_a_bare_row_is_one_without_an_answer(tmp_path: Path, row: Any) -> None:
    assert len(read_reviews(write_rows(tmp_path / "a.json", [row])).empty) == 1


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
