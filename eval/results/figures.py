"""The figures: the radar chart of all agents (like the paper's figure) as a PNG, and those of the page as SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.projections.polar import PolarAxes
from matplotlib.text import Text

from data_utils.layout import KINDS
from eval.judging.metrics import METRIC_NAMES
from eval.results.judges import CommonReviews
from eval.results.report import ALL, MEAN_RATIO, SETS, AgentReport, Group, Report
from eval.results.statistics import COLUMNS, LEVEL, OVERALL

WIDTH = 3.35  # inches, a paper's column
DIAMETER, LABEL_HEIGHT = 2.05, 0.27  # inches, of the circle and of the labels above and below it
DPI = 300
MOST = 10  # lines with their own colour, dash and marker; further agents are drawn in grey
# Okabe and Ito's palette, which people with any colour vision can tell apart, darkest contrasts first.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#333333",
    "#E69F00",
    "#56B4E9",
    "#8B6F00",
    "#7F3C8D",
    "#882255",
)
_DASHES = ("-", (0, (4, 1)), (0, (4, 1, 1, 1)))  # dots mark incomplete agents
_MARKERS = "osD^vPX*<>"
_CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "SimHei",
    "Arial Unicode MS",
)
_LONGEST_NAME = 26


@dataclass(frozen=True)
class Line:
    """One agent's line: its name, eight values (nan leaves a gap), and whether it is the paper's number."""

    name: str
    values: np.ndarray
    complete: bool = True


def radar_lines(report: Report) -> list[Line]:
    """Return the agents' lines; one without the paper's number is marked and drawn by its sample means."""
    return [
        Line(one.agent.name, one.paper[None][:-1], complete=True)
        if one.agent.complete
        else Line(one.agent.name, report.samples(one.agent.folder).value[: len(METRIC_NAMES)], complete=False)
        for one in report.agents
    ]


def radar_png(lines: Sequence[Line]) -> bytes:
    """Draws the chart.

    Args:
        lines: The agents, best first; those without any number are left out.

    Returns:
        A PNG, 3.35 inches wide at 300 dots per inch; empty if there is nothing to draw.
    """
    figure = _radar(lines)
    if figure is None:
        return b""
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _radar(lines: Sequence[Line]) -> Figure | None:
    drawn = [line for line in lines if not np.isnan(line.values).all()]
    if not drawn:
        return None
    shown, others = drawn[:MOST], drawn[MOST:]
    legend = 0.11 * math.ceil((len(shown) + bool(others)) / 2) + 0.06
    height = DIAMETER + 2 * LABEL_HEIGHT + legend
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    box = ((WIDTH - DIAMETER) / 2 / WIDTH, (legend + LABEL_HEIGHT) / height, DIAMETER / WIDTH, DIAMETER / height)
    axes = figure.add_axes(box, projection="polar")
    _draw_axes(axes, np.concatenate([line.values for line in drawn]))
    handles = [_draw_line(axes, line, i) for i, line in enumerate(shown)]
    for line in others:
        axes.plot(*_closed(line.values), color="#BBBBBB", linewidth=0.5, zorder=1)
    if others:
        handles.append(Line2D([], [], color="#BBBBBB", linewidth=0.8))
    names = [_label(line.name, rank, complete=line.complete) for rank, line in enumerate(shown, 1)]
    _draw_legend(figure, handles, [*names, f"{len(others)} more (see table.md)"] if others else names)
    return figure


def _draw_axes(axes: PolarAxes, values: np.ndarray) -> None:
    low, high, ticks = radial_range(values)
    angles = np.linspace(0, 2 * np.pi, len(METRIC_NAMES), endpoint=False)
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [""] * len(ticks))
    decimals = max(1, *(len(f"{tick:g}".partition(".")[2]) for tick in ticks))
    halo = [withStroke(linewidth=1.2, foreground="white")]
    for tick in ticks:  # above the lines, between the first two axes
        label = f"{tick:.{decimals}f}"
        axes.text(
            np.pi / 8, tick, label, fontsize=5, color="#444444", ha="center", va="center", zorder=5, path_effects=halo
        )
    axes.set_thetagrids(np.degrees(angles), [""] * len(angles))
    axes.grid(color="#D0D0D0", linewidth=0.4)
    axes.spines["polar"].set(color="#999999", linewidth=0.5)
    if low < 1 < high:  # 1 is as good as the ground truth
        circle = np.linspace(0, 2 * np.pi, 181)
        axes.plot(circle, np.ones_like(circle), color="#777777", linewidth=0.7, zorder=1.5)
    for angle, name in zip(angles, METRIC_NAMES, strict=True):
        side = math.sin(angle)
        align = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
        axes.text(
            angle, high + 0.06 * (high - low), name.replace(" ", "\n", 1), fontsize=6, linespacing=1.0,
            ha=align, va="bottom" if math.cos(angle) > 0.9 else "top" if math.cos(angle) < -0.9 else "center",
        )  # fmt: skip


def radial_range(values: np.ndarray) -> tuple[float, float, list[float]]:
    """Return the inner end, the outer end and the circles between, so that the data fill the chart.

    Args:
        values: All values to be drawn; nan does not count, at least one must.

    Returns:
        Ends, the data strictly between them, and a few round numbers.
    """
    least, most = float(np.nanmin(values)), float(np.nanmax(values))
    span = max(most - least, 0.05)  # equal agents should look equal
    low, high = least - 0.2 * span, most + 0.05 * span  # the worst line should not shrink to a point in the middle
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(step for step in (0.2 * power, 0.5 * power, power, 2 * power) if (high - low) / step <= 7)
    ticks = [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    # A circle at the centre or rim would only add clutter; no ratio is below 0.
    return low, high, [tick for tick in ticks if max(0.0, low + 0.1 * span) <= tick < high - 0.02 * span]


def _draw_line(axes: PolarAxes, line: Line, i: int) -> Line2D:
    style = _DASHES[i % len(_DASHES)] if line.complete else ":"
    (handle,) = axes.plot(
        *_closed(line.values), color=_COLOURS[i], linestyle=style, linewidth=0.9, marker=_MARKERS[i], markersize=2,
        markeredgewidth=0, zorder=3 + (MOST - i) / MOST,
    )  # fmt: skip
    return handle


def _closed(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.linspace(0, 2 * np.pi, len(values) + 1), np.append(values, values[0])


def _draw_legend(figure: Figure, handles: Sequence[Line2D], names: Sequence[str]) -> None:
    legend = figure.legend(
        handles, [str(i) for i in range(len(handles))], loc="lower center", ncols=2, fontsize=6, frameon=False,
        handlelength=2.6, columnspacing=1.2, labelspacing=0.25, borderaxespad=0.2, borderpad=0.1,
    )  # fmt: skip
    # Set afterwards: matplotlib hides labels that begin with an underscore.
    for text, name in zip(legend.get_texts(), names, strict=True):
        _write(text, name)


def _write(text: Text, name: str) -> None:
    """Set a name that may contain $, which is not mathematics here, and characters that only some fonts have."""
    text.set_parse_math(False)
    text.set_text(name)
    text.set_fontfamily(_families())


def _families() -> list[str]:
    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _CJK_FONTS if name in installed)]


def _label(name: str, rank: int, *, complete: bool = True) -> str:
    """Return the name, shortened in the middle; a row number if no installed font has its characters."""
    fonts = [get_font(path) for path in _font_paths()]
    if not all(any(font.get_char_index(ord(c)) for font in fonts) for c in name):
        name = f"no. {rank} in table.md"
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME // 2]}…{name[-_LONGEST_NAME // 2 + 1 :]}"
    return name if complete else f"{name} (incomplete)"


def _font_paths() -> list[str]:
    return [fontManager.findfont(FontProperties(family=family)) for family in _families()]


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
        title: Its heading.
        text: What it shows, for its caption.
        svg: The `<svg>` element. Its colours are CSS: `currentColor`, `var(--paper)` and `var(--c0)` to `var(--c9)`.
    """

    title: str
    text: str
    svg: str


_INK = "#010203"  # stands for the page's text colour
_PAGE_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 8,
}
_PAGE_COLOURS = {
    **{colour.lower(): f"var(--c{i})" for i, colour in enumerate(_COLOURS)},
    **dict.fromkeys((_INK, "#444444"), "currentColor"),
    "#ffffff": "var(--paper)",
}
_ROW = 0.26  # inches, of an agent's line


def drawings(report: Report) -> list[Drawing]:
    """Draw the figures of the page; those that would be empty are left out."""
    level = f"{LEVEL:.0%}"
    sets = {name: Group("", ALL if split is None else "split", split or ALL) for split, name in SETS.items()}
    kinds = {kind: Group("", "kind", kind) for kind in KINDS}
    made = [
        (
            "Metrics",
            "The paper's number of each agent for each metric; incomplete agents (dotted) by their sample means. "
            "The circle at 1 is as good as the reference.",
            lambda: _radar(radar_lines(report)),
        ),
        (
            "Overall",
            f"Sample means of Overall with {level} intervals clustered by character.",
            lambda: _intervals(report, sets),
        ),
        ("By kind", f"Overall by kind of dialogue, with {level} intervals.", lambda: _intervals(report, kinds)),
        (
            "By character",
            "Each mark is an agent's mean over the rows of one character; the line is at the agent's sample mean.",
            lambda: _characters(report),
        ),
        (
            "Scores",
            "How often a judge gave a pair of scores (whole numbers; darker means more often). On the diagonal the "
            "answer and the reference are equally good, above it the answer is better.",
            lambda: _score_pairs(report.agents),
        ),
    ]
    found = []
    for title, text, draw in made:
        with rc_context({**_PAGE_STYLE, "svg.hashsalt": title}):
            figure = draw()
            if figure is not None:
                found.append(Drawing(title, text, _svg(figure, f"{title}. {text}")))
    return found


def _svg(figure: Figure, label: str) -> str:
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # the same in each figure, and not referenced
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _PAGE_COLOURS.get(found[0], found[0]), text)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    opening = re.sub(r' (?:width|height|version|xmlns)="[^"]*"', "", text[: text.index(">")])
    opening += f' role="img" aria-label="{escape(label)}" width="{width}" height="{height}"'
    return opening + text[text.index(">") :]


def _agent_rows(figure: Figure, agents: Sequence[AgentReport], axes: Axes) -> None:
    """Name the agents on the vertical axis, the best one on top."""
    axes.set_yticks(range(len(agents)), [""] * len(agents))
    for rank, one in enumerate(agents):
        name = axes.text(-0.02, rank, "", transform=axes.get_yaxis_transform(), ha="right", va="center")
        _write(name, _label(one.agent.name, rank + 1, complete=one.agent.complete))
    axes.set_ylim(len(agents) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.4, alpha=0.4)
    axes.set_axisbelow(True)


def _row_figure(agents: Sequence[AgentReport], extra: float = 0.75) -> tuple[Figure, Axes]:
    height = _ROW * len(agents) + extra
    figure = Figure(figsize=(4.8, height))
    axes = figure.add_axes((0.33, 0.38 / height, 0.64, 1 - extra / height))
    return figure, axes


def _intervals(report: Report, groups: dict[str, Group]) -> Figure | None:
    """Draw the Overall of each agent in groups of rows, with intervals where there are any."""
    figure, axes = _row_figure(report.agents)
    last = COLUMNS.index(OVERALL)
    drawn = False
    for i, (name, group) in enumerate(groups.items()):
        points = []
        for rank, one in enumerate(report.agents):
            estimate = report.estimates.get((MEAN_RATIO, group._replace(agent=one.agent.folder)))
            if estimate is not None and not math.isnan(estimate.value[last]):
                points.append((rank + 0.22 * (i - 1), estimate.value[last], estimate.low[last], estimate.high[last]))
        if points:
            y, value, low, high = np.array(points).T
            axes.errorbar(
                value, y, xerr=(value - low, high - value), fmt=_MARKERS[i], color=_COLOURS[i], markersize=4,
                linewidth=1, label=name,
            )  # fmt: skip
            drawn = True
    if not drawn:
        return None
    axes.axvline(1, color=_INK, linewidth=0.7, alpha=0.6, zorder=0)
    _agent_rows(figure, report.agents, axes)
    axes.set_xlabel("Overall (1 is as good as the reference)", labelpad=2)
    figure.legend(loc="upper center", ncols=len(groups), frameon=False, bbox_to_anchor=(0.65, 1.0), borderaxespad=0.2)
    return figure


def _characters(report: Report) -> Figure | None:
    """Draw the spread of the characters' means."""
    figure, axes = _row_figure(report.agents, extra=0.5)
    last = COLUMNS.index(OVERALL)
    drawn = False
    for rank, one in enumerate(report.agents):
        values = [
            estimate.value[last]
            for (statistic, group), estimate in report.estimates.items()
            if (statistic, group.agent, group.by) == (MEAN_RATIO, one.agent.folder, "character")
        ]
        values = [value for value in values if not math.isnan(value)]
        axes.plot(values, [rank] * len(values), "|", color=_COLOURS[0], markersize=9, alpha=0.6)
        middle = report.samples(one.agent.folder).value[last]
        axes.plot([middle, middle], [rank - 0.42, rank + 0.42], color=_COLOURS[1], linewidth=1.8)
        drawn |= bool(values)
    if not drawn:
        return None
    axes.axvline(1, color=_INK, linewidth=0.7, alpha=0.6, zorder=0)
    _agent_rows(figure, report.agents, axes)
    axes.set_xlabel("Overall of a character (1 is as good as the reference)", labelpad=2)
    return figure


def _score_pairs(agents: Sequence[AgentReport]) -> Figure | None:
    """Draw a heat map of score pairs for each agent."""
    columns = min(3, len(agents))
    lines = math.ceil(len(agents) / columns)
    size = 1.75
    figure = Figure(figsize=(size * columns + 0.3, size * lines + 0.3))
    drawn = False
    for i, one in enumerate(agents):
        pairs = np.array([(r.a, r.b) for r in one.agent.records() if not math.isnan(r.ratio)]).reshape(-1, 2)
        cells, numbers = np.unique(np.round(pairs).astype(int), axis=0, return_counts=True)
        drawn |= bool(len(cells))
        axes = figure.add_axes(
            (
                (0.45 + size * (i % columns)) / (size * columns + 0.3),
                1 - (0.25 + size * (i // columns) + 1.2) / (size * lines + 0.3),
                1.2 / (size * columns + 0.3),
                1.2 / (size * lines + 0.3),
            )
        )
        most = math.log1p(numbers.max(initial=1))
        for (a, b), count in zip(cells.tolist(), numbers.tolist(), strict=True):
            alpha = round(0.12 + 0.88 * math.log1p(count) / most, 2)
            axes.add_patch(Rectangle((b - 0.5, a - 0.5), 1, 1, color=_COLOURS[0], alpha=alpha, linewidth=0))
        axes.plot([0, 10], [0, 10], color=_COLOURS[1], linewidth=0.8)
        axes.set(xlim=(-0.5, 10.5), ylim=(-0.5, 10.5), xticks=(0, 5, 10), yticks=(0, 5, 10))
        axes.tick_params(labelsize=6, length=2, pad=1)
        title = _label(one.agent.name, i + 1, complete=one.agent.complete)
        _write(axes.set_title("", fontsize=7, pad=3), title)
        if i % columns == 0:
            axes.set_ylabel("answer", fontsize=6, labelpad=1)
        if i + columns >= len(agents):
            axes.set_xlabel("reference", fontsize=6, labelpad=1)
    return figure if drawn else None


def agreement_png(pairs: CommonReviews, first: str, second: str) -> bytes:
    """Draw rows' Overall by two judges against each other, and their differences against their means."""
    values = np.nanmean(pairs.ratios, axis=2)
    x, y = values
    figure = Figure(figsize=(2 * WIDTH, 3.1), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    style = {"s": 6, "color": _COLOURS[0], "alpha": 0.3, "linewidths": 0}
    left.scatter(x, y, **style)
    ends = [float(np.min(values)), float(np.max(values))]
    left.plot(ends, ends, color=_COLOURS[1], linewidth=0.8)
    for write, name in ((left.set_xlabel, first), (left.set_ylabel, second)):
        _write(write(""), _label(name, 1))
    left.set_title("Overall of each row", fontsize=8)
    right.scatter((x + y) / 2, x - y, **style)
    middle, spread = float(np.mean(x - y)), 1.96 * float(np.std(x - y, ddof=min(1, len(x) - 1)))
    for height, dash in ((middle, "-"), (middle - spread, "--"), (middle + spread, "--")):
        right.axhline(height, color=_COLOURS[1], linewidth=0.8, linestyle=dash)
    right.set_xlabel("mean of the two")
    right.set_ylabel("first minus second")
    right.set_title("Bland-Altman: bias and limits of agreement", fontsize=8)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_fontsize(8)
        axes.yaxis.label.set_fontsize(8)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
