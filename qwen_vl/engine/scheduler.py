"""Requests on their way through the engine: waiting, in groups that share a prefix, and in flight."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from qwen_vl.engine.cache import Block, CacheShape
from qwen_vl.engine.image_cache import image_key
from qwen_vl.engine.sampling import RequestGenerator
from qwen_vl.sampling_params import SamplingSettings
from qwen_vl.vision import QUERIES

BLOCK_ROWS = 128  # of a block that is made anew: more would lie about half empty, fewer cost calls
RESERVE = 0.1  # of the budget, for answers that become longer than expected
MOST_ROWS = 16  # prompts that share one prefix
LEAST_SHARE = 1 / 8  # of the longer prompt: to save less, rows of all lengths would lie beside each other
LEAST_SHARED = 32  # tokens: a shorter common beginning is not worth a group of its own
ALIKE = 0.75  # of a block's longest prefix: a shorter one would leave too much of its place empty


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

    def comparable(self, numbers: dict[Hashable, int]) -> np.ndarray:
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
    features: dict[Hashable, torch.Tensor] = field(default_factory=dict)  # of its images, until it is prefilled

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
    crowded: bool = False  # rows were sent back for want of room: nobody comes in before a group has left

    @property
    def rows(self) -> int:
        return sum(len(group.open) for group in self.groups)

    @property
    def tokens(self) -> int:
        return sum(block.tokens for block in self.blocks)

    def place(self, group: Group, shape: CacheShape, budget: int, answer: int) -> bool:
        """Puts a group that waits into a block that is there, or into a new one.

        Args:
            group: The first that waits.
            shape: Of new blocks.
            budget: Tokens that all blocks may have room for.
            answer: Tokens that an answer is expected to have.

        Returns:
            Whether there was room; alone in flight, a group is always placed.
        """
        fitting = [block for block in self.blocks if block.fits(group)]
        for block in sorted(fitting, key=lambda block: block.prefix):
            growth = block.growth(group.suffix + 1)
            if not growth or self.tokens + growth <= budget:
                break
        else:
            block = self._new_block(shape, budget, answer)
            if block is None:
                return False
            self.blocks.append(block)
        block.take(group)
        group.block = block
        self.groups.append(group)
        return True

    def _new_block(self, shape: CacheShape, budget: int, answer: int) -> Block | None:
        """A block for as many of the groups that come next, and are about as long, as fit into the budget."""
        first, left = self.waiting[0], budget * (1 - RESERVE) - self.tokens
        groups = rows = own = tokens = 0
        for group in self.waiting:
            members, longest = rows + len(group.members), max(own, group.suffix + answer)
            size = Block.tokens_for(groups + 1, members, first.shared, longest)
            unlike = not first.shared >= group.shared >= first.shared * ALIKE
            if groups and (members > BLOCK_ROWS or unlike or size > left):
                break
            groups, rows, own, tokens = groups + 1, members, longest, size
        if tokens > left and self.groups:
            return None
        return Block(shape, groups=groups, rows=rows, prefix=first.shared, own=own)

    def make_growth(self, budget: int) -> list[Row]:
        """Sees to it that every row has room for one more token within the budget.

        Where it is short, room that nobody uses is given back, and then the youngest groups are taken out, but for
        the last one: that grows whatever the budget says.

        Returns:
            Rows that were taken out.
        """
        back: list[Row] = []
        for block in list(self.blocks):
            while self.tokens + block.growth(block.wanted) > budget and block.growth(block.wanted):
                if sum(other.shrink() for other in self.blocks):
                    continue
                if len(self.groups) == 1 or block not in self.blocks:
                    break
                back += self.groups[-1].open
                self.release(self.groups[-1])
                self.crowded = True
            if block in self.blocks:
                block.grow(block.wanted)
        return back

    def finish(self, group: Group, row: Row) -> None:
        """Takes a row out that has its answer, and its group when it was the last."""
        group.open.remove(row)
        group.block.leave(row)
        if not group.open:
            self.release(group)
            self.crowded = False

    def release(self, group: Group) -> None:
        """Takes a group out, with the rows that are not finished; a block that nobody uses is given back."""
        for row in group.open:
            group.block.leave(row)
        self.groups.remove(group)
        group.block.release(group)
        if not group.block.held_groups:
            self.blocks.remove(group.block)
        group.block = None


def image_places(ids: np.ndarray, start_id: int) -> np.ndarray:
    """image * 256 + feature at each place where an image's features stand, -1 elsewhere."""
    places = np.full(len(ids), -1, dtype=np.int64)
    for image, start in enumerate(np.flatnonzero(ids == start_id)):
        places[start + 1 : start + 1 + QUERIES] = image * QUERIES + np.arange(QUERIES)
    return places


@dataclass(frozen=True)
class PrefixGroup:
    """Prompts (by number) that begin with the same `shared` tokens; a prompt alone shares all of itself."""

    members: tuple[int, ...]
    shared: int


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements two integer arrays share."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def group_by_prefix(prompts: Sequence[np.ndarray], kinds: Sequence[float], most: int = MOST_ROWS) -> list[PrefixGroup]:
    """Divides prompts into groups that share a prefix, so that few tokens are computed.

    Sorted prompts have their longest common prefixes with their neighbours. A group grows as long as that saves more
    than beginning a new one there; one token at least is left to each member, whose logits begin its answer.

    Args:
        prompts: Integer arrays; images are numbers of their own in them.
        kinds: Prompts of different kinds (rotary alphas) share nothing.
        most: Prompts of a group.

    Returns:
        Every prompt in exactly one group; members keep the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: (kinds[i], prompts[i].astype(">i8").tobytes()))
    with_next = [_shareable(prompts, kinds, a, b) for a, b in pairwise(order)] + [0]
    groups: list[PrefixGroup] = []
    start = 0
    while start < len(order):
        end, shared = _grow(with_next, start, most)
        members = tuple(sorted(order[start:end]))
        groups.append(PrefixGroup(members, shared if len(members) > 1 else len(prompts[members[0]])))
        start = end
    return groups


def _shareable(prompts: Sequence[np.ndarray], kinds: Sequence[float], a: int, b: int) -> int:
    if kinds[a] != kinds[b]:
        return 0
    common = min(common_prefix(prompts[a], prompts[b]), len(prompts[a]) - 1, len(prompts[b]) - 1)
    return common if common >= max(len(prompts[a]), len(prompts[b])) * LEAST_SHARE else 0


def _grow(with_next: Sequence[int], start: int, most: int) -> tuple[int, int]:
    """End of the group that begins at `start`, and what it shares."""
    shared, size = 0, 1
    while start + size < len(with_next) + 1 and size < most:
        nearest = with_next[start + size - 1]
        joined = nearest if size == 1 else min(shared, nearest)
        alone = (size - 1) * shared + with_next[start + size] if start + size < len(with_next) else (size - 1) * shared
        if joined < LEAST_SHARED or size * joined < alone:
            break
        shared, size = joined, size + 1
    return start + size, shared
