"""Writes the data card of a data root, Markdown with tables and plots: `python -m data_utils.stats DATA_ROOT`."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_utils.build import (
    KINDS,
    SPLITS,
    Characters,
    build_sample,
    iterate_dialogues,
    load_characters,
    speaker,
    tested_dialogues,
)
from data_utils.errors import MMRoleError, run_main
from data_utils.files import read_json, write_bytes, write_text
from data_utils.prompts import HUMAN, HYPOTHETICAL_CHARACTERS, SYSTEM_MESSAGE
from data_utils.stats_plots import draw_plots
from qwen_vl import QwenVLTokenizer
from qwen_vl.chat import make_context

HISTORICAL = {"the Renaissance period", "the modern times", "the Ancient Greece period", "中国唐代"}
FICTIONAL = {
    *("The Avengers", "X-Men", "Harry Potter", "Toy Story", "Friends", "The Big Bang Theory"),
    *("西游记", "成龙历险记"),
}
CATEGORIES = ("fictional", "historical or public", "hypothetical", "other")
LONG = 2048  # tokens from which rotary base and log-n attention change
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_NEXT_LINE = re.compile(r"(?<=\n)(?=\S)")


@dataclass
class Lengths:
    """How long the samples of a kind are, in tokens or characters: prompt and answer of each."""

    prompts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)


@dataclass
class Dialogues:
    """The dialogues of a split and kind: how many there are, the turns of those that have any, and where they fail."""

    total: int = 0
    turns: list[int] = field(default_factory=list)
    unusable: int = 0  # dialogues of which a sample could not be built


@dataclass
class Card:
    """All that the data card tells.

    Attributes:
        scripts: Split, script, its category and characters.
        dialogues: By split and kind.
        samples: By part ("training", "test, in-distribution", "test, out-of-distribution") and kind.
        images: By source: how many names are referred to, how many of them are there, how many are there but not
            referred to, and by how many dialogues.
        unit: "tokens" or "characters".
        notes: What was not there or left out.
    """

    scripts: list[tuple[str, str, str, list[str]]] = field(default_factory=list)
    dialogues: dict[tuple[str, str], Dialogues] = field(default_factory=dict)
    samples: dict[tuple[str, str], Lengths] = field(default_factory=dict)
    images: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    unit: str = "characters"
    notes: list[str] = field(default_factory=list)


class LengthCounter:
    """Counts a sample's prompt and answer: tokens as the model reads them, or characters without a tokenizer.

    The tokenizer never joins what stands before and after a line's end, so that lines can be counted one by one and
    each only once; they come again in sample after sample.
    """

    def __init__(self, tokenizer: QwenVLTokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}
        self._frame = 0
        if tokenizer is not None:
            ids = make_context(tokenizer, [{"image": "x"}, {"text": "T"}], system=SYSTEM_MESSAGE)[1]
            self._frame = len(ids) - self.count("T")

    def count(self, text: str) -> int:
        """Tokens of a plain text, or its characters."""
        if self._tokenizer is None:
            return len(text)
        return sum(map(self._line, _NEXT_LINE.split(text)))

    def prompt(self, text: str) -> int:
        """Tokens of the whole prompt: system message, picture and marks included; or characters of the text."""
        return self._frame + self.count(text)

    def _line(self, line: str) -> int:
        known = self._known.get(line)
        if known is None:
            assert self._tokenizer is not None
            known = self._known[line] = len(self._tokenizer.encode(line, allowed_special=()))
        return known


def category(script: str) -> str:
    """What sort of characters a script has, after the paper's table; a script of one's own is "other"."""
    if script == HYPOTHETICAL_CHARACTERS:
        return "hypothetical"
    if script in HISTORICAL:
        return "historical or public"
    return "fictional" if script in FICTIONAL else "other"


def collect(data_root: Path, tokenizer: QwenVLTokenizer | None = None) -> Card:
    """Counts everything.

    Args:
        data_root: A data root; parts of it may be missing.
        tokenizer: Gives lengths in tokens.

    Raises:
        MMRoleError: There are no profiles, or a file cannot be read.
    """
    card = Card(unit="characters" if tokenizer is None else "tokens")
    splits = [split for split in SPLITS if (data_root / "profiles" / split / "roles.json").is_file()]
    if not splits:
        raise MMRoleError("no profiles/<split>/roles.json", None, data_root, "choose the folder of the data set")
    for split in splits:
        for script, names in read_json(data_root / "profiles" / split / "roles.json").items():
            card.scripts.append((split, script, category(script), names))
    counter, uses = LengthCounter(tokenizer), Counter[str]()
    _count_tests(data_root, card, counter, uses)
    tested = _tested(data_root, card)
    for split in splits:
        characters = load_characters(data_root, [split])
        for kind in KINDS:
            found = _dialogues(data_root, split, kind, card)
            _count_dialogues(found, (split, kind), card, characters, counter, tested, uses)
    _count_images(data_root, card, uses)
    return card


def write_card(card: Card, data_root: Path, out: Path) -> Path:
    """Writes the card's Markdown and plots into a folder.

    Returns:
        The Markdown file.

    Raises:
        MMRoleError: A file cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MMRoleError(f"cannot make the folder: {error.strerror}", out, "--out", "choose another") from error
    plots = draw_plots(card)
    for name, png in plots.items():
        write_bytes(out / name, png)
    write_text(out / "data_card.md", markdown(card, data_root.resolve().name, plots))
    return out / "data_card.md"


def _dialogues(data_root: Path, split: str, kind: str, card: Card) -> Iterator[dict[str, Any]]:
    place = data_root / "dialogues" / split / kind
    if not place.is_dir() and not place.with_suffix(".json").is_file():
        card.notes.append(f"no dialogues/{split}/{kind} here")
        return iter(())
    found = list(iterate_dialogues(data_root, split, kind))
    return iter(tqdm(found, f"{split}, {kind}", disable=None, leave=False))


def _tested(data_root: Path, card: Card) -> frozenset[str]:
    try:
        return tested_dialogues(data_root)
    except MMRoleError:
        card.notes.append("no data/test, or not all of it: no dialogue is left out of the training samples")
        return frozenset()


def _count_dialogues(
    dialogues: Iterator[dict[str, Any]],
    place: tuple[str, str],
    card: Card,
    characters: Characters,
    counter: LengthCounter,
    tested: frozenset[str],
    uses: Counter[str],
) -> None:
    seen = card.dialogues.setdefault(place, Dialogues())
    split, kind = place
    lengths = Lengths()
    for dialogue in dialogues:
        seen.total += 1
        uses[dialogue["image"]] += 1
        turns = dialogue["conversations"]
        if turns:
            seen.turns.append(len(turns))
        if split != SPLITS[0] or dialogue["id"] in tested:
            continue
        try:
            samples = [build_sample(dialogue, t, characters) for t, said in enumerate(turns) if speaker(said) != HUMAN]
        except (MMRoleError, KeyError):  # the data doctor tells why
            seen.unusable += 1
            continue
        for sample in samples:
            _add(sample, lengths, counter)
    if lengths.prompts:
        card.samples["training", kind] = lengths


def _count_tests(data_root: Path, card: Card, counter: LengthCounter, uses: Counter[str]) -> None:
    for split in SPLITS:
        for kind in KINDS:
            path = data_root / "data" / "test" / split / f"{kind}_test.json"
            if path.is_file():
                lengths = card.samples.setdefault((f"test, {split}", kind), Lengths())
                for sample in read_json(path):
                    uses[sample["image"]] += 0  # its dialogue counts
                    _add(sample, lengths, counter)


def _add(sample: Mapping[str, Any], lengths: Lengths, counter: LengthCounter) -> None:
    user, assistant = sample["conversations"]
    lengths.prompts.append(counter.prompt(user["value"]))
    lengths.answers.append(counter.count(assistant["value"]))


def _count_images(data_root: Path, card: Card, uses: Counter[str]) -> None:
    root = data_root / "images"
    there = {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES}
    by_source: dict[str, list[str]] = {}
    for name in sorted(there | uses.keys()):
        by_source.setdefault(name.split("/")[0] if "/" in name else ".", []).append(name)
    for source, names in by_source.items():
        used = [name for name in names if name in uses]
        present = sum(1 for name in used if name in there)
        card.images[source] = (len(used), present, len(names) - len(used), sum(uses[name] for name in used))


def markdown(card: Card, name: str, plots: Mapping[str, bytes]) -> str:
    """The card's text; refers to the plots by their file names."""
    parts = [f"# Data card: {name}", _summary(card)]
    if card.notes:
        parts.append("\n".join(f"- {note}" for note in dict.fromkeys(card.notes)))
    parts += ["## Characters", _characters_table(card), *_plot("characters.png", plots), _scripts_table(card)]
    parts += ["## Dialogues", _dialogues_table(card), *_plot("turns.png", plots)]
    parts += ["## Samples", _samples_table(card), *_plot("samples.png", plots), "### Lengths", _lengths_intro(card)]
    parts += [_lengths_table(card, "prompts"), _lengths_table(card, "answers"), *_plot("lengths.png", plots)]
    parts += ["## Images", _images_table(card), *_plot("images.png", plots)]
    return "\n\n".join(parts) + "\n"


def _summary(card: Card) -> str:
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
    return _table(["split", "script", "category", "characters", "names"], rows, numbers={3})


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
    return "In tokens. A prompt is all that the model reads: system message, picture (258), text and ChatML marks."


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
    return _table(
        ["source", "referred to", "here", "missing", "here, not referred to", "dialogues"], rows, numbers=None
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], numbers: set[int] | None = None) -> str:
    def right(column: int) -> bool:
        if numbers is not None:
            return column in numbers
        return bool(rows) and all(not isinstance(row[column], str) or row[column][:1].isdigit() for row in rows)

    marks = ["---:" if right(column) else "---" for column in range(len(head))]
    lines = [[_cell(value) for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(head), marks, *lines])


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _plot(name: str, plots: Mapping[str, bytes]) -> list[str]:
    return [f"![{name.removesuffix('.png')}]({name})"] if name in plots else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_utils.stats", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data_root", type=Path, help="the folder that holds dialogues/, profiles/, data/, images/")
    parser.add_argument("--out", type=Path, help="the folder to write to (default: DATA_ROOT/data/card)")
    parser.add_argument("--tokenizer", type=Path, metavar="CHECKPOINT", help="folder with qwen.tiktoken: count tokens")
    options = parser.parse_args(arguments)
    tokenizer = None
    if options.tokenizer:
        try:
            tokenizer = QwenVLTokenizer.from_pretrained(options.tokenizer)
        except (FileNotFoundError, ValueError) as error:
            raise MMRoleError(
                "no tokenizer there", str(error), "--tokenizer", "choose a checkpoint's folder"
            ) from error
    card = collect(options.data_root, tokenizer)
    path = write_card(card, options.data_root, options.out or options.data_root / "data" / "card")
    print(_summary(card))
    print(f"written to {path.resolve()}")


if __name__ == "__main__":
    sys.exit(run_main(main))
