"""The order in which samples train, the groups over which their loss is a mean, and the samples to evaluate on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from qwen_vl.loss import IGNORED


def filled_length(samples: int, multiple: int) -> int:
    """Samples after filling up to a multiple."""
    return math.ceil(samples / multiple) * multiple


@dataclass(frozen=True)
class Order:
    """The stream of samples: one permutation per epoch, filled up by repeating its own beginning, epochs joined.

    published: update u takes positions u * step to (u + 1) * step - 1 of the stream; there are epochs * floor(filled /
    step) updates, so none is incomplete, on any number of processes.

    Attributes:
        samples: Samples of the training file.
        multiple: Every epoch is filled up to a multiple of this.
        step: Samples of an update.
        epochs: Epochs to train; may be a fraction.
        max_steps: Updates, if above 0; then the epochs do not count.
        seed: With the number of the epoch it decides its permutation; None keeps the order of the file.
    """

    samples: int
    multiple: int
    step: int
    epochs: float
    max_steps: int
    seed: int | None

    @property
    def filled(self) -> int:
        """Samples of an epoch."""
        return filled_length(self.samples, self.multiple)

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * (self.filled // self.step))

    def ends_epoch(self, update: int) -> bool:
        """Whether the next update begins in another epoch, or there is none; the released trainer saves there.

        Args:
            update: Updates done.
        """
        epoch = max(1, math.ceil(update * self.step / self.filled))
        return update >= self.updates or epoch * self.filled < (update + 1) * self.step

    def sample(self, position: int) -> int:
        """Index in the training file of the sample at a position of the stream."""
        epoch, place = divmod(position, self.filled)
        place %= self.samples
        return place if self.seed is None else int(_permutation(self.samples, self.seed, epoch)[place])


@lru_cache(maxsize=2)
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(samples)


class Stream(Dataset):
    """The samples of a whole run by their position in the stream, which each carries as `position`.

    Args:
        dataset: The training samples.
        order: Their order.
    """

    def __init__(self, dataset: Dataset, order: Order) -> None:
        self.dataset = dataset
        self.order = order

    def __len__(self) -> int:
        return self.order.updates * self.order.step

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.dataset[self.order.sample(position)], "position": position}


class FilledDataset(Dataset):
    """Samples to evaluate on, filled up so that every process gets equally many batches; what is added has no labels.

    Args:
        dataset: The samples.
        multiple: What their number is filled up to a multiple of.
    """

    def __init__(self, dataset: Dataset, multiple: int) -> None:
        self.dataset = dataset
        self.multiple = multiple

    def __len__(self) -> int:
        return filled_length(len(self.dataset), self.multiple)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index % len(self.dataset)]
        if index < len(self.dataset):
            return sample
        return {**sample, "labels": [IGNORED] * len(sample["labels"])}


@dataclass(frozen=True)
class StreamCollator:
    """Collates samples of a stream, and notes where each stands in it and how many of its tokens are supervised.

    Attributes:
        collate: Makes the batch itself.
    """

    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        supervised = [sum(label != IGNORED for label in sample["labels"][1:]) for sample in samples]
        positions = [sample["position"] for sample in samples]
        return {
            **self.collate(samples),
            "positions": torch.tensor(positions),
            "supervised": torch.tensor(supervised),
        }


def loss_divisors(
    batches: Sequence[Mapping[str, Any]],
    *,
    step: int,
    group: int,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """What to divide the loss of each sample's tokens by, so that an update's sum is its loss.

    published: the loss of an update is the mean over its groups of the mean over each group's supervised tokens. A
    sample that comes twice counts twice, a group without supervised tokens counts 0.

    Args:
        batches: This process's micro-batches of an update, as `StreamCollator` makes them.
        step: Samples of an update, over all processes.
        group: Consecutive samples of the stream that are a group.
        sum_over_processes: Sums a tensor over all processes.

    Returns:
        Per micro-batch int64 (samples,).
    """
    groups = [batch["positions"] % step // group for batch in batches]
    tokens = torch.zeros(step // group, dtype=torch.long, device=groups[0].device)
    for place, batch in zip(groups, batches, strict=True):
        tokens.index_add_(0, place, batch["supervised"])
    divisors = len(tokens) * sum_over_processes(tokens).clamp(min=1)
    return [divisors[place] for place in groups]
