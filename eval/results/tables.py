"""The report of all agents: the paper's table, sample means with intervals, counts; as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import east_asian_width

import numpy as np

from eval.judging.metrics import METRIC_NAMES, METRICS
from eval.results.agents import FILES, SPLITS, AgentResult, ranked
from eval.results.reviews import FileResult, describe
from eval.results.statistics import LEVEL, Estimate, sample_means

COLUMNS = (*METRIC_NAMES, "Overall")
SHORT_COLUMNS = (*(metric.short for metric in METRICS), "Overall")
SETS: dict[str | None, str] = {None: "all", "in": "In-Test", "out": "Out-Test"}
PAPER = "paper (0.75 In + 0.25 Out)"
NOTHING = "–"


@dataclass(frozen=True)
class AgentReport:
    """One agent with everything the report says of it.

    Attributes:
        agent: Its files.
        paper: By split (None is both): (9,) the paper's number for the metrics and Overall; nan where it has none.
        samples: By split: the means over all reviewed samples, with intervals.
        counts: By split: rows, reviewed, without_answer, not_reviewed, failed_reviews, forgiving_reader, retried.
    """

    agent: AgentResult
    paper: dict[str | None, np.ndarray]
    samples: dict[str | None, Estimate]
    counts: dict[str | None, dict[str, int]]


def build_report(agents: list[AgentResult], *, seed: int = 0) -> list[AgentReport]:
    """Computes all numbers, best agent first.

    Args:
        agents: As read.
        seed: Of the bootstrap; the same one for each agent, so no agent's interval depends on the others.
    """
    return [
        AgentReport(
            agent,
            {split: agent.paper_scores(split) for split in SETS},
            {split: sample_means(agent.ratios(split), seed=seed) for split in SETS},
            {split: _counts(agent.results(split)) for split in SETS},
        )
        for agent in ranked(agents)
    ]


def _counts(results: Sequence[FileResult]) -> dict[str, int]:
    return {
        "rows": sum(result.rows for result in results),
        "reviewed": sum(result.reviewed for result in results),
        "without_answer": sum(len(result.empty) for result in results),
        "not_reviewed": sum(len(result.not_reviewed) for result in results),
        "failed_reviews": sum(len(result.failures) for result in results),
        "forgiving_reader": sum(result.forgiven for result in results),
        "retried": sum(result.retried for result in results),
    }


def terminal_table(reports: list[AgentReport]) -> str:
    """What is printed: the paper's table with short headings, then the sample means' Overall and the counts."""
    paper = [[report.agent.name, *map(_number, report.paper[None])] for report in reports]
    samples = [
        [
            report.agent.name,
            _interval(report.samples[None], -1),
            *(str(report.counts[None][key]) for key in ("rows", "reviewed", "without_answer", "failed_reviews")),
            _note(report),
        ]
        for report in reports
    ]
    heading = ["Agent", f"Overall [{LEVEL:.0%}]", "Rows", "Reviewed", "No answer", "Failed", "Note"]
    return (
        f"The paper's table (0.75 In-Test + 0.25 Out-Test):\n\n{_markdown(['Agent', *SHORT_COLUMNS], paper)}\n"
        f"Means over all reviewed samples:\n\n{_markdown(heading, samples)}"
    )


def markdown(reports: list[AgentReport]) -> str:
    """The whole report for people: `table.md`."""
    paper = [[report.agent.name, *map(_number, report.paper[None]), _note(report)] for report in reports]
    splits = [
        [report.agent.name, SETS[split], *map(_number, report.paper[split])] for split in SPLITS for report in reports
    ]
    samples = [
        [report.agent.name, SETS[split], *(_interval(report.samples[split], i) for i in range(len(COLUMNS)))]
        for split in SETS
        for report in reports
    ]
    counts = [
        [report.agent.name, SETS[split], *map(str, report.counts[split].values())]
        for split in SETS
        for report in reports
    ]
    count_names = [name.replace("_", " ").capitalize() for name in _counts([])]
    return "\n".join(
        [
            "# MMRole-Eval results\n",
            "Each number is a mean of (score of the agent / score of the ground truth).\n",
            "## The paper's table\n",
            "Per test set the plain mean of its three files; then 0.75 In-Test + 0.25 Out-Test.\n",
            _markdown(["Agent", *COLUMNS, "Note"], paper),
            "## In-Test and Out-Test\n",
            _markdown(["Agent", "Set", *COLUMNS], splits),
            "## Sample means\n",
            f"Over all reviewed samples, with {LEVEL:.0%} bootstrap percentile intervals. Not the paper's number.\n",
            _markdown(["Agent", "Set", *COLUMNS], samples),
            "## Counts\n",
            "A failed review is one of a row's eight; means leave it out.\n",
            _markdown(["Agent", "Set", *count_names], counts),
            "## What was counted in each file\n",
            *_file_notes(reports),
        ]
    )


def table_csv(reports: list[AgentReport]) -> str:
    """The report for programs and spreadsheets: one line per agent, set and statistic."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["agent", "folder", "set", "statistic", *COLUMNS, *_counts([]), "status"])
    for report in reports:
        for split, set_name in SETS.items():
            low, high = f"sample mean, {LEVEL:.0%} interval low", f"sample mean, {LEVEL:.0%} interval high"
            estimate = report.samples[split]
            statistics = {
                PAPER if split is None else "paper (mean of three files)": report.paper[split],
                "sample mean": estimate.mean,
                low: estimate.low,
                high: estimate.high,
            }
            about = [report.agent.name, report.agent.folder, set_name]
            counts, status = report.counts[split].values(), report.agent.status
            writer.writerows(
                [*about, name, *(f"{value:.3f}" for value in values), *counts, status]
                for name, values in statistics.items()
            )
    return text.getvalue()


def report_json(reports: list[AgentReport], settings: dict[str, Any]) -> str:
    """Everything, unrounded, with each failed review; a number that does not exist is null."""
    agents = [
        {
            "name": report.agent.name,
            "folder": report.agent.folder,
            "complete": report.agent.complete,
            "status": report.agent.status,
            "paper": {SETS[split]: _named(values) for split, values in report.paper.items()},
            "sample_means": {
                SETS[split]: {key: _named(getattr(estimate, key)) for key in ("mean", "low", "high")}
                for split, estimate in report.samples.items()
            },
            "counts": {SETS[split]: counts for split, counts in report.counts.items()},
            "files": {f"{split}-test/{kind}": _file(report.agent.files.get((split, kind))) for split, kind in FILES},
            "problems": [str(problem) for problem in report.agent.problems],
        }
        for report in reports
    ]
    # ASCII-escaped: ids and folder names may hold what no UTF-8 file can.
    return json.dumps({"settings": settings, "agents": agents}, indent=2, allow_nan=False) + "\n"


def _file(result: FileResult | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {
        "rows": result.rows,
        "count": result.reviewed,
        "means": _named(result.means),
        "without_answer": result.empty,
        "not_reviewed": result.not_reviewed,
        "failures": [vars(failure) for failure in result.failures],
        "forgiving_reader": result.forgiven,
        "retried": result.retried,
    }


def _named(values: np.ndarray) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in zip(COLUMNS, values.tolist(), strict=False)}


def _file_notes(reports: list[AgentReport]) -> Iterable[str]:
    for report in reports:
        yield f"\n**{_cell(report.agent.name)}** ({report.agent.status})\n"
        for (split, kind), result in report.agent.files.items():
            first, *rest = describe(result)
            yield f"- {split}-test/{kind}: {first}"
            yield from (f"  - {line}" for line in rest)
    yield ""


def _note(report: AgentReport) -> str:
    """What a reader of the table must know: incomplete, other rows than the published ones, failures."""
    notes = [] if report.agent.status == "complete" else [report.agent.status]
    failed = report.counts[None]["failed_reviews"]
    return "; ".join([*notes, f"failed reviews: {failed}"] if failed else notes)


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.3f}"


def _interval(estimate: Estimate, i: int) -> str:
    if math.isnan(estimate.mean[i]):
        return NOTHING
    return f"{estimate.mean[i]:.3f} [{estimate.low[i]:.3f}, {estimate.high[i]:.3f}]"


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also aligned as plain text: names to the left, numbers to the right."""
    cells = [[_cell(text) for text in row] for row in (heading, *rows)]
    widths = [max(3, *map(_width, column)) for column in zip(*cells, strict=True)]
    left = [name in ("Agent", "Set", "Note") for name in heading]

    def line(row: Sequence[str]) -> str:
        padding = [" " * (width - _width(text)) for text, width in zip(row, widths, strict=True)]
        padded = [text + pad if is_left else pad + text for text, pad, is_left in zip(row, padding, left, strict=True)]
        return f"| {' | '.join(padded)} |\n"

    rule = ["-" * width if is_left else "-" * (width - 1) + ":" for width, is_left in zip(widths, left, strict=True)]
    return line(cells[0]) + f"| {' | '.join(rule)} |\n" + "".join(map(line, cells[1:]))


def _width(text: str) -> int:
    """Columns on a terminal: wide East Asian characters take two."""
    return sum(2 if east_asian_width(c) in "WF" else 1 for c in text)
