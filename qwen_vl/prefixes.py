"""Finds what prompts have in common, so that it is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MOST_ROWS = 16  # prompts that share one prefix
LEAST_SHARE = 1 / 8  # of the longer prompt: to save less, rows of all lengths would lie beside each other
LEAST_SHARED = 32  # tokens: a shorter common beginning is not worth a group of its own


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
