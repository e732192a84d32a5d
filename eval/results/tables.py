"""The report's tables, and all of its numbers as Markdown, CSV and JSON."""

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

from data_utils.layout import SHORT_SPLITS
from eval.judging.metrics import METRICS
from eval.results.judges import Agreement, PositionBias
from eval.results.report import (
    MEAN_RATIO,
    RATIO_OF_MEANS,
    SETS,
    AgentReport,
    Comparison,
    Report,
    counts,
    indistinguishable_pairs,
)
from eval.results.reviews import FILES, NO_ANSWER, NOT_REVIEWED, Record, ReviewFile, describe
from eval.results.statistics import (
    COLUMNS,
    DIMENSIONS,
    FEWEST_CLUSTERS,
    LEVEL,
    METRIC_COLUMNS,
    OVERALL,
    POWER,
    Estimate,
)

SHORT_COLUMNS = (*(metric.short for metric in METRICS), OVERALL)
NOTHING = "–"
_LEFT = ("Agent", "Set", "Note", "Group", "Comparisons", "Statistic", "Made")
_PLACES = [COLUMNS.index(column) for column in METRIC_COLUMNS]
_COUNTS = tuple(counts([]))


class Strong(str):
    """A cell in bold."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        title: Its heading.
        note: The meaning of its numbers, in a sentence or two.
        heading: Names of the columns; those in `_LEFT` hold text, the others numbers.
        rows: The cells.
        detail: Whether the page shows it only on demand.
    """

    title: str
    note: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    detail: bool = False

    def is_text(self, column: int) -> bool:
        """Return whether a column holds text."""
        return self.heading[column] in _LEFT


def tables(report: Report) -> list[Table]:
    """Return all tables, in the order of the report."""
    agents = report.agents
    return [
        Table(
            "The paper's table",
            "Per test set the plain mean of its three files; then 0.75 In-Test + 0.25 Out-Test.",
            ["Agent", *METRIC_COLUMNS, "Note"],
            [[one.agent.name, *map(number, one.paper[None]), note(one)] for one in agents],
        ),
        Table(
            "In-Test and Out-Test",
            "",
            ["Agent", "Set", *METRIC_COLUMNS],
            [[one.agent.name, SETS[split], *map(number, one.paper[split])] for split in SHORT_SPLITS for one in agents],
            detail=True,
        ),
        *(_sample_means(report, split) for split in SETS),
        *(_matrix(report, split) for split in SETS),
        Table(
            "Counts",
            "A failed review concerns one metric; means leave it out.",
            ["Agent", "Set", *(name.replace("_", " ").capitalize() for name in _COUNTS)],
            [[one.agent.name, SETS[split], *map(str, one.counts[split].values())] for split in SETS for one in agents],
            detail=not any(one.counts[None]["failed_reviews"] for one in agents),
        ),
        Table(
            "Other estimates of Overall",
            "Ratio of means: mean score of the agent over mean score of the reference, per metric, then averaged; a "
            "single low score of the reference cannot dominate it. Design effect: variance of the sample mean over "
            "that of as many independent rows. Length: slope of the log ratio on the log of (answer's length / "
            "reference's length), and the geometric mean ratio before and after adjusting to equal lengths; rows "
            "with a score of 0 have no logarithm.",
            [
                *("Agent", "Mean ratio", "Design effect", "Ratio of means"),
                *("Length slope", "Geometric", "Adjusted", "Left out"),
            ],
            [_others(report, one) for one in agents],
        ),
        Table(
            "What this test set can show",
            f"Smallest true difference between two agents that the test shows with {POWER:.0%} power, for the median "
            "pair: alone, and as the hardest of all pairs.",
            ["Set", "Comparisons", *METRIC_COLUMNS],
            [
                [SETS[split], name, *(number(values.get(column, math.nan)) for column in METRIC_COLUMNS)]
                for split in SETS
                for name, values in (
                    ("one", {s.column: s.one_comparison for s in report.smallest if s.split == split}),
                    ("all pairs", {s.column: s.all_comparisons for s in report.smallest if s.split == split}),
                )
            ],
        ),
        Table(
            "Dimensions",
            f"Means of the metrics of a dimension, with {LEVEL:.0%} intervals clustered by character.",
            ["Agent", "Set", *DIMENSIONS],
            [
                [one.agent.name, SETS[split], *_intervals(report.samples(one.agent.folder, split), DIMENSIONS)]
                for split in SETS
                for one in agents
            ],
            detail=True,
        ),
        *(_by(report, by) for by in ("kind", "category", "language", "character")),
        *_judge_tables(report),
        *_origins(report),
    ]


def _origins(report: Report) -> list[Table]:
    names = {one.agent.folder: one.agent.name for one in report.agents}
    settings = list(dict.fromkeys(name for origin in report.origins for name in origin.settings))
    rows = [
        [
            names[origin.agent],
            origin.made,
            str(origin.refused),
            str(origin.cut),
            *(", ".join(sorted(origin.settings.get(name, {NOTHING}))) for name in settings),
        ]
        for origin in report.origins
    ]
    note = "From the journals beside the files; published files have none."
    return [Table("How they were made", note, ["Agent", "Made", "Refused", "Cut off", *settings], rows)] if rows else []


def _judge_tables(report: Report) -> list[Table]:
    """Return what exchanging the answers and repeating the reviews show about the judge."""
    found = []
    names = {one.agent.folder: one for one in report.agents}
    bias = report.position_bias
    if bias is not None:
        found.append(
            Table(
                "The judge with the answers exchanged",
                f"Of {bias.reviews} reviews in both orders: the share with the same winner, or a tie, and "
                "the advantage of the first place in score points (above 0: the first answer is preferred).",
                ["Set", *METRIC_COLUMNS],
                [
                    ["same winner", *_intervals(bias.consistency)],
                    ["first place", *_intervals(bias.preference)],
                ],
            )
        )
        found.append(
            Table(
                "Overall averaged over both orders",
                "Next to the published number and the sample mean of the usual order.",
                ["Agent", "Paper", "Sample mean", "Both orders"],
                [
                    [
                        names[folder].agent.name,
                        number(names[folder].paper[None][-1]),
                        *_intervals(report.samples(folder), [OVERALL]),
                        *_intervals(estimate, [OVERALL]),
                    ]
                    for folder, estimate in bias.averaged.items()
                    if folder in names
                ],
            )
        )
    if report.spread:
        found.append(
            Table(
                "The judge's repeated reviews",
                "Standard deviations over the repetitions: of a single review's ratio, of a row's Overall, and of the "
                "agent's Overall; and the share of reviews with the same scores each time.",
                ["Agent", "Review", "Row", "Overall", "Same scores"],
                [
                    [names[s.agent].agent.name, *map(number, (s.review, s.row, s.mean, s.same))]
                    for s in report.spread
                    if s.agent in names
                ],
            )
        )
    return found


def agreement_tables(found: Sequence[Agreement]) -> list[Table]:
    """Return the agreement of two judges: Overall with intervals, and all metrics."""
    names = list(dict.fromkeys(one.statistic for one in found))
    columns = list(dict.fromkeys(one.column for one in found))
    values = {(one.column, one.statistic): one for one in found}
    return [
        Table(
            "Overall",
            f"A row's mean ratio by one judge against that by the other, with {LEVEL:.0%} intervals clustered by "
            f"character (none below {FEWEST_CLUSTERS} characters).",
            ["Statistic", "Value", "Interval"],
            [
                [name, number(one.value), NOTHING if math.isnan(one.low) else f"[{one.low:.3f}, {one.high:.3f}]"]
                for name in names
                if (one := values.get((OVERALL, name)))
            ],
        ),
        Table(
            "By metric",
            "The interval of each value is in the CSV file.",
            ["Statistic", *columns],
            [[name, *(number(values[column, name].value) for column in columns)] for name in names],
        ),
    ]


def agreement_csv(found: Sequence[Agreement]) -> str:
    """Return one line per column and statistic, unrounded."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Agreement._fields)
    writer.writerows(found)
    return text.getvalue()


def _sample_means(report: Report, split: str | None) -> Table:
    return Table(
        f"Sample means: {SETS[split]}",
        f"Over all reviewed samples, with {LEVEL:.0%} intervals clustered by character: rows of one character are not "
        f"independent. Below {FEWEST_CLUSTERS} characters no interval is given. Not the paper's number.",
        ["Agent", *METRIC_COLUMNS],
        [[one.agent.name, *_intervals(report.samples(one.agent.folder, split))] for one in report.agents],
        detail=split is not None,
    )


def _by(report: Report, by: str) -> Table:
    """Return the Overall of each agent by the groups of one field; one column per agent, so that many groups fit."""
    values = dict.fromkeys(group.value for _, group in report.estimates if group.by == by)
    found = {
        (group.value, group.agent): e
        for (name, group), e in report.estimates.items()
        if (name, group.by) == (MEAN_RATIO, by)
    }
    return Table(
        f"Overall by {by}",
        f"Sample means, with {LEVEL:.0%} intervals where there are {FEWEST_CLUSTERS} characters or more.",
        ["Group", *(one.agent.name for one in report.agents)],
        [
            [
                value,
                *(
                    _intervals(found[value, one.agent.folder], [OVERALL])[0]
                    if (value, one.agent.folder) in found
                    else NOTHING
                    for one in report.agents
                ),
            ]
            for value in values
        ],
        detail=True,
    )


def _matrix(report: Report, split: str | None) -> Table:
    """Return the differences of all pairs of agents on one set."""
    found = {(c.first, c.second): c for c in report.comparisons if (c.split, c.column) == (split, OVERALL)}
    rows = []
    for i, first in enumerate(report.agents, 1):
        cells = [f"{i} {first.agent.name}"]
        for second in report.agents:
            pair = (first.agent.folder, second.agent.folder)
            sign = 1 if pair in found else -1
            comparison = found.get(pair) or found.get(pair[::-1])
            cells.append(NOTHING if comparison is None else _compared(comparison, sign))
        rows.append(cells)
    return Table(
        f"Who can be told apart: {SETS[split]}",
        "Difference in Overall on the rows that both agents have: the row's agent minus the column's. Bold: told apart "
        "at 5 %, by flipping the signs of characters, with Holm's procedure over all pairs. "
        f"{apart_line(report, split)}",
        ["Agent", *(f"{i}" for i in range(1, len(report.agents) + 1))],
        rows,
        detail=split is not None,
    )


def _compared(comparison: Comparison, sign: int) -> str:
    if math.isnan(comparison.difference):
        return NOTHING
    text = f"{sign * comparison.difference:+.3f}"
    return Strong(text) if comparison.apart else text


def _others(report: Report, one: AgentReport) -> list[str]:
    folder, last = one.agent.folder, COLUMNS.index(OVERALL)
    ratio = report.samples(folder)
    effect = ratio.design_effect[last]
    return [
        one.agent.name,
        _intervals(ratio, [OVERALL])[0],
        NOTHING if math.isnan(effect) else f"{effect:.2f}",
        _intervals(report.samples(folder, statistic=RATIO_OF_MEANS), [OVERALL])[0],
        *(_interval(one.length, i) for i in range(3)),
        str(one.length_left_out),
    ]


def markdown(report: Report) -> str:
    """Return the complete report as Markdown: `table.md`."""
    parts = [f"# MMRole-Eval results, judge: {report.judge}\n"]
    parts += ["Each number is a mean of (score of the agent / score of the ground truth).\n"]
    for table in tables(report):
        parts += [f"## {table.title}\n", *([f"{table.note}\n"] if table.note else []), markdown_table(table)]
    return "\n".join([*parts, "## What was counted in each file\n", *_file_notes(report.agents)])


def terminal_table(report: Report) -> str:
    """Return the printed summary: the paper's table with short headings, sample means, counts and differences."""
    agents = report.agents
    paper = [[one.agent.name, *map(number, one.paper[None])] for one in agents]
    shown = ("rows", "reviewed", "without_answer", "failed_reviews")
    samples = [
        [
            one.agent.name,
            _intervals(report.samples(one.agent.folder), [OVERALL])[0],
            *(str(one.counts[None][key]) for key in shown),
            note(one),
        ]
        for one in agents
    ]
    heading = [f"Overall [{LEVEL:.0%}]", "Rows", "Reviewed", "No answer", "Failed", "Note"]
    return (
        f"The paper's table (0.75 In-Test + 0.25 Out-Test), judge {report.judge}:\n\n"
        f"{markdown_table(Table('', '', ['Agent', *SHORT_COLUMNS], paper))}\n"
        "Means over all reviewed samples, intervals clustered by character:\n\n"
        f"{markdown_table(Table('', '', ['Agent', *heading], samples))}"
        + "".join(f"\n{line}" for line in (apart_line(report, split, most=3) for split in SETS) if line)
    )


def apart_line(report: Report, split: str | None = None, *, most: int | None = None) -> str:
    """Say how many pairs of agents can be told apart, and which (`most` of them) cannot; empty for a single agent."""
    alike, pairs = indistinguishable_pairs(report, split)
    names = {one.agent.folder: one.agent.name for one in report.agents}
    if not pairs:
        return ""
    which = "; ".join(f"{names[c.first]} and {names[c.second]}" for c in alike[:most])
    which += f"; {len(alike) - most} more (see table.md)" if most is not None and len(alike) > most else ""
    not_apart = f" Cannot be told apart: {which}." if alike else ""
    return f"{SETS[split]}: Overall differs for {pairs - len(alike)} of {pairs} pairs of agents (5 %, Holm).{not_apart}"


def table_csv(report: Report) -> str:
    """Return the report for spreadsheets: one line per agent, set and statistic."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["agent", "folder", "set", "statistic", *METRIC_COLUMNS, *_COUNTS, "status", "judge"])
    for one in report.agents:
        for split, set_name in SETS.items():
            low, high = f"sample mean, {LEVEL:.0%} interval low", f"sample mean, {LEVEL:.0%} interval high"
            estimate = report.samples(one.agent.folder, split)
            statistics = {
                "paper (0.75 In + 0.25 Out)" if split is None else "paper (mean of three files)": one.paper[split],
                "sample mean": estimate.value[_PLACES],
                low: estimate.low[_PLACES],
                high: estimate.high[_PLACES],
            }
            about, rest = [one.agent.name, one.agent.folder, set_name], [one.agent.status, report.judge]
            writer.writerows(
                [*about, name, *(f"{value:.3f}" for value in values), *one.counts[split].values(), *rest]
                for name, values in statistics.items()
            )
    return text.getvalue()


def statistics_csv(report: Report) -> str:
    """Return every estimate, unrounded: one line per agent, statistic, group and column."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    names = ("value", "error", "low", "high", "rows", "clusters", "design_effect")
    writer.writerow(["agent", "statistic", "by", "group", "column", *names])
    for (statistic, group), estimate in report.estimates.items():
        arrays = [getattr(estimate, name).tolist() for name in names]
        writer.writerows(
            [group.agent, statistic, group.by, group.value, column, *values]
            for column, *values in zip(COLUMNS, *arrays, strict=True)
        )
    return text.getvalue()


def records_csv(report: Report) -> str:
    """Return the long-form table: one line per judge, agent, row and metric."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Record._fields)
    for one in report.agents:
        writer.writerows(one.agent.records())
    return text.getvalue()


def report_json(report: Report, settings: dict[str, Any]) -> str:
    """Return everything but the groups, unrounded, with each failed review; undefined numbers are null."""
    agents = [
        {
            "name": one.agent.name,
            "folder": one.agent.folder,
            "complete": one.agent.complete,
            "status": one.agent.status,
            "paper": {SETS[split]: _named(values) for split, values in one.paper.items()},
            "sample_means": {
                SETS[split]: {
                    key: _named(getattr(report.samples(one.agent.folder, split), field)[_PLACES])
                    for key, field in _FIELDS.items()
                }
                for split in SETS
            },
            "length": {
                name: {key: _finite(getattr(one.length, key)[i]) for key in ("value", "low", "high")}
                for i, name in enumerate(("slope", "geometric_mean_ratio", "adjusted"))
            }
            | {"left_out": one.length_left_out},
            "counts": {SETS[split]: counted for split, counted in one.counts.items()},
            "files": {f"{split}-test/{kind}": _file(one.agent.files.get((split, kind))) for split, kind in FILES},
            "problems": [str(problem) for problem in one.agent.problems],
        }
        for one in report.agents
    ]
    content = {
        "settings": settings,
        "agents": agents,
        "comparisons": [
            _plain(comparison._asdict() | {"apart": comparison.apart}) for comparison in report.comparisons
        ],
        "position": _position_bias(report.position_bias),
        "spread": [one._asdict() for one in report.spread],
        "smallest_differences": [_plain(smallest._asdict()) for smallest in report.smallest],
    }
    # ASCII-escaped: ids and folder names may contain surrogates, which UTF-8 cannot encode.
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


_FIELDS = {"mean": "value", "low": "low", "high": "high", "design_effect": "design_effect"}


def _position_bias(bias: PositionBias | None) -> dict[str, Any] | None:
    if bias is None:
        return None
    estimates = {"same_winner": bias.consistency, "first_place": bias.preference}
    return {
        "reviews": bias.reviews,
        **{
            name: {key: _named(getattr(one, key)[_PLACES]) for key in ("value", "low", "high")}
            for name, one in estimates.items()
        },
        "both_orders": {folder: _named(one.value[_PLACES]) for folder, one in bias.averaged.items()},
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    values = {key: _finite(value) if isinstance(value, float) else value for key, value in values.items()}
    return values | {"split": SETS[values["split"]]}


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _file(file: ReviewFile | None) -> dict[str, Any] | None:
    if file is None:
        return None
    counted = counts(file.records)
    return {
        "rows": counted["rows"],
        "count": counted["reviewed"],
        "means": _named(file.means),
        "without_answer": file.ids(NO_ANSWER),
        "not_reviewed": file.ids(NOT_REVIEWED),
        "failures": [{"id": record.row, "metric": record.metric, "reason": record.reason} for record in file.failures],
        "forgiving_reader": counted["forgiving_reader"],
        "retried": counted["retried"],
    }


def _named(values: np.ndarray) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in zip(METRIC_COLUMNS, values.tolist(), strict=False)}


def _file_notes(agents: list[AgentReport]) -> Iterable[str]:
    for one in agents:
        yield f"\n**{_cell(one.agent.name)}** ({one.agent.status})\n"
        for (split, kind), file in one.agent.files.items():
            first, *rest = describe(file)
            yield f"- {split}-test/{kind}: {first}"
            yield from (f"  - {line}" for line in rest)
    yield ""


def note(one: AgentReport) -> str:
    """Return what qualifies an agent's numbers: incomplete files, other rows than the published ones, failures."""
    notes = [] if one.agent.status == "complete" else [one.agent.status]
    failed = one.counts[None]["failed_reviews"]
    return "; ".join([*notes, f"failed reviews: {failed}"] if failed else notes)


def number(value: float) -> str:
    """Return a number with three decimals, or a dash."""
    return NOTHING if math.isnan(value) else f"{value:.3f}"


def _intervals(estimate: Estimate, columns: Sequence[str] = METRIC_COLUMNS) -> list[str]:
    return [_interval(estimate, COLUMNS.index(column)) for column in columns]


def _interval(estimate: Estimate, i: int) -> str:
    if math.isnan(estimate.low[i]):
        return number(estimate.value[i])
    return f"{estimate.value[i]:.3f} [{estimate.low[i]:.3f}, {estimate.high[i]:.3f}]"


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def markdown_table(table: Table) -> str:
    """Return a Markdown table that is also aligned as plain text: names to the left, numbers to the right."""
    cells = [
        [f"**{_cell(text)}**" if isinstance(text, Strong) else _cell(text) for text in row]
        for row in (table.heading, *table.rows)
    ]
    widths = [max(3, *map(_width, column)) for column in zip(*cells, strict=True)]
    left = [table.is_text(i) for i in range(len(table.heading))]

    def line(row: Sequence[str]) -> str:
        padding = [" " * (width - _width(text)) for text, width in zip(row, widths, strict=True)]
        padded = [text + pad if is_left else pad + text for text, pad, is_left in zip(row, padding, left, strict=True)]
        return f"| {' | '.join(padded)} |\n"

    rule = ["-" * width if is_left else "-" * (width - 1) + ":" for width, is_left in zip(widths, left, strict=True)]
    return line(cells[0]) + f"| {' | '.join(rule)} |\n" + "".join(map(line, cells[1:]))


def _width(text: str) -> int:
    """Return the width on a terminal: wide East Asian characters take two columns."""
    return sum(2 if east_asian_width(c) in "WF" else 1 for c in text)
