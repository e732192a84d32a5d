"""Counts characters, dialogues, samples and images of a data root for its data card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import write_bytes, write_text
from data_utils.images import find_image, images_below
from data_utils.layout import KINDS, SPLITS, file_of_tests, paths_of_tests
from data_utils.lengths import LengthCounter
from data_utils.prompts import category
from data_utils.roots import Characters, DataRoots, dialogue_files
from data_utils.samples import iterate_samples
from data_utils.schema import TestSample
from data_utils.stats.card import Card, Dialogues, Lengths, markdown

if TYPE_CHECKING:
    from qwen_vl import QwenVLTokenizer


def collect(data_root: Path, tokenizer: QwenVLTokenizer | None = None) -> Card:
    """Count everything for the data card.

    Args:
        data_root: A data root; parts of it may be missing.
        tokenizer: Gives lengths in tokens.

    Raises:
        ProblemsError: There are no profiles, or files are wrong, with everything that is.
    """
    card = Card(unit="characters" if tokenizer is None else "tokens")
    roots = DataRoots([data_root])
    for split in SPLITS:
        for script, names in roots.roles.get(split, {}).items():
            card.scripts.append((split, script, category(script), names))
    counter, uses = LengthCounter(tokenizer), Counter[str]()
    _count_tests(roots, card, counter, uses)
    tested = _tested(roots, card)
    for place in [(split, kind) for split in roots.roles for kind in KINDS]:
        found = _dialogues(roots, place, card)
        _count_dialogues(found, place, card, roots.characters, counter, tested, uses)
    raise_problems(roots.problems)
    _count_images(data_root, card, uses)
    return card


def write_card(card: Card, data_root: Path, out: Path) -> Path:
    """Write the card's Markdown and plots into a folder.

    Returns:
        The Markdown file.

    Raises:
        MMRoleError: A file cannot be written.
    """
    from data_utils.stats.plots import draw_plots  # matplotlib, for which `run_main` has to choose the backend

    plots = draw_plots(card)
    for name, png in plots.items():
        write_bytes(out / name, png)
    write_text(out / "data_card.md", markdown(card, data_root.resolve().name, plots))
    return out / "data_card.md"


def _dialogues(roots: DataRoots, place: tuple[str, str], card: Card) -> Iterable[dict[str, Any]]:
    split, kind = place
    if not dialogue_files(roots.roots[0], split, kind):
        card.notes.append(f"no dialogues/{split}/{kind} here")
    found = list(roots.dialogues(split, kind))
    return tqdm(found, f"{split}, {kind}", disable=None, leave=False)


def _tested(roots: DataRoots, card: Card) -> frozenset[str]:
    if all(path.is_file() for path in paths_of_tests(roots.roots[0])):
        return roots.tested()
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
            samples = list(iterate_samples([dialogue], characters))
        except MMRoleError:  # data_utils.check says why
            seen.unusable += 1
            continue
        for sample in samples:
            _add(sample, lengths, counter)
    if lengths.prompts:
        card.samples["training", kind] = lengths


def _count_tests(roots: DataRoots, card: Card, counter: LengthCounter, uses: Counter[str]) -> None:
    for split in SPLITS:
        for kind in KINDS:
            path = roots.roots[0] / "data" / "test" / split / file_of_tests(kind)
            samples = roots.rows(path, TestSample) if path.is_file() else []
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
    files = {name for name, _ in images_below(data_root)}
    by_source: dict[str, list[str]] = {}
    for name in sorted(files | uses.keys()):
        by_source.setdefault(name.split("/")[0] if "/" in name else ".", []).append(name)
    for source, names in by_source.items():
        used = [name for name in names if name in uses]
        # A linked folder, such as a copy of COCO's, is not searched, but what is referred to is found in it.
        present = sum(1 for name in used if name in files or find_image(root, name, follow_links=True) is not None)
        card.images[source] = (len(used), present, len(names) - len(used), sum(uses[name] for name in used))
