"""Agreement of judges: oracles, and synthetic judges whose planted biases are recovered within their intervals."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.inter_rater import cohens_kappa

from data_utils.errors import MMRoleError
from eval.agreement import main
from eval.judging.metrics import METRIC_NAMES
from eval.results.judges import (
    Key,
    agreement,
    among_people,
    common,
    kappa,
    krippendorff_alpha,
    pearson,
    position_bias,
    read_judge,
    spread,
)
from eval.results.report import scores_of
from eval.results.reviews import READ, Record
from eval.results.statistics import COLUMNS, length_regression
from eval.RM_result import main as report_main
from tests.eval.made_reviews import made_row, review_path, write_agent, write_rows

CHARACTERS, ROWS, AGENTS = 30, 4, 3
M = len(METRIC_NAMES)
OVERALL = COLUMNS.index("Overall")
Scores = tuple[np.ndarray, np.ndarray]


def truth(seed: int = 0) -> np.ndarray:
    """(agents, characters, rows, metrics) true scores of answers, of 5 to 9; those of references are all 7."""
    generator = np.random.default_rng(seed)
    quality = np.array([6.0, 7.0, 8.0]).reshape(AGENTS, 1, 1, 1) + generator.normal(0, 0.3, (1, CHARACTERS, 1, 1))
    return quality + generator.normal(0, 0.3, (AGENTS, CHARACTERS, ROWS, M))


def records(a: np.ndarray, b: float | np.ndarray = 7.0, lengths: np.ndarray | None = None) -> list[Record]:
    """The reviews of a synthetic judge."""
    b = np.broadcast_to(b, a.shape)
    found = []
    for i, j, k, m in np.ndindex(a.shape):
        found.append(
            Record(
                judge="made", agent=f"agent {i}", split="in", kind="comment", number=j * ROWS + k, row=f"row {j} {k}",
                character=f"c {j}", script="s", category="other", language="English", picture="",
                metric=METRIC_NAMES[m], a=float(a[i, j, k, m]), b=float(b[i, j, k, m]),
                ratio=float(a[i, j, k, m] / b[i, j, k, m]),
                answer_length=int(lengths[i, j, k]) if lengths is not None else 100, reference_length=100, status=READ,
                reader="published", reason="", attempts=1, swapped=False,
            )
        )  # fmt: skip
    return found


def values(first: list[Record], second: list[Record], column: str = "Overall") -> dict[str, Any]:
    return {one.statistic: one for one in agreement(common(first, second)) if one.column == column}


def test_statistics_agree_with_their_oracles() -> None:
    generator = np.random.default_rng(3)
    x = generator.integers(1, 6, 200) / 2
    y = np.clip(x + generator.integers(-1, 2, 200) / 2, 0.5, 3)
    alpha = krippendorff.alpha(np.array([x, y]), level_of_measurement="interval")
    assert krippendorff_alpha(np.concatenate([x, y]), np.tile(np.arange(200), 2)) == pytest.approx(alpha)
    names = np.union1d(x, y)
    table = np.array([[((x == i) & (y == j)).sum() for j in names] for i in names])
    assert kappa(x, y) == pytest.approx(cohens_kappa(table).kappa)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)


def test_people_agree_among_themselves_as_the_oracle_says() -> None:
    generator = np.random.default_rng(5)
    scores = {
        Key("one", f"row_{i}", "Fluency"): [
            (float(base + shift), 10.0) for shift in generator.integers(-1, 2, 1 + i % 4)
        ]
        for i, base in enumerate(generator.integers(2, 9, 40))
    }
    table = np.full((4, 40), np.nan)
    for i, pairs in enumerate(scores.values()):
        table[: len(pairs), i] = [a / b for a, b in pairs]
    reviews, alpha = among_people(scores)
    assert reviews == 30
    assert alpha == pytest.approx(krippendorff.alpha(table, level_of_measurement="interval"))
    assert among_people({Key("one", "row_0", "Fluency"): [(8.0, 10.0)]})[0] == 0


def test_two_judges_are_compared_by_rows() -> None:
    first, second = truth(), truth() + np.random.default_rng(1).normal(0, 0.5, truth().shape)
    found = values(records(first), records(second))
    x, y = (scores.mean(axis=3).ravel() / 7 for scores in (first, second))
    assert found["mean absolute error"].value == pytest.approx(np.abs(x - y).mean())
    assert found["Spearman"].value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found["Kendall tau-b"].value == pytest.approx(stats.kendalltau(x, y).statistic)
    assert found["upper limit of agreement"].value == pytest.approx((x - y).mean() + 1.96 * (x - y).std(ddof=1))
    assert found["ranking tau"].value == 1 and found["Pearson"].rows == AGENTS * CHARACTERS * ROWS
    one = values(records(first), records(second), "Fluency")
    assert one["mean absolute error"].value > found["mean absolute error"].value


def test_planted_noise_and_bias_are_recovered() -> None:
    """Second = first + 0.35 points + noise: the bias is -0.05, the correlation follows from the variances."""
    scores = truth()
    row_noise = np.random.default_rng(2).normal(0, 0.6, (*scores.shape[:3], 1))
    found = values(records(scores), records(scores + 0.35 + row_noise))
    assert found["bias"].low < -0.05 < found["bias"].high
    variance = scores.mean(axis=3).var()
    expected = np.sqrt(variance / (variance + 0.6**2))
    assert found["Pearson"].low < expected < found["Pearson"].high
    assert found["mean absolute error"].low < np.mean(np.abs(0.35 + row_noise)) / 7 < found["mean absolute error"].high


def test_a_constant_judge_has_no_correlation_and_does_not_break_anything() -> None:
    found = values(records(truth()), records(np.full(truth().shape, 7.0)))
    assert np.isnan([found[name].value for name in ("Pearson", "Spearman", "Kendall tau-b", "ranking tau")]).all()
    assert found["kappa of the winner"].value == 0 and found["Krippendorff alpha"].value < 0.1
    both = values(records(np.full(truth().shape, 7.0)), records(np.full(truth().shape, 7.0)))
    assert both["mean absolute error"].value == 0 and np.isnan(both["Krippendorff alpha"].value)


def test_a_planted_preference_for_the_first_place_is_recovered() -> None:
    def judge(seed: int, first_is_answer: bool) -> list[Record]:
        noise = np.random.default_rng([seed, first_is_answer]).normal(0, 0.3, (2, *truth().shape))
        return records(truth() + noise[0] + 0.4 * first_is_answer, 7 + noise[1] + 0.4 * (not first_is_answer))

    covered = []
    for seed in range(10):
        found = position_bias(judge(seed, True), judge(seed, False))
        assert found is not None and found.reviews == truth().size
        assert found.preference.value[OVERALL] == pytest.approx(0.4, abs=0.02)
        covered.append(found.preference.low[OVERALL] < 0.4 < found.preference.high[OVERALL])
        assert 0.5 < found.consistency.value[OVERALL] < 0.95
    assert sum(covered) >= 8
    fair = position_bias(records(truth()), records(truth()))
    assert fair is not None and fair.consistency.value[OVERALL] == 1 and fair.preference.value[OVERALL] == 0
    averaged = found.averaged["agent 2"]
    quality = truth()[2].mean()
    assert averaged.value[OVERALL] == pytest.approx(((quality + 0.4) / 7 + quality / 7.4) / 2, abs=0.01)


def test_a_planted_preference_for_length_is_recovered() -> None:
    generator = np.random.default_rng(5)
    lengths = generator.integers(50, 400, truth().shape[:3])
    a = 7 * np.exp(0.15 * np.log(lengths / 100) + generator.normal(0, 0.05, lengths.shape))[..., None] * np.ones(M)
    scores = scores_of(records(a, lengths=lengths))
    answer = np.array([row.answer_length for row in scores.rows])
    estimate, _ = length_regression(scores.a, scores.b, answer, np.full(len(answer), 100), scores.characters)
    assert estimate.low[0] < 0.15 < estimate.high[0]
    assert estimate.low[2] < 1 < estimate.high[2] and estimate.low[1] > 1


def test_planted_spread_of_repetitions_is_recovered() -> None:
    generator = np.random.default_rng(6)
    repeats = [records(truth() + generator.normal(0, 0.35, truth().shape)) for _ in range(4)]
    for one in spread(*repeats):
        assert one.review == pytest.approx(0.05, rel=0.1)
        assert one.row == pytest.approx(0.05 / np.sqrt(M), rel=0.2)
        assert one.mean < one.row and one.same == 0
    assert all(one.same == 1 and one.review == 0 for one in spread(records(truth()), records(truth())))


def test_what_only_one_judge_has_read_is_counted() -> None:
    first, second = records(truth()), records(truth())
    second[5] = second[5]._replace(status="failed", ratio=np.nan)
    both = common(first[8:], second)
    assert both.alone == [0, 7] or both.alone == [1, 8]
    assert sum(both.alone) == 7 and len(both.agents) == AGENTS * CHARACTERS * ROWS - 1


def write_people(path: Path, lines: list[list[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "agent", "metric", "score_agent", "score_reference"])
        writer.writerows(lines)
    return path


def test_people_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = np.random.default_rng(7).integers(4, 10, (12, 2))
    rows = [made_row(i, (int(a), 10)) | {"role": f"c {i}"} for i, (a, _) in enumerate(scores)]
    write_rows(review_path(tmp_path, "one", "in", "comment"), rows)
    lines = [[f"row_{i}", "one", metric, b, 10] for i, (_, b) in enumerate(scores) for metric in METRIC_NAMES]
    people = write_people(
        tmp_path / "people.csv", [*lines, ["row_0", "one", "Fluency", 8, 8], ["x", "two", "Fluency", 1, 2]]
    )
    (_, read) = read_judge(str(people), tmp_path)
    (fluency,) = [r for r in read if (r.row, r.metric) == ("row_0", "Fluency")]
    assert (fluency.a, fluency.b) == ((scores[0, 1] + 8) / 2, 9) and len(read) == len(lines) + 1
    assert main(["reward-model", str(people), "--eval_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "12 answers of 1 agents were read from both; 0 single reviews only by the first, 1 only by" in printed
    assert "people has several people's scores for 1 reviews: Krippendorff's alpha" in printed
    assert "0.074" in printed and "the paper's figures" in printed
    report = tmp_path / "report"
    names = [f"agreement-reward-model-people.{ending}" for ending in ("csv", "json", "md", "png")]
    assert sorted(path.name for path in report.iterdir()) == names
    content = json.loads((report / names[1]).read_text())
    found = {(one["column"], one["statistic"]): one for one in content["agreement"]}
    error = np.abs(scores[1:, 0] - scores[1:, 1]).sum() / 10
    assert found["Tone Consistency", "mean absolute error"]["value"] == pytest.approx(
        (error + abs(scores[0, 0] - scores[0, 1]) / 10) / 12
    )
    assert found["Overall", "mean absolute error"]["clusters"] == 12
    assert len(list(csv.DictReader((report / names[0]).open()))) == len(found)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (["r", "one", "Charm", 8, 9], "no such metric"),
        (["r", "one", "Fluency", "eight", 9], "not scores"),
        (["r", "one", "Fluency", 11, 9], "not scores"),
        (["r", "one", "Fluency"], "not scores"),
    ],
)
def test_people_must_give_scores(tmp_path: Path, line: list[Any], what: str) -> None:
    with pytest.raises(MMRoleError, match=what) as caught:
        read_judge(str(write_people(tmp_path / "people.csv", [line])), tmp_path)
    assert "line 2" in str(caught.value)


@pytest.mark.parametrize("text", ["", "id,agent\nr,one\n", "id,agent,metric,score_agent,score_reference\n"])
def test_a_csv_without_scores_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "people.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MMRoleError):
        read_judge(str(path), tmp_path)


def test_judges_that_cannot_be_compared(tmp_path: Path) -> None:
    write_agent(tmp_path, "one", [made_row()])
    write_agent(tmp_path / "judges" / "other", "two", [made_row()])
    for second, what in (("absent", "no reviews here"), ("other", "no review in common"), ("./gone", "no such folder")):
        with pytest.raises(MMRoleError, match=what):
            main(["reward-model", second, "--eval_dir", str(tmp_path)])
    assert main(["reward-model", str(tmp_path / "judges" / ".." / "."), "--eval_dir", str(tmp_path)]) == 0


def write_judge(folder: Path, score: Callable[[int], tuple[int, int]], *, swapped: bool = False) -> None:
    rows = []
    for i in range(9):
        stored: dict[str, Any] = {"review": "?", "score": list(score(i))}
        stored |= {"swapped": True} if swapped else {}
        rows.append(made_row(i, records=dict.fromkeys(METRIC_NAMES, stored)) | {"role": f"c {i}"})
    write_agent(folder, "one", rows)


def test_the_report_shows_a_judge_with_itself(tmp_path: Path) -> None:
    """The first place is worth two points: the answer gets 9 to 8, and then the reference 9 to 6."""
    write_judge(tmp_path, lambda i: (9, 8))
    write_judge(tmp_path / "judges" / "reward-model-swapped", lambda i: (9, 6), swapped=True)
    write_judge(tmp_path / "judges" / "reward-model-repeat-2", lambda i: (9, 8) if i else (8, 8))
    assert report_main(["--eval_dir", str(tmp_path)]) == 0
    text = (tmp_path / "report" / "table.md").read_text(encoding="utf-8")
    table = re.sub(" +", " ", text.split("## The judge with the answers exchanged")[1])
    assert f"Of {6 * 9 * M} reviews" in table
    assert "| same winner | 0.000 [0.000, 0.000] |" in table and "| first place | 2.000 [2.000, 2.000] |" in table
    assert f"{(9 / 8 + 6 / 9) / 2:.3f}" in table.split("## Overall averaged over both orders")[1].split("##")[0]
    assert "| 0.889" in table.split("## The judge's repeated reviews")[1].split("##")[0]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["position"]["first_place"]["value"]["Overall"] == 2
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "The judge with the answers exchanged" in page


def test_published_tables_refuse_swapped_reviews(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_judge(tmp_path, lambda i: (9, 8), swapped=True)
    assert report_main(["--eval_dir", str(tmp_path), "--no_html"]) == 1
    assert "exchanged" in capsys.readouterr().err
    assert not list(tmp_path.glob("*_results/*/*.csv"))
