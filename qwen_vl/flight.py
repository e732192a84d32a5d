"""Requests on their way through the engine: single, in groups that share a prefix, waiting and in flight."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_vl.blocks import Block
from qwen_vl.sampling import RequestGenerator, SamplingSettings
from qwen_vl.vision import QUERIES


@dataclass(eq=False)
class Row:
    """A request on its way: its prompt, where its keys and values lie, and what it has answered so far."""

    request: Any
    number: int
    ids: np.ndarray  # (prompt,) token ids
    image_places: np.ndarray  # (prompt,) image * 256 + feature where an image stands, else -1
    images: list[Any]  # what each image is opened from
    alpha: float
    sampling: SamplingSettings
    generator: RequestGenerator
    limit: int
    stops: frozenset[int]
    answer: list[int] = field(default_factory=list)
    place: int = -1  # among the rows of its group's block
    own: int = 0  # tokens after the shared prefix that have keys and values

    def comparable(self, numbers: dict[Any, int]) -> np.ndarray:
        """The prompt with each image's places numbered by the image: equal numbers where the computation is equal.

        Args:
            numbers: An image's key to its number; added to.
        """
        comparable = self.ids.copy()
        for i, image in enumerate(self.images):
            number = numbers.setdefault(image_key(image), len(numbers))
            here = self.image_places // QUERIES == i
            comparable[here] = -1 - number * QUERIES - (self.image_places[here] - i * QUERIES)
        return comparable

    def restart(self) -> None:
        """Forgets the answer; what it will be the next time is the same."""
        self.answer, self.own, self.generator = [], 0, self.generator.restarted()


@dataclass(eq=False)
class Group:
    """Sequences that share their first `shared` tokens, and their place in a block."""

    members: list[Row]
    shared: int
    block: Block | None = None
    place: int = -1  # among the prefixes of its block
    open: list[Row] = field(default_factory=list)  # members that are not finished

    def __post_init__(self) -> None:
        self.open = list(self.members)

    @property
    def alone(self) -> bool:
        """Whether all of the one prompt is the prefix."""
        return self.shared == len(self.members[0].ids)

    @property
    def suffix(self) -> int:
        """The longest of the members' prompts after the prefix, in tokens."""
        return max(len(member.ids) for member in self.members) - self.shared


@dataclass
class Flight:
    """Groups in flight and waiting, and the blocks that hold the former."""

    waiting: list[Group] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    images: dict[Any, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(len(group.open) for group in self.groups)

    @property
    def tokens(self) -> int:
        return sum(block.tokens for block in self.blocks)

    def place(self, group: Group, block: Block) -> None:
        """Puts a group into a block."""
        block.take(group)
        group.block = block
        self.groups.append(group)

    def finish(self, group: Group, row: Row) -> None:
        """Takes a row out that has its answer, and its group when it was the last."""
        group.open.remove(row)
        group.block.leave(row)
        if not group.open:
            self.release(group)

    def release(self, group: Group) -> None:
        """Takes a group out, with the rows that are not finished; a block that nobody uses is given back."""
        for row in group.open:
            group.block.leave(row)
        self.groups.remove(group)
        group.block.release(group)
        if not group.block.held_groups:
            self.blocks.remove(group.block)
        group.block = None


def image_key(image: Any) -> Any:
    """What tells images apart: the path of a file, else the object itself."""
    return str(image) if isinstance(image, str | Path) else id(image)


def image_places(ids: np.ndarray, start_id: int) -> np.ndarray:
    """image * 256 + feature at each place where an image's features stand, -1 elsewhere."""
    places = np.full(len(ids), -1, dtype=np.int64)
    for image, start in enumerate(np.flatnonzero(ids == start_id)):
        places[start + 1 : start + 1 + QUERIES] = image * QUERIES + np.arange(QUERIES)
    return places
