"""The radar chart of all agents (like the paper's figure): eight axes, one line per agent, at a column's width."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.projections.polar import PolarAxes

from eval.judging.metrics import METRIC_NAMES
from eval.results.report import Report

WIDTH = 3.35  # inches, a paper's column
DIAMETER, LABEL_HEIGHT = 2.05, 0.27  # inches, of the circle and of the labels above and below it
DPI = 300
MOST = 10  # lines told apart by colour, dash and marker; further agents are drawn in grey
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
_DASHES = ("-", (0, (4, 1)), (0, (4, 1, 1, 1)))  # dots are for incomplete agents
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
    """The agents' lines; one without the paper's number is marked and drawn by its sample means."""
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
    drawn = [line for line in lines if not np.isnan(line.values).all()]
    if not drawn:
        return b""
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
    names = [_label(line, rank) for rank, line in enumerate(shown, 1)]
    _draw_legend(figure, handles, [*names, f"{len(others)} more (see table.md)"] if others else names)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _draw_axes(axes: PolarAxes, values: np.ndarray) -> None:
    low, high, ticks = radial_range(values)
    angles = np.linspace(0, 2 * np.pi, len(METRIC_NAMES), endpoint=False)
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [""] * len(ticks))
    decimals = max(1, *(len(f"{tick:g}".partition(".")[2]) for tick in ticks))
    halo = [withStroke(linewidth=1.2, foreground="white")]
    for tick in ticks:  # over the lines, between the first two axes
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
    """Inner end, outer end and the circles between, so that the data fill the chart.

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
    # A circle at the very centre or rim would only clutter; no ratio is below 0.
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
    # Set afterwards: as labels, names that begin with an underscore would vanish, and $ would be read as mathematics.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
        text.set_fontfamily(_families())


def _families() -> list[str]:
    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _CJK_FONTS if name in installed)]


def _label(line: Line, rank: int) -> str:
    """The name, shortened in its middle; a row number where no installed font has its characters."""
    name = line.name
    fonts = [get_font(path) for path in _font_paths()]
    if not all(any(font.get_char_index(ord(c)) for font in fonts) for c in name):
        name = f"no. {rank} in table.md"
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME // 2]}…{name[-_LONGEST_NAME // 2 + 1 :]}"
    return name if line.complete else f"{name} (incomplete)"


def _font_paths() -> list[str]:
    return [fontManager.findfont(FontProperties(family=family)) for family in _families()]
