"""Keys and values of requests in flight: each shared prefix once, each request's own tokens beside it.

Shapes: L layers, G groups and N rows that a block has room for, P prefix tokens, S own tokens, H heads, D width per
head; g groups and n rows in flight, R the most of them that are of one group.
"""

from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
import torch.nn.functional as F

from qwen_vl.engine.attention import join, partial_attention

ALONE = "out of memory, even alone"
_MESSAGES = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
OWN_STEP = 64  # tokens by which a block's own part grows at the least


@dataclass(frozen=True)
class CacheShape:
    """What every block of a model shares: L, H, D, dtype and device."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.heads * self.width * self.dtype.itemsize


class HeldRow(Protocol):
    """A request whose own tokens lie in a block."""

    place: int  # which of the block's rows; the block sets it
    own: int  # tokens that have keys and values there


class HeldGroup(Protocol):
    """Requests whose common prefix lies in a block."""

    place: int  # which of the block's prefixes; the block sets it
    shared: int  # tokens of the prefix
    members: list[HeldRow]


class Block:
    """Room for G groups and their N rows: dense buffers, filled in place, never copied for a step.

    Prefixes and rows in flight always are the first ones: who leaves is replaced by the last, so that a step reads
    nothing of those that are finished.

    Args:
        shape: The model's.
        groups: G.
        rows: N, of all groups together.
        prefix: P, the longest prefix it can take.
        own: S to begin with: a request's tokens after its prefix, of prompt and answer together; grows when needed.
    """

    def __init__(self, shape: CacheShape, *, groups: int, rows: int, prefix: int, own: int) -> None:
        self.shape, self.groups, self.rows, self.prefix, self.own = shape, groups, rows, prefix, own
        self.prefix_keys, self.prefix_values = self._zeros(groups, prefix), self._zeros(groups, prefix)
        self.own_keys, self.own_values = self._zeros(rows, own), self._zeros(rows, own)
        self.held_groups: list[HeldGroup] = []
        self.held_rows: list[tuple[HeldGroup, HeldRow]] = []

    def _zeros(self, entries: int, tokens: int) -> torch.Tensor:
        # Zeros, not whatever memory holds: masked places have weight 0, and 0 times NaN would still be NaN.
        shape = (self.shape.layers, entries, self.shape.heads, tokens, self.shape.width)
        return torch.zeros(shape, dtype=self.shape.dtype, device=self.shape.device)

    @staticmethod
    def tokens_for(groups: int, rows: int, prefix: int, own: int) -> int:
        """Tokens that a block of this size has room for."""
        return groups * prefix + rows * own

    @property
    def tokens(self) -> int:
        """Tokens it has room for now."""
        return self.tokens_for(self.groups, self.rows, self.prefix, self.own)

    def fits(self, group: HeldGroup) -> bool:
        """Whether there are places for a group and its rows."""
        places = len(self.held_groups) < self.groups and len(self.held_rows) + len(group.members) <= self.rows
        return places and group.shared <= self.prefix

    def take(self, group: HeldGroup) -> None:
        """Gives a group and its rows their places, the rows one after the other."""
        group.place = len(self.held_groups)
        self.held_groups.append(group)
        for row in group.members:
            row.place = len(self.held_rows)
            self.held_rows.append((group, row))

    def leave(self, row: HeldRow) -> None:
        """Takes a row out; the last one moves to its place."""
        last_group, last = self.held_rows.pop()
        if last is not row:
            for buffer in (self.own_keys, self.own_values):
                buffer[:, row.place, :, : last.own] = buffer[:, last.place, :, : last.own]
            last.place = row.place
            self.held_rows[row.place] = (last_group, last)
        row.place = -1

    def release(self, group: HeldGroup) -> None:
        """Takes a group out that has no rows here any more; the last one moves to its place."""
        last = self.held_groups.pop()
        if last is not group:
            for buffer in (self.prefix_keys, self.prefix_values):
                buffer[:, group.place, :, : last.shared] = buffer[:, last.place, :, : last.shared]
            last.place = group.place
            self.held_groups[group.place] = last
        group.place = -1

    @property
    def wanted(self) -> int:
        """Own size that the next step needs."""
        return max((row.own for _, row in self.held_rows), default=0) + 1

    def grown(self, own: int) -> int:
        """The own size it would take so that `own` tokens fit, at least a quarter as much again as now."""
        return self.own if own <= self.own else max(own, self.own + OWN_STEP, self.own * 5 // 4)

    def growth(self, own: int) -> int:
        """Tokens by which it would grow so that each row has room for `own`."""
        return (self.grown(own) - self.own) * self.rows

    def grow(self, own: int) -> None:
        """Makes room for `own` tokens of each row: a copy, but a rarer one each time."""
        more = self.grown(own) - self.own
        if more > 0:
            self.own_keys, self.own_values = (F.pad(t, (0, 0, 0, more)) for t in (self.own_keys, self.own_values))
            self.own += more

    def shrink(self) -> int:
        """Gives back the room of groups and rows that it does not hold; how many tokens that is."""
        before, self.groups, self.rows = self.tokens, len(self.held_groups), len(self.held_rows)
        shrunk = before - self.tokens_for(self.groups, self.rows, self.prefix, self.own)
        if shrunk:
            self.prefix_keys = self.prefix_keys[:, : self.groups].clone()
            self.prefix_values = self.prefix_values[:, : self.groups].clone()
            self.own_keys, self.own_values = (
                self.own_keys[:, : self.rows].clone(),
                self.own_values[:, : self.rows].clone(),
            )
        return shrunk

    def put_prefix(self, layer: int, group: HeldGroup, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores a prefix's keys and values (H, P, D)."""
        self.prefix_keys[layer, group.place, :, : keys.shape[1]] = keys
        self.prefix_values[layer, group.place, :, : values.shape[1]] = values

    def put_own(self, layer: int, row: HeldRow, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores the keys and values (H, T, D) of what a row's prompt has after the prefix."""
        self.own_keys[layer, row.place, :, : keys.shape[1]] = keys
        self.own_values[layer, row.place, :, : values.shape[1]] = values

    def read_prefix(
        self, layer: int, group: HeldGroup, query: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial attention of queries (1, H, T, D) to a group's whole prefix."""
        keys, values = (t[layer, group.place, None, :, : group.shared] for t in (self.prefix_keys, self.prefix_values))
        return partial_attention(query, keys, values, scaling)

    def step(self) -> "BlockStep":
        """Prepares one decoding step of all its rows."""
        self.grow(self.wanted)
        return BlockStep(self)


class BlockStep:
    """One decoding step of a block's rows, in the order of their places; the same places and masks for all layers.

    A prefix is read once for all rows of its group; what comes of it is joined with a row's own tokens.
    """

    def __init__(self, block: Block) -> None:
        self.block, shape = block, block.shape
        own = [row.own for _, row in block.held_rows]
        shared = [group.shared for group in block.held_groups]
        self.n, self.g = len(own), len(shared)
        self.longest_own, self.longest_prefix = max(own) + 1, max(shared)
        ranks, counts = [], [0] * self.g
        for group, _ in block.held_rows:
            ranks.append(counts[group.place])
            counts[group.place] += 1
        self.most = max(counts)  # rows of a group
        places = [group.place * self.most + rank for (group, _), rank in zip(block.held_rows, ranks, strict=True)]
        self.places = None  # rows lie as their groups need them
        if places != list(range(self.g * self.most)):
            self.places = torch.tensor(places, device=shape.device)
        self.rows = torch.arange(self.n, device=shape.device)
        self.ends = torch.tensor(own, device=shape.device)
        self.own_mask = self._mask(self.ends + 1, self.longest_own)  # (n, 1, 1, S)
        lengths = torch.tensor(shared, device=shape.device)
        alike = min(shared) == self.longest_prefix
        self.prefix_mask = None if alike else self._mask(lengths, self.longest_prefix)  # (g, 1, 1, P)

    def _mask(self, lengths: torch.Tensor, longest: int) -> torch.Tensor:
        dtype = self.block.shape.dtype
        beyond = torch.arange(longest, device=lengths.device) >= lengths[:, None]
        return torch.zeros(beyond.shape, dtype=dtype, device=lengths.device).masked_fill_(
            beyond, torch.finfo(dtype).min
        )[:, None, None]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Stores the new keys and values and attends.

        Args:
            layer: Which layer.
            query, key, value: (n, H, D), by place.
            scaling: What the scores are multiplied with.

        Returns:
            (n, H, D).
        """
        block, (n, H, D) = self.block, query.shape
        block.own_keys[layer][self.rows, :, self.ends] = key
        block.own_values[layer][self.rows, :, self.ends] = value
        own = (t[layer, :n, :, : self.longest_own] for t in (block.own_keys, block.own_values))
        own_out, own_lse = partial_attention(query[:, :, None], *own, scaling, mask=self.own_mask)  # (n, H, 1, D)
        by_group = query
        if self.places is not None:
            by_group = query.new_zeros(self.g * self.most, H, D).index_copy_(0, self.places, query)
        by_group = by_group.view(self.g, self.most, H, D).transpose(1, 2)  # (g, H, R, D)
        prefix = (t[layer, : self.g, :, : self.longest_prefix] for t in (block.prefix_keys, block.prefix_values))
        out, lse = partial_attention(by_group, *prefix, scaling, mask=self.prefix_mask)
        out, lse = (t.transpose(1, 2).flatten(0, 1) for t in (out, lse))
        if self.places is not None:
            out, lse = out[self.places], lse[self.places]  # (n, H, D), (n, H)
        return join(out, lse, own_out[:, :, 0], own_lse[:, :, 0])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a GPU's or the machine's."""
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in _MESSAGES)


def free_bytes(device: torch.device) -> float:
    """Bytes that may be used: nine tenths of what a GPU has free, half of what the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 0.9
    return psutil.virtual_memory().available * 0.5
