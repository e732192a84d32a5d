"""The report as Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_utils.journal import Journal
from eval.judging.metrics import METRIC_NAMES, METRICS
from eval.results.origins import origins
from eval.results.report import MEAN_RATIO, build_report
from eval.results.reviews import read_agents
from eval.results.statistics import METRIC_COLUMNS
from eval.results.tables import markdown, records_csv, report_json, statistics_csv, table_csv, terminal_table
from tests.eval.made_reviews import link_published, made_row, record, review_path, write_agent, write_rows


def csv_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def paper_cells(markdown_text: str) -> dict[str, list[str]]:
    """The paper's table of a report: name -> cells."""
    section = markdown_text.split("## The paper's table")[1].split("## In-Test")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_published_agents_give_the_papers_table(shared: Path, tmp_path: Path) -> None:
    table = json.loads((shared / "golden" / "paper_table_5.json").read_text(encoding="utf-8"))
    reports = build_report(read_agents(link_published(shared, tmp_path / "eval")))
    paper = {row["name"]: [row[column] for column in table["columns"]] for row in table["rows"]}
    cells = paper_cells(markdown(reports))
    assert cells.pop("Agent") == [*table["columns"], "Note"]
    names = [name for name in cells if not set(name) <= set("-")]
    assert len(names) == 8 and all(cells[name] == [*paper[name], ""] for name in names)
    assert names == sorted(names, key=lambda name: paper[name][-1], reverse=True)
    rows = csv_rows(table_csv(reports))
    assert len(rows) == 8 * 3 * 4
    in_test = next(row for row in rows if (row["folder"], row["set"]) == ("mmrole-agent", "In-Test"))
    assert [in_test[column] for column in METRIC_COLUMNS] == paper["MMRole-Agent (In-Test)"]


def write_two(eval_dir: Path) -> None:
    write_agent(eval_dir, "whole", [made_row(0, (9, 10)), made_row(1, (7, 10)), made_row(2, answer="")])
    write_agent(eval_dir, "part", [made_row(0, (3, 10)), made_row(1, (4, 10))], skip=[("out", "inter-role")])


def test_incomplete_agent_is_marked_and_has_only_sample_means(tmp_path: Path) -> None:
    write_two(tmp_path)
    reports = build_report(read_agents(tmp_path))
    cells = paper_cells(markdown(reports))
    assert cells["whole"][:9] == ["0.800"] * 9
    assert cells["part"][:9] == ["–"] * 9 and cells["part"][9].startswith("incomplete: no readable out-test/inter-role")
    rows = {(row["folder"], row["set"], row["statistic"]): row for row in csv_rows(table_csv(reports))}
    assert {rows["part", "all", "paper (0.75 In + 0.25 Out)"][column] for column in METRIC_COLUMNS} == {"nan"}
    assert rows["part", "In-Test", "paper (mean of three files)"]["Overall"] == "0.350"
    assert rows["part", "Out-Test", "paper (mean of three files)"]["Overall"] == "nan"
    assert rows["part", "all", "sample mean"]["Overall"] == "0.350"
    assert rows["part", "all", "sample mean"]["status"].startswith("incomplete")
    assert "incomplete: no readable out-test/inter-role" in terminal_table(reports)


def test_counts(tmp_path: Path) -> None:
    write_two(tmp_path)
    broken = made_row(0, (9, 10), records={"Fluency": {}, "Coherency": {**record((9, 10)), "read_by": "forgiving"}})
    write_rows(review_path(tmp_path, "whole", "in", "comment"), [broken, made_row(1, (7, 10), answer="")])
    rows = {(row["folder"], row["set"]): row for row in csv_rows(table_csv(build_report(read_agents(tmp_path))))}
    counts = ("rows", "reviewed", "without_answer", "not_reviewed", "failed_reviews", "forgiving_reader", "retried")
    assert [rows["whole", "all"][name] for name in counts] == ["17", "11", "6", "0", "1", "1", "0"]
    assert [rows["whole", "In-Test"][name] for name in counts] == ["8", "5", "3", "0", "1", "1", "0"]
    assert [rows["part", "Out-Test"][name] for name in counts] == ["4", "4", "0", "0", "0", "0", "0"]


def test_json_has_everything_and_no_nan(tmp_path: Path) -> None:
    write_two(tmp_path)
    write_rows(
        review_path(tmp_path, "whole", "in", "comment"), [made_row(7, (1, 3), records={"Fluency": record((1, 0))})]
    )

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    text = report_json(build_report(read_agents(tmp_path)), {"seed": 0})
    report = json.loads(text, parse_constant=refuse)
    agents = {agent["folder"]: agent for agent in report["agents"]}
    comment = agents["whole"]["files"]["in-test/comment"]
    assert comment["means"] == {name: None if name == "Fluency" else 1 / 3 for name in METRIC_NAMES}
    assert comment["failures"] == [
        {"id": "row_7", "metric": "Fluency", "reason": "model B scored 0, so the ratio is undefined"}
    ]
    assert agents["part"]["files"]["out-test/inter-role"] is None
    assert set(agents["part"]["paper"]["all"].values()) == {None}
    assert set(agents["part"]["sample_means"]["all"]) == {"mean", "low", "high", "design_effect"}
    assert report["settings"] == {"seed": 0}


def test_an_agents_interval_does_not_depend_on_the_others(tmp_path: Path) -> None:
    write_characters(tmp_path, {"whole": lambda i: 7 + i % 3, "other": lambda i: 5})
    agents = read_agents(tmp_path)
    alone = build_report([agent for agent in agents if agent.folder == "whole"])
    assert alone.samples("whole").low.tolist() == build_report(agents).samples("whole").low.tolist()
    assert np.isfinite(alone.samples("whole").low).all()


def write_characters(eval_dir: Path, scores: dict[str, Callable[[int], float]], characters: int = 9) -> None:
    """Agents with a row in each file for each of some characters, scored by its number."""
    for agent, score in scores.items():
        rows = [made_row(i, (score(i), 10)) | {"role": f"character {i}"} for i in range(characters)]
        write_agent(eval_dir, agent, rows)


def test_few_characters_give_points_and_no_interval(tmp_path: Path) -> None:
    write_characters(tmp_path, {"few": lambda i: 7 + i % 3}, characters=7)
    estimate = build_report(read_agents(tmp_path)).samples("few")
    assert np.isfinite(estimate.value).all() and np.isnan([estimate.low, estimate.high]).all()
    assert (estimate.clusters == 7).all() and (estimate.rows == 42).all()


def test_agents_are_compared_on_the_rows_that_both_have(tmp_path: Path) -> None:
    write_characters(tmp_path, {"good": lambda i: 9 - 0.1 * (i % 3), "bad": lambda i: 6 - 0.1 * (i % 2)})
    path = review_path(tmp_path, "bad", "in", "comment")
    write_rows(path, json.loads(path.read_text(encoding="utf-8"))[:4])
    report = build_report(read_agents(tmp_path))
    found = {c.split: c for c in report.comparisons if c.column == "Overall"}
    assert [found[None].rows, found["in"].rows, found["out"].rows] == [49, 22, 27]
    assert (found[None].first, found[None].second, found[None].clusters) == ("good", "bad", 9)
    assert found["out"].difference == pytest.approx(0.9 - 0.01 * 1 - (0.6 - 0.01 * 4 / 9))
    assert found[None].low < found[None].difference < found[None].high and found[None].apart
    assert "Overall differs for 1 of 1 pairs" in terminal_table(report)
    smallest = [s for s in report.smallest if (s.split, s.column) == (None, "Overall")]
    assert 0 < smallest[0].one_comparison < 0.1 and smallest[0].all_comparisons == smallest[0].one_comparison


def test_agents_that_cannot_be_told_apart_are_named(tmp_path: Path) -> None:
    write_characters(tmp_path, {"one": lambda i: 8 + i % 2, "two": lambda i: 8 + (i + 1) % 2, "far": lambda i: 2})
    text = markdown(build_report(read_agents(tmp_path)))
    assert "Cannot be told apart: two and one" in text or "Cannot be told apart: one and two" in text
    assert "**-0." in text


def test_groups_of_every_kind_have_their_means(tmp_path: Path) -> None:
    write_characters(tmp_path, {"made": lambda i: 9 if i == 0 else 8})
    report = build_report(read_agents(tmp_path))
    rows = csv_rows(statistics_csv(report))
    means = {
        (r["by"], r["group"]): float(r["value"])
        for r in rows
        if r["column"] == "Overall" and r["statistic"] == MEAN_RATIO
    }
    expected = {("character", "character 0"): 0.9, ("character", "character 1"): 0.8, ("kind", "comment"): 7.3 / 9}
    expected |= {("split", "in"): 7.3 / 9, ("category", "other"): 7.3 / 9, ("language", "English"): 7.3 / 9}
    assert {key: means[key] for key in expected} == pytest.approx(expected)
    columns = {r["column"] for r in rows}
    assert columns == {*METRIC_NAMES, *(metric.dimension for metric in METRICS), "Overall"}
    lines = csv_rows(records_csv(report))
    assert len(lines) == 6 * 9 * len(METRIC_NAMES)
    assert {lines[0][name] for name in ("character", "ratio", "status")} == {"character 0", "0.9", "read"}


def test_text_is_the_same_each_time(tmp_path: Path) -> None:
    write_two(tmp_path)
    first, again = (build_report(read_agents(tmp_path), seed=5) for _ in range(2))
    for render in (markdown, table_csv, terminal_table, lambda reports: report_json(reports, {})):
        assert render(first) == render(again)


def test_odd_names_keep_the_table_whole(tmp_path: Path) -> None:
    for folder in ("a|b", "孙悟空", "back\\slash", "two\nlines"):
        write_agent(tmp_path, folder, [made_row()])
    text = markdown(build_report(read_agents(tmp_path)))
    section = text.split("## The paper's table")[1].split("## In-Test")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert {line.replace("\\|", "").count("|") for line in lines} == {12}
    assert any("a\\|b" in line for line in lines) and any("孙悟空" in line for line in lines)


def test_what_the_journals_say_is_shown(tmp_path: Path) -> None:
    write_agent(tmp_path, "made", [made_row()])
    write_agent(tmp_path, "elsewhere", [made_row()])
    info = {"names": {"model": "/weights/Judge"}, "versions": {"torch": "2.13"}}
    entries = [{"text": "x", "cut": True}, {"text": "", "refusal": "no"}, {"text": "y"}]
    with Journal.open(
        review_path(tmp_path, "made", "in", "comment").with_suffix(".journal"), {"seed": 3}, info
    ) as file:
        for number, entry in enumerate(entries):
            file.add(f"{number}", entry)
    review_path(tmp_path, "made", "out", "comment").with_suffix(".journal").write_text("broken")
    agents = read_agents(tmp_path)
    text = markdown(build_report(agents, origins=origins(tmp_path, agents)))
    (line,) = [line for line in text.split("## How they were made")[1].splitlines() if line.startswith("| made")]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "made",
        "reviews",
        "1",
        "1",
        "3",
        "/weights/Judge",
        "2.13",
    ]
    assert "How they were made" not in markdown(build_report(agents))
