"""Counts characters, dialogues, samples and images of a data root for its data card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import write_bytes, write_text
from data_utils.images import find_image, images_below
from data_utils.layout import KINDS, SPLITS, file_of_tests, paths_of_tests
from data_utils.lengths import LengthCounter
from data_utils.prompts import category
from data_utils.roots import DataRoots, dialogue_files
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
    counting = _Counting(data_root, tokenizer)
    counting.characters()
    counting.tests()
    counting.dialogues()
    raise_problems(counting.roots.problems)
    counting.images()
    return counting.card


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


class _Counting:
    """Fills the card of a data root, part by part."""

    def __init__(self, data_root: Path, tokenizer: QwenVLTokenizer | None) -> None:
        self.card = Card(unit="characters" if tokenizer is None else "tokens")
        self.root, self.roots = data_root, DataRoots([data_root])
        self._lengths = LengthCounter(tokenizer)
        self._uses = Counter[str]()  # dialogues of each image

    def characters(self) -> None:
        for split in SPLITS:
            for script, names in self.roots.roles.get(split, {}).items():
                self.card.scripts.append((split, script, category(script), names))

    def tests(self) -> None:
        for split, kind in product(SPLITS, KINDS):
            path = self.root / "data" / "test" / split / file_of_tests(kind)
            samples = self.roots.rows(path, TestSample) if path.is_file() else []
            for sample in samples:
                self._measure(sample, f"test, {split}", kind)
                self._uses[sample["image"]] += 0  # its dialogue counts

    def dialogues(self) -> None:
        tested = frozenset[str]()
        if all(path.is_file() for path in paths_of_tests(self.root)):
            tested = self.roots.tested()
        else:
            self.card.notes.append("no data/test, or not all of it: no dialogue is left out of the training samples")
        for split, kind in product(self.roots.roles, KINDS):
            if not dialogue_files(self.root, split, kind):
                self.card.notes.append(f"no dialogues/{split}/{kind} here")
            found = list(self.roots.dialogues(split, kind))
            counts = self.card.dialogues[split, kind] = Dialogues(len(found))
            for dialogue in tqdm(found, f"{split}, {kind}", disable=None, leave=False):
                self._uses[dialogue["image"]] += 1
                if dialogue["conversations"]:
                    counts.turns.append(len(dialogue["conversations"]))
                if split != SPLITS[0] or dialogue["id"] in tested:
                    continue
                try:
                    samples = list(iterate_samples([dialogue], self.roots.characters))
                except MMRoleError:  # data_utils.check says why
                    counts.unusable += 1
                    continue
                for sample in samples:
                    self._measure(sample, "training", kind)

    def _measure(self, sample: Mapping[str, Any], part: str, kind: str) -> None:
        lengths = self.card.samples.setdefault((part, kind), Lengths())
        user, assistant = sample["conversations"]
        lengths.prompts.append(self._lengths.prompt(user["value"]))
        lengths.answers.append(self._lengths.count(assistant["value"]))

    def images(self) -> None:
        files = {name for name, _ in images_below(self.root)}
        by_source: dict[str, list[str]] = {}
        for name in sorted(files | self._uses.keys()):
            by_source.setdefault(name.split("/")[0] if "/" in name else ".", []).append(name)
        folder = self.root / "images"
        for source, names in by_source.items():
            used = [name for name in names if name in self._uses]
            # A linked folder, such as a copy of COCO's, is not searched, but what is referred to is found in it.
            present = sum(name in files or find_image(folder, name, follow_links=True) is not None for name in used)
            dialogues = sum(self._uses[name] for name in used)
            self.card.images[source] = (len(used), present, len(names) - len(used), dialogues)
