"""The plots of the data card, each a PNG."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font

if TYPE_CHECKING:
    from data_utils.stats.card import Card

# Okabe and Ito's palette, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#999999")
COLOUR_OF = {"comment": COLOURS[0], "human-role": COLOURS[1], "inter-role": COLOURS[2]}
DPI = 150
_LONGEST_NAME = 28
_SHOWN_PERCENT = 99.7
_FEW = 1_000  # below so many samples each is shown
_CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "SimHei")
# Instead of the published Chinese names if no installed font has their characters.
_ENGLISH = {"西游记": "Journey to the West", "成龙历险记": "Jackie Chan Adventures", "中国唐代": "China, Tang dynasty"}


def draw_plots(card: Card) -> dict[str, bytes]:
    """Draw the plots for which there is data.

    Returns:
        PNG bytes by file name: characters, turns, samples, lengths, images.
    """
    plots = {
        "characters.png": _characters(card),
        "turns.png": _turns(card),
        "samples.png": _samples(card),
        "lengths.png": _lengths(card),
        "images.png": _images(card),
    }
    return {name: png(figure) for name, figure in plots.items() if figure is not None}


def label(name: str, number: int) -> str:
    """Return a name as it can be drawn: shortened, and in Latin letters if no installed font has its characters."""
    fonts = [get_font(fontManager.findfont(FontProperties(family=family))) for family in font_families()]
    if not all(any(font.get_char_index(ord(c)) for font in fonts) for c in name):
        name = _ENGLISH.get(name, f"row {number} of the table")
    name = name.replace("_", " ")
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _characters(card: Card) -> Figure | None:
    counts = Counter((split, sort) for split, _, sort, names in card.scripts for _ in names)
    splits = list(dict.fromkeys(split for split, _ in counts))
    sorts = sorted({sort for _, sort in counts}, key=lambda s: -sum(counts[split, s] for split in splits))
    figure, axes = _new(6.4, 0.5 * len(sorts) + 1.1)
    left = np.zeros(len(sorts))
    for split, colour, ink in zip(splits, COLOURS, ("white", "black"), strict=False):
        values = np.array([counts[split, sort] for sort in sorts])
        axes.barh(sorts, values, left=left, color=colour, label=split, height=0.65)
        for row, (start, value) in enumerate(zip(left, values, strict=True)):
            if value:
                axes.text(start + value / 2, row, str(value), ha="center", va="center", color=ink, fontsize=9)
        left += values
    _finish_bars(axes, "characters")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _turns(card: Card) -> Figure | None:
    kinds = list(dict.fromkeys(kind for (_, kind), seen in card.dialogues.items() if seen.turns))
    # A comment is always one question and one answer; its tall bar would dwarf the others.
    kinds = [k for k in kinds if k != "comment"]
    if not kinds:
        return None
    turns = {k: np.concatenate([seen.turns for (_, kind), seen in card.dialogues.items() if kind == k]) for k in kinds}
    most = int(max(values.max() for values in turns.values()))
    figure, axes = _new(6.4, 2.8)
    width = 0.8 / len(kinds)
    for i, (kind, values) in enumerate(turns.items()):
        heights = np.bincount(values.astype(int), minlength=most + 1)[1:]
        places = np.arange(1, most + 1) + (i - (len(kinds) - 1) / 2) * width
        axes.bar(places, heights, width, color=COLOUR_OF[kind], label=kind)
    axes.set_xlabel("turns of a dialogue", fontsize=9)
    axes.set_ylabel("dialogues", fontsize=9)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xticks(range(1, most + 1) if most <= 24 else range(0, most + 1, max(1, most // 12)))
    axes.legend(frameon=False, fontsize=8)
    return figure


def _samples(card: Card) -> Figure | None:
    parts = list(dict.fromkeys(part for part, _ in sorted(card.samples, key=lambda key: key[0] != "training")))
    rows = [(part, kind, len(v.prompts)) for part in parts for (p, kind), v in card.samples.items() if p == part]
    if not rows:
        return None
    figure, axes = _new(6.4, 0.3 * len(rows) + 0.9)
    names = [f"{part}: {kind}" for part, kind, _ in rows]
    values = [max(count, 0) for *_, count in rows]
    axes.barh(names, values, color=[COLOUR_OF[kind] for _, kind, _ in rows], height=0.7)
    axes.set_xscale("symlog", linthresh=10)  # tens of test samples beside tens of thousands to train on
    axes.set_xlim(0, 6 * max(values))
    for row, value in enumerate(values):
        axes.text(value * 1.1 + 0.2, row, f"{value:,}", va="center", fontsize=8)
    _finish_bars(axes, "samples (logarithmic)")
    return figure


def _lengths(card: Card) -> Figure | None:
    kinds = list(dict.fromkeys(kind for (_, kind), lengths in card.samples.items() if lengths.prompts))
    if not kinds:
        return None
    figure = Figure(figsize=(6.4, 2.8), dpi=DPI, layout="constrained")
    for side, axes in zip(("prompts", "answers"), figure.subplots(1, 2), strict=True):
        values = {
            k: np.concatenate([getattr(v, side) for (_, kind), v in card.samples.items() if kind == k and v.prompts])
            for k in kinds
        }
        # A few very long samples would squeeze the rest; they are left out, and the axis says so.
        shown = {k: 100 if len(v) < _FEW else _SHOWN_PERCENT for k, v in values.items()}
        end = max(1.0, *(float(np.percentile(v, shown[k])) for k, v in values.items()))
        bins = np.linspace(0, end, 60)
        for kind in kinds:
            shares = np.full(len(values[kind]), 100 / len(values[kind]))
            axes.hist(values[kind], bins, weights=shares, histtype="step", color=COLOUR_OF[kind], label=kind)
        beyond = sum(int((v > end).sum()) for v in values.values())
        axes.set_title(side, fontsize=9)
        axes.set_xlabel(f"{card.unit} ({beyond:,} longer ones not shown)" if beyond else card.unit, fontsize=9)
        _clean(axes)
    figure.axes[0].set_ylabel("% of the kind's samples", fontsize=9)
    figure.axes[1].legend(frameon=False, fontsize=8)
    return figure


def _images(card: Card) -> Figure | None:
    numbered = enumerate(card.images.items(), 1)
    rows = [(label(source, number), used, present) for number, (source, (used, present, *_)) in numbered]
    rows.sort(key=lambda row: -row[1])
    rows = [row for row in rows if row[1]]
    if not rows:
        return None
    names, used, present = zip(*rows, strict=True)
    figure, axes = _new(6.4, 0.24 * len(rows) + 0.9)
    places = range(len(rows))  # not the names: two shortened ones may be equal
    axes.barh(places, used, color="#CCCCCC", height=0.7, label="referred to, missing here")
    axes.barh(places, present, color=COLOURS[0], height=0.7, label="referred to, here")
    axes.set_yticks(places, names)
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(0, 5 * max(used))
    for row, value in enumerate(used):
        axes.text(value * 1.1 + 0.2, row, f"{value:,}", va="center", fontsize=8)
    _finish_bars(axes, "images (logarithmic)")
    handles, texts = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], texts[::-1], frameon=False, fontsize=8, loc="lower right")
    return figure


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    _clean(axes)
    return figure, axes


def _clean(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _finish_bars(axes: Axes, unit: str) -> None:
    axes.set_xlabel(unit, fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    for text in axes.get_yticklabels():
        text.set_fontfamily(font_families())
        text.set_parse_math(False)


def font_families() -> Sequence[str]:
    """Return the fonts to draw with: the default, then installed ones with Chinese characters."""
    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _CJK_FONTS if name in installed)]


def png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
