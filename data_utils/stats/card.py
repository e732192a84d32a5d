"""The data card: its content, and its text and tables in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_utils.layout import KINDS, SPLITS
from data_utils.prompts import CATEGORIES

LONG = 2048  # tokens from which rotary base and log-n attention change


@dataclass
class Lengths:
    """The lengths of the samples of a kind, in tokens or characters: prompt and answer of each."""

    prompts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)


@dataclass
class Dialogues:
    """The dialogues of a split and kind: their number, the turns of those that have any, and the unusable ones."""

    total: int = 0
    turns: list[int] = field(default_factory=list)
    unusable: int = 0  # dialogues of which a sample could not be built


@dataclass
class Card:
    """The content of the data card.

    Attributes:
        scripts: Split, script, its category and characters.
        dialogues: By split and kind.
        samples: By part ("training", "test, in-distribution", "test, out-of-distribution") and kind.
        images: By source: the numbers of names that are referred to, of those with a file, of files that are not
            referred to, and of dialogues.
        unit: "tokens" or "characters".
        notes: What was missing or left out.
    """

    scripts: list[tuple[str, str, str, list[str]]] = field(default_factory=list)
    dialogues: dict[tuple[str, str], Dialogues] = field(default_factory=dict)
    samples: dict[tuple[str, str], Lengths] = field(default_factory=dict)
    images: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    unit: str = "characters"
    notes: list[str] = field(default_factory=list)


def markdown(card: Card, name: str, plots: Mapping[str, bytes]) -> str:
    """Return the card's text, which refers to the plots by their file names."""
    parts = [f"# Data card: {name}", summary(card)]
    if card.notes:
        parts.append("\n".join(f"- {note}" for note in dict.fromkeys(card.notes)))
    parts += ["## Characters", _characters_table(card), *_plot("characters.png", plots), _scripts_table(card)]
    parts += ["## Dialogues", _dialogues_table(card), *_plot("turns.png", plots)]
    parts += ["## Samples", _samples_table(card), *_plot("samples.png", plots), "### Lengths", _lengths_intro(card)]
    parts += [_lengths_table(card, "prompts"), _lengths_table(card, "answers"), *_plot("lengths.png", plots)]
    parts += ["## Images", _images_table(card), *_plot("images.png", plots)]
    return "\n\n".join(parts) + "\n"


def summary(card: Card) -> str:
    characters = sum(len(names) for *_, names in card.scripts)
    dialogues = sum(seen.total for seen in card.dialogues.values())
    training = sum(len(lengths.prompts) for (part, _), lengths in card.samples.items() if part == "training")
    tests = sum(len(lengths.prompts) for (part, _), lengths in card.samples.items() if part != "training")
    images = sum(numbers[0] for numbers in card.images.values())
    return (
        f"{characters:,} characters, {dialogues:,} dialogues on {images:,} images; "
        f"{training:,} training samples (as built from the dialogues) and {tests:,} test samples."
    )


def _characters_table(card: Card) -> str:
    counts = Counter((split, sort) for split, _, sort, names in card.scripts for _ in names)
    sorts = [sort for sort in CATEGORIES if any(counts[split, sort] for split in SPLITS)]
    rows = [[split, *(counts[split, s] for s in sorts), sum(counts[split, s] for s in sorts)] for split in SPLITS]
    return _table(["split", *sorts, "all"], [row for row in rows if row[-1]])


def _scripts_table(card: Card) -> str:
    rows = [[split, script, sort, len(names), ", ".join(names)] for split, script, sort, names in card.scripts]
    return _table(["split", "script", "category", "characters", "names"], rows)


def _dialogues_table(card: Card) -> str:
    rows = []
    for (split, kind), seen in card.dialogues.items():
        turns = np.array(seen.turns or [0])
        of_turns = [int(turns.sum()), f"{turns.mean():.1f}", int(np.median(turns)), int(turns.max())]
        rows.append([split, kind, seen.total, seen.total - len(seen.turns), *of_turns, seen.unusable])
    head = ["split", "kind", "dialogues", "empty", "turns", "mean", "median", "most", "not usable"]
    return _table(head, rows)


def _samples_table(card: Card) -> str:
    parts = list(dict.fromkeys(part for part, _ in sorted(card.samples, key=lambda key: key[0] != "training")))
    rows = []
    for part in parts:
        counts = [len(card.samples.get((part, kind), Lengths()).prompts) for kind in KINDS]
        rows.append([part, *counts, sum(counts)])
    return _table(["part", *KINDS, "all"], rows)


def _lengths_intro(card: Card) -> str:
    if card.unit == "characters":
        return "In characters of the text; `--tokenizer CHECKPOINT` gives tokens."
    return "In tokens. A prompt is all that the model reads: system message, picture (258), text and ChatML tokens."


def _lengths_table(card: Card, side: str) -> str:
    rows = []
    for (part, kind), lengths in sorted(card.samples.items(), key=lambda item: item[0][0] != "training"):
        values = np.array(getattr(lengths, side))
        if not values.size:
            continue
        row = [
            part,
            kind,
            f"{values.mean():.1f}",
            *(int(np.percentile(values, q)) for q in (50, 95)),
            int(values.max()),
        ]
        if side == "prompts" and card.unit == "tokens":
            row.append(f"{100 * (values > LONG).mean():.1f} %")
        rows.append(row)
    over = [f"over {LONG:,}"] if side == "prompts" and card.unit == "tokens" else []
    return _table([f"{side}: part", "kind", "mean", "median", "95 %", "longest", *over], rows)


def _images_table(card: Card) -> str:
    rows = [
        [source, used, present, used - present, unused, dialogues]
        for source, (used, present, unused, dialogues) in card.images.items()
    ]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, 6))])
    return _table(["source", "referred to", "here", "missing", "here, not referred to", "dialogues"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def is_number(cell: object) -> bool:
        return not isinstance(cell, str) or cell[:1].isdigit()

    marks = ["---:" if rows and all(is_number(row[i]) for row in rows) else "---" for i in range(len(head))]
    lines = [[_cell(value) for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(head), marks, *lines])


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _plot(name: str, plots: Mapping[str, bytes]) -> list[str]:
    return [f"![{name.removesuffix('.png')}]({name})"] if name in plots else []
