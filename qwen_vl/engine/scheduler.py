"""Waiting and running sequences, in groups that share a prefix, and the batch of the running ones."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from qwen_vl.engine.cache import Cache, Entry
from qwen_vl.engine.image_cache import image_key
from qwen_vl.engine.requests import Request, TextStream
from qwen_vl.engine.sampling import RequestGenerator
from qwen_vl.sampling_params import SamplingSettings
from qwen_vl.vision import QUERIES

MOST_ROWS = 16  # prompts that share one prefix
LEAST_SHARE = 1 / 8  # of the longer prompt; a shorter one would mix entries of all lengths in a block
LEAST_SHARED = 32  # tokens: a shorter common prefix is not worth a group
RESERVE = 0.1  # of the budget, for answers that become longer than expected
ALIKE = 0.75  # of a group's length: for those that wait and are shorter its block gets no places
GROWTH = 1.5  # an entry that is full moves to one with so many times the room


@dataclass(eq=False)
class Sequence:
    """A request in the engine: its prompt, and its answer so far."""

    request: Request
    number: int  # order of arrival
    prompt: np.ndarray  # (prompt,) token ids
    image_places: np.ndarray  # (prompt,) image * 256 + feature where an image stands, else -1
    images: list[object]  # what each image is opened from
    alpha: float
    sampling: SamplingSettings
    generator: RequestGenerator
    limit: int
    stops: frozenset[int]
    stream: TextStream
    answer: list[int] = field(default_factory=list)
    own: Entry | None = None  # keys and values of what comes after the shared prefix, while in flight

    def __len__(self) -> int:
        """Returns the number of tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Returns the ids of a stretch of prompt and answer."""
        if end <= len(self.prompt):
            return self.prompt[start:end]
        return np.concatenate([self.prompt, np.array(self.answer, dtype=np.int64)])[start:end]

    def comparable(self, numbers: dict[Hashable, int]) -> np.ndarray:
        """Returns the tokens, with positions of images numbered by image: equal numbers mean equal computation.

        Args:
            numbers: An image's key to its number; added to.
        """
        comparable = self.tokens(0, len(self)).copy()
        for i, image in enumerate(self.images):
            number = numbers.setdefault(image_key(image), len(numbers))
            here = np.flatnonzero(self.image_places // QUERIES == i)
            comparable[here] = -1 - number * QUERIES - (self.image_places[here] - i * QUERIES)
        return comparable


@dataclass(eq=False)
class Group:
    """Unfinished sequences that share their first `shared` tokens; one alone shares all that it has at its prefill."""

    members: list[Sequence]
    shared: int
    prefix: Entry | None = None  # keys and values of the shared tokens, while in flight
    features: dict[Hashable, torch.Tensor] = field(default_factory=dict)  # of its images, until it is prefilled

    @property
    def prefill_tokens(self) -> int:
        """Tokens that its prefill computes."""
        return self.shared + sum(len(member) - self.shared for member in self.members)

    @property
    def suffix(self) -> int:
        """The most tokens that a member has after the prefix."""
        return max(map(len, self.members)) - self.shared


class Batch:
    """The groups in flight, oldest first, and their keys and values.

    Args:
        prefixes: The cache for what groups share, empty.
        own: The cache for what sequences have after that, empty.

    Attributes:
        crowded: Sequences were sent back because memory was short: nothing is added before a group has left.
    """

    def __init__(self, prefixes: Cache, own: Cache) -> None:
        self.groups: list[Group] = []
        self.prefixes, self.own = prefixes, own
        self.crowded = False

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences, group by group."""
        return [member for group in self.groups for member in group.members]

    @property
    def tokens(self) -> int:
        """Tokens that its caches have room for."""
        return self.prefixes.tokens + self.own.tokens

    def add(self, group: Group, budget: int, answer: int, waiting: list[Group]) -> bool:
        """Gives a group its entries.

        Args:
            group: What comes in.
            budget: Tokens that the caches may have room for.
            answer: Expected tokens of an answer.
            waiting: The next of the groups that wait behind it: memory is taken for those of about its length as well.

        Returns:
            Whether there was room; an empty batch takes every group.
        """
        alike = [other for other in waiting if group.shared * ALIKE <= other.shared <= group.shared]
        count = 1 + len(alike if waiting else self.groups)
        placed = self._place(group, budget, answer, count, must=False)
        if not placed and not self.groups:
            placed = self._place(group, budget, 1, count, must=True)
        if placed:
            self.groups.append(group)
        return placed

    def _place(self, group: Group, budget: int, answer: int, count: int, *, must: bool) -> bool:
        placed, most = False, budget * (1 - RESERVE)
        try:
            group.prefix = self.prefixes.add(group.shared, count, budget, most - self.tokens, must=must)
            if group.prefix is None:
                return False
            group.prefix.length = group.shared
            room, count = group.suffix + answer, count * len(group.members)
            for member in group.members:
                member.own = self.own.add(room, count, budget, most - self.tokens, must=must)
                if member.own is None:
                    return False
                member.own.length = len(member) - group.shared
            placed = True
        finally:
            if not placed:
                self._free(group)
        return True

    def make_room(self, budget: int, back: list[Sequence]) -> None:
        """Gives every sequence room for one more token; where the budget is too small, the youngest leave.

        Args:
            budget: Tokens that the caches may have room for; the last sequence stays in any case.
            back: Gets the sequences that had to leave.
        """
        full = [member for member in self.sequences if member.own.length == member.own.room]
        for member in full:
            while member.own is not None:
                wanted = max(int(member.own.length * GROWTH), member.own.length + 1)
                must = len(self.sequences) == 1
                if grown := self.own.add(wanted, len(full), budget, budget - self.tokens, must=must):
                    grown.take(member.own)
                    self.own.free(member.own)
                    member.own = grown
                    break
                youngest = self.groups[-1]
                leaving = youngest.members[:] if len(self.groups) > 1 else youngest.members[-1:]
                back += leaving
                for other in leaving:
                    self.finish(youngest, other)
                self.crowded = True

    def finish(self, group: Group, member: Sequence) -> None:
        """Removes a finished sequence, and its group with the last one."""
        if len(group.members) == 1:
            self.release(group)
            self.crowded = False
            return
        group.members.remove(member)
        self.own.free(member.own)
        member.own = None

    def release(self, group: Group) -> None:
        """Removes a group."""
        self.groups.remove(group)
        self._free(group)

    def _free(self, group: Group) -> None:
        for member in group.members:
            if member.own is not None:
                self.own.free(member.own)
                member.own = None
        if group.prefix is not None:
            self.prefixes.free(group.prefix)
            group.prefix = None


def grouped(sequences: Iterable[Sequence], most: int, *, share: bool = True) -> list[Group]:
    """Divides sequences into groups, in the order of their work: those of about one length together.

    Args:
        sequences: Not in flight.
        most: Members of a group.
        share: False computes every prompt alone.
    """
    sequences = list(sequences)
    if share:
        numbers: dict[Hashable, int] = {}
        prompts, alphas = [s.comparable(numbers) for s in sequences], [s.alpha for s in sequences]
        found = group_by_prefix(prompts, alphas, min(most, MOST_ROWS))
        groups = [Group([sequences[i] for i in members], shared) for members, shared in found]
    else:
        groups = [Group([s], len(s)) for s in sequences]
    return sorted(groups, key=lambda g: (-len(g.members), -g.shared, g.members[0].number))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Returns how many leading elements two integer arrays share."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def group_by_prefix(
    prompts: list[np.ndarray], kinds: list[float], most: int = MOST_ROWS
) -> list[tuple[list[int], int]]:
    """Divides prompts into groups that share a prefix, so that few tokens are computed.

    Sorted prompts have their longest common prefixes with their neighbours. A group grows as long as that saves more
    than beginning a new one there; one token at least is left to each member, whose logits begin its answer.

    Args:
        prompts: Integer arrays, in which each image has its own numbers.
        kinds: Prompts of different kinds (rotary alphas) share nothing.
        most: Prompts of a group.

    Returns:
        Groups as (indices of prompts in ascending order, tokens shared): every prompt in exactly one. A prompt alone
        shares all of itself.
    """
    order = sorted(range(len(prompts)), key=lambda i: (kinds[i], prompts[i].astype(">i8").tobytes()))
    with_next = [_shareable(prompts, kinds, a, b) for a, b in pairwise(order)] + [0]
    groups: list[tuple[list[int], int]] = []
    start = 0
    while start < len(order):
        end, shared = _grow(with_next, start, most)
        members = sorted(order[start:end])
        groups.append((members, shared if len(members) > 1 else len(prompts[members[0]])))
        start = end
    return groups


def _shareable(prompts: list[np.ndarray], kinds: list[float], a: int, b: int) -> int:
    if kinds[a] != kinds[b]:
        return 0
    common = min(common_prefix(prompts[a], prompts[b]), len(prompts[a]) - 1, len(prompts[b]) - 1)
    return common if common >= max(len(prompts[a]), len(prompts[b])) * LEAST_SHARE else 0


def _grow(with_next: list[int], start: int, most: int) -> tuple[int, int]:
    """Returns the end of the group that begins at `start`, and what it shares."""
    shared, size = 0, 1
    while start + size < len(with_next) + 1 and size < most:
        nearest = with_next[start + size - 1]
        joined = nearest if size == 1 else min(shared, nearest)
        alone = (size - 1) * shared + with_next[start + size] if start + size < len(with_next) else (size - 1) * shared
        if joined < LEAST_SHARED or size * joined < alone:
            break
        shared, size = joined, size + 1
    return start + size, shared


def image_places(ids: np.ndarray, start_id: int) -> np.ndarray:
    """image * 256 + feature at each place where an image's features stand, -1 elsewhere."""
    places = np.full(len(ids), -1, dtype=np.int64)
    for image, start in enumerate(np.flatnonzero(ids == start_id)):
        places[start + 1 : start + 1 + QUERIES] = image * QUERIES + np.arange(QUERIES)
    return places
