"""What is found in training samples before the weights load: lengths, lost answers, images that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_utils.errors import MMRoleError, shown
from data_utils.supervised import SupervisedDataset, image_names, image_path
from qwen_vl import QwenVLTokenizer
from qwen_vl.loss import IGNORED

_WHOLE = 1 << 30  # tokens: more than any sample has
_LISTED = 10


@dataclass
class DataFacts:
    """What a training file holds, counted over the whole of it.

    Attributes:
        samples: Its samples.
        tokens: Tokens that are kept of them.
        longest: Tokens of the longest, before it is cut.
        too_long: Ids of the samples that are cut.
        answer_cut: Ids of those that lose a part of their answer.
        answer_lost: Ids of those that lose all of it: they train on control tokens only.
        no_answer: Ids of those that have none to begin with, and so do too.
        answered: Samples of which at least a token of an answer is kept.
    """

    samples: int = 0
    tokens: int = 0
    longest: int = 0
    too_long: list[str] = field(default_factory=list)
    answer_cut: list[str] = field(default_factory=list)
    answer_lost: list[str] = field(default_factory=list)
    no_answer: list[str] = field(default_factory=list)
    answered: int = 0

    def add(self, other: DataFacts) -> None:
        """Counts another share in."""
        self.samples += other.samples
        self.tokens += other.tokens
        self.longest = max(self.longest, other.longest)
        self.too_long += other.too_long
        self.answer_cut += other.answer_cut
        self.answer_lost += other.answer_lost
        self.no_answer += other.no_answer
        self.answered += other.answered

    def told(self, max_length: int) -> str:
        """One to three lines for people."""
        mean = self.tokens / max(self.samples, 1)
        text = f"{self.samples:,} samples, {mean:,.0f} tokens on average, the longest {self.longest:,}"
        if self.too_long:
            text += (
                f"\n{len(self.too_long):,} are longer than {max_length:,} tokens and are cut: {len(self.answer_cut):,} "
                f"lose a part of their answer, {len(self.answer_lost):,} all of it"
            )
            lost = [*self.answer_lost, *self.answer_cut]
            if lost:
                text += f" ({_listed(lost)}); a larger --model_max_length keeps them"
        if self.no_answer:
            text += f"\n{len(self.no_answer):,} have no answer to learn from ({_listed(self.no_answer)})"
        return text

    def counts(self) -> dict[str, int]:
        """The counts, for `training.json`."""
        return {name: len(value) if isinstance(value, list) else value for name, value in asdict(self).items()}


def check_samples(
    dataset: SupervisedDataset, source: Path, first: int = 0, step: int = 1
) -> tuple[DataFacts, list[MMRoleError]]:
    """Tokenizes samples and opens their images, each image once.

    Args:
        dataset: The samples.
        source: Their file, for the messages.
        first: This process's first sample.
        step: From each of its samples to the next.

    Returns:
        Facts about its share, and a problem per sample that cannot be made and per image that cannot be used.
    """
    facts, problems = DataFacts(), []
    users: dict[str, list[str]] = {}
    share = range(first, len(dataset), step)
    for index in tqdm(share, desc=f"checking {source.name}", disable=None if first == 0 else True, leave=False):
        name = dataset.rows[index]["id"]
        try:
            ids, labels = dataset.tokens(index, _WHOLE)
            kept = ids if len(ids) <= dataset.max_length else dataset.tokens(index)[0]
        except ValueError as error:
            problems.append(MMRoleError(str(error), name, source, "correct or remove the sample"))
            continue
        _count(facts, name, labels, len(kept), dataset.tokenizer)
        for image in image_names(kept, dataset.tokenizer):
            users.setdefault(image, []).append(name)
    for image, samples in tqdm(users.items(), desc="opening images", disable=None if first == 0 else True, leave=False):
        problem = _image_problem(dataset, image, samples, source)
        if problem:
            problems.append(problem)
    return facts, problems


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:_LISTED])) + (", …" if len(names) > _LISTED else "")


def _count(facts: DataFacts, name: str, labels: Sequence[int], kept: int, tokenizer: QwenVLTokenizer) -> None:
    facts.samples += 1
    facts.tokens += kept
    facts.longest = max(facts.longest, len(labels))
    answer = answer_positions(labels, tokenizer)
    facts.answered += any(position < kept for position in answer)
    if not answer:
        facts.no_answer.append(name)
    if kept == len(labels):
        return
    facts.too_long.append(name)
    lost = sum(1 for position in answer if position >= kept)
    if lost:
        (facts.answer_lost if lost == len(answer) else facts.answer_cut).append(name)


def answer_positions(labels: Sequence[int], tokenizer: QwenVLTokenizer) -> list[int]:
    """Positions of what the assistant says: labels without the marks around each turn, which every turn has."""
    marks = (IGNORED, tokenizer.im_start_id, tokenizer.im_end_id)
    return [i for i, label in enumerate(labels) if label not in marks and labels[i - 1] != tokenizer.im_end_id]


def _image_problem(dataset: SupervisedDataset, image: str, samples: Sequence[str], source: Path) -> MMRoleError | None:
    where = f"{source}, sample {shown(samples[0])}" + (f" and {len(samples) - 1} more" if len(samples) > 1 else "")
    try:
        dataset.processor.load(image_path(dataset.data_root, image))
    except FileNotFoundError:
        fix = f"put it below {dataset.data_root.resolve()}, or give the right --data_root (DATA_ROOT)"
        return MMRoleError("an image is missing", image, where, fix)
    except MMRoleError as error:
        return MMRoleError(error.what, image, where, error.fix)
    except (OSError, ValueError) as error:
        return MMRoleError(f"an image is broken: {error}", image, where, "fetch it again")
    return None
