"""Writes the data card of a data root, Markdown with tables and plots: `python -m data_utils.stats DATA_ROOT`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import write_bytes, write_text
from data_utils.images import find_image
from data_utils.layout import KINDS, SPLITS, paths_of_tests
from data_utils.prompts import HUMAN
from data_utils.roots import Characters, Sources, dialogue_files
from data_utils.row_files import first_problems
from data_utils.samples import build_sample, speaker
from data_utils.schema import TestSample
from data_utils.stats.card import Card, Dialogues, Lengths, category, markdown, summary
from data_utils.supervised import LengthCounter
from qwen_vl import QwenVLTokenizer

WEIGHTS = Path(__file__).resolve().parents[2] / "model_weights"
CHECKPOINTS = ("Qwen-VL-Chat", "MMRole-Agent", "MMRole-Eval_RM")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def collect(data_root: Path, tokenizer: QwenVLTokenizer | None = None) -> Card:
    """Counts everything.

    Args:
        data_root: A data root; parts of it may be missing.
        tokenizer: Gives lengths in tokens.

    Raises:
        ProblemsError: There are no profiles, or files are wrong, with everything that is.
    """
    card = Card(unit="characters" if tokenizer is None else "tokens")
    sources = Sources([data_root])
    for split in SPLITS:
        for script, names in sources.roles.get(split, {}).items():
            card.scripts.append((split, script, category(script), names))
    counter, uses = LengthCounter(tokenizer), Counter[str]()
    _count_tests(sources, card, counter, uses)
    tested = _tested(sources, card)
    for place in [(split, kind) for split in sources.roles for kind in KINDS]:
        found = _dialogues(sources, place, card)
        _count_dialogues(found, place, card, sources.characters, counter, tested, uses)
    raise_problems(first_problems(sources.problems))
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
    from data_utils.stats.plots import draw_plots  # matplotlib, for which `run_main` has to choose the backend

    plots = draw_plots(card)
    for name, png in plots.items():
        write_bytes(out / name, png)
    write_text(out / "data_card.md", markdown(card, data_root.resolve().name, plots))
    return out / "data_card.md"


def _dialogues(sources: Sources, place: tuple[str, str], card: Card) -> Iterable[dict[str, Any]]:
    split, kind = place
    if not dialogue_files(sources.roots[0], split, kind):
        card.notes.append(f"no dialogues/{split}/{kind} here")
    found = list(sources.dialogues(split, kind))
    return tqdm(found, f"{split}, {kind}", disable=None, leave=False)


def _tested(sources: Sources, card: Card) -> frozenset[str]:
    if all(path.is_file() for path in paths_of_tests(sources.roots[0])):
        return sources.tested()
    card.notes.append("no data/test, or not all of it: no dialogue is left out of the training samples")
    return frozenset()


def _count_dialogues(
    dialogues: Iterable[dict[str, Any]],
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
        except MMRoleError:  # the data doctor tells why
            seen.unusable += 1
            continue
        for sample in samples:
            _add(sample, lengths, counter)
    if lengths.prompts:
        card.samples["training", kind] = lengths


def _count_tests(sources: Sources, card: Card, counter: LengthCounter, uses: Counter[str]) -> None:
    for split in SPLITS:
        for kind in KINDS:
            path = sources.roots[0] / "data" / "test" / split / f"{kind}_test.json"
            samples = sources.rows(path, TestSample) if path.is_file() else []
            if samples:
                lengths = card.samples.setdefault((f"test, {split}", kind), Lengths())
            for sample in samples:
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
        # A linked folder, such as a copy of COCO's, is not searched, but what is referred to is found in it.
        present = sum(1 for name in used if name in there or find_image(root, name, follow_links=True) is not None)
        card.images[source] = (len(used), present, len(names) - len(used), sum(uses[name] for name in used))


def default_tokenizer() -> Path | None:
    """A released checkpoint that has been downloaded, or None; they all have one tokenizer."""
    folders = [WEIGHTS / name for name in CHECKPOINTS]
    return next((folder for folder in folders if (folder / "qwen.tiktoken").is_file()), None)


def _tokenizer(checkpoint: Path) -> QwenVLTokenizer:
    try:
        return QwenVLTokenizer.from_pretrained(checkpoint)
    except (FileNotFoundError, ValueError) as error:
        raise MMRoleError("no tokenizer there", str(error), "--tokenizer", "choose a checkpoint's folder") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_utils.stats", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data_root", type=Path, help="the folder that holds dialogues/, profiles/, data/, images/")
    parser.add_argument("--out", type=Path, help="the folder to write to (default: DATA_ROOT/data/card)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="CHECKPOINT",
        help="folder with qwen.tiktoken, to count tokens (default: one of model_weights, if it is there)",
    )
    options = parser.parse_args(arguments)
    checkpoint = options.tokenizer or default_tokenizer()
    tokenizer = _tokenizer(checkpoint) if checkpoint else None
    if tokenizer is None:
        print(
            f"no tokenizer in {WEIGHTS}, so lengths are in characters; --tokenizer CHECKPOINT gives them in tokens, "
            "or bash scripts/download_weights.sh qwen-vl-chat first"
        )
    card = collect(options.data_root, tokenizer)
    path = write_card(card, options.data_root, options.out or options.data_root / "data" / "card")
    print(summary(card))
    print(f"written to {path.resolve()}")
