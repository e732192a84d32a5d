"""Keys and values of requests in flight: each shared prefix once, each request's own tokens beside it.

Shapes: L layers, G groups of a block, R rows of a group, P prefix tokens, S own tokens, H heads, D width per head,
n rows of this step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

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


class Block:
    """Room for G groups of up to R rows: dense buffers, filled in place, never copied for a step.

    Args:
        shape: The model's.
        groups: G.
        rows: R.
        prefix: P, the longest prefix it can take.
        own: S to begin with: a request's tokens after its prefix, of prompt and answer together; grows when needed.
    """

    def __init__(self, shape: CacheShape, *, groups: int, rows: int, prefix: int, own: int) -> None:
        self.shape, self.groups, self.rows, self.prefix, self.own = shape, groups, rows, prefix, own
        self.prefix_keys, self.prefix_values = self._zeros(groups, prefix), self._zeros(groups, prefix)
        self.own_keys, self.own_values = self._zeros(groups * rows, own), self._zeros(groups * rows, own)
        self.free = list(range(groups))[::-1]
        self.prefix_lengths = [0] * groups

    def _zeros(self, entries: int, tokens: int) -> torch.Tensor:
        # Zeros, not whatever memory holds: masked places have weight 0, and 0 times NaN would still be NaN.
        shape = (self.shape.layers, entries, self.shape.heads, tokens, self.shape.width)
        return torch.zeros(shape, dtype=self.shape.dtype, device=self.shape.device)

    @staticmethod
    def tokens_for(groups: int, rows: int, prefix: int, own: int) -> int:
        """Tokens that a block of this size has room for."""
        return groups * (prefix + rows * own)

    @property
    def tokens(self) -> int:
        """Tokens it has room for now."""
        return self.tokens_for(self.groups, self.rows, self.prefix, self.own)

    @property
    def busy(self) -> int:
        """Groups in it."""
        return self.groups - len(self.free)

    def fits(self, prefix: int, rows: int) -> bool:
        """Whether a group of this size can be taken in."""
        return bool(self.free) and prefix <= self.prefix and rows <= self.rows

    def take(self, prefix: int) -> int:
        """Gives a free place to a group whose prefix has so many tokens."""
        place = self.free.pop()
        self.prefix_lengths[place] = prefix
        return place

    def release(self, place: int) -> None:
        """Takes a place back."""
        self.free.append(place)
        self.prefix_lengths[place] = 0

    def grown(self, own: int) -> int:
        """The own size it would take so that `own` tokens fit, at least half as much again as now."""
        return self.own if own <= self.own else max(own, self.own + OWN_STEP, self.own * 3 // 2)

    def grow(self, own: int) -> None:
        """Makes room for `own` tokens of each row: a copy, but a rarer one each time."""
        more = self.grown(own) - self.own
        if more > 0:
            self.own_keys = F.pad(self.own_keys, (0, 0, 0, more))
            self.own_values = F.pad(self.own_values, (0, 0, 0, more))
            self.own += more

    def keep(self, groups: Sequence[int]) -> None:
        """Moves the groups that are left together, in that order, and gives the rest of the room back."""
        chosen = torch.tensor(groups, device=self.shape.device)
        rows = (chosen[:, None] * self.rows + torch.arange(self.rows, device=self.shape.device)).flatten()
        self.prefix_keys, self.prefix_values = self.prefix_keys[:, chosen], self.prefix_values[:, chosen]
        self.own_keys, self.own_values = self.own_keys[:, rows], self.own_values[:, rows]
        self.prefix_lengths = [self.prefix_lengths[g] for g in groups]
        self.groups, self.free = len(groups), []

    def put_prefix(self, layer: int, group: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores a prefix's keys and values (H, P, D)."""
        self.prefix_keys[layer, group, :, : keys.shape[1]] = keys
        self.prefix_values[layer, group, :, : values.shape[1]] = values

    def attend_suffix(
        self,
        layer: int,
        group: int,
        row: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """A row's own prompt tokens, which read the group's prefix and then themselves causally.

        Args:
            layer: Which layer.
            group, row: Which row of which group.
            query, key, value: (1, H, T, D).
            scaling: What the scores are multiplied with.

        Returns:
            (1, H, T, D).
        """
        T, length, place = query.shape[2], self.prefix_lengths[group], group * self.rows + row
        self.own_keys[layer, place, :, :T] = key[0]
        self.own_values[layer, place, :, :T] = value[0]
        prefix = (self.prefix_keys, self.prefix_values)
        key, value = (
            torch.cat([t[layer, group, None, :, :length], own], dim=2)  # (1, H, P + T, D)
            for t, own in zip(prefix, (key, value), strict=True)
        )
        # Aligned at the lower right, a query reads the whole prefix and the row's tokens up to itself.
        mask = causal_lower_right(T, length + T)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)

    def step(self, rows: Sequence[int], own_lengths: Sequence[int]) -> "BlockStep":
        """Prepares one decoding step of some of its rows (their places in the block, and tokens they have so far)."""
        self.grow(max(own_lengths) + 1)
        return BlockStep(self, rows, own_lengths)


class BlockStep:
    """One decoding step of a block: the same places and masks for all layers.

    The scores over the prefix are a matrix product of all of a group's rows with keys that are read once; those over a
    row's own tokens stand beside them, and one softmax goes over both.
    """

    def __init__(self, block: Block, rows: Sequence[int], own_lengths: Sequence[int]) -> None:
        self.block, device = block, block.shape.device
        self.longest = max(block.prefix_lengths[row // block.rows] for row in rows)
        self.own = max(own_lengths) + 1
        self.rows = torch.tensor(rows, device=device)
        self.places = torch.tensor(own_lengths, device=device)
        lengths = torch.tensor(block.prefix_lengths, device=device)
        no_prefix = torch.arange(self.longest, device=device) >= lengths[:, None]  # (G, P)
        counts = torch.zeros(block.groups * block.rows, dtype=torch.long, device=device)
        counts[self.rows] = self.places + 1
        no_own = torch.arange(self.own, device=device) >= counts[:, None]  # (G * R, S)
        G, R = block.groups, block.rows
        masked = [no_prefix[:, None].expand(G, R, -1), no_own.view(G, R, -1)]
        self.masked = torch.cat(masked, dim=-1)[:, None]  # (G, 1, R, P + S)
        self._all_rows = len(rows) == G * R and list(rows) == list(range(G * R))

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Stores the new keys and values and attends.

        Args:
            layer: Which layer.
            query, key, value: (n, H, D), the block's rows of this step in order.
            scaling: What the scores are multiplied with.

        Returns:
            (n, H, D).
        """
        block = self.block
        G, R, H, D = block.groups, block.rows, block.shape.heads, block.shape.width
        block.own_keys[layer][self.rows, :, self.places] = key
        block.own_values[layer][self.rows, :, self.places] = value
        if not self._all_rows:
            query = query.new_zeros(G * R, H, D).index_copy_(0, self.rows, query)
        by_group = query.view(G, R, H, D).transpose(1, 2)  # (G, H, R, D)
        prefix_keys = block.prefix_keys[layer, :, :, : self.longest]  # (G, H, P, D)
        own_keys = block.own_keys[layer, :, :, : self.own]  # (G * R, H, S, D)
        on_prefix = _scores(by_group, prefix_keys, scaling)  # (G, H, R, P)
        on_own = _scores(query[:, :, None], own_keys, scaling)  # (G * R, H, 1, S)
        on_own = on_own.view(G, R, H, -1).transpose(1, 2)  # (G, H, R, S)
        scores = torch.cat([on_prefix, on_own], dim=-1).masked_fill_(self.masked, torch.finfo(torch.float32).min)
        weights = scores.softmax(dim=-1).to(value.dtype)  # (G, H, R, P + S)
        out = weights[..., : self.longest] @ block.prefix_values[layer, :, :, : self.longest]  # (G, H, R, D)
        own_weights = weights[..., self.longest :].transpose(1, 2).reshape(G * R, H, 1, -1)
        own_out = own_weights @ block.own_values[layer, :, :, : self.own]  # (G * R, H, 1, D)
        out = out.transpose(1, 2) + own_out.view(G, R, H, D)  # (G, R, H, D)
        return out.reshape(G * R, H, D) if self._all_rows else out.reshape(G * R, H, D)[self.rows]


def _scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """query @ key^T * scaling in float32: (…, R, D) and (…, T, D) to (…, R, T)."""
    if query.dtype == torch.float32:
        return (query * scaling) @ key.transpose(-1, -2)
    if query.is_cuda:  # the products are summed in float32 anyway; here the sums are kept so
        flat = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        return flat.view(*query.shape[:-1], key.shape[-2]) * scaling
    return (query @ key.transpose(-1, -2)).float() * scaling
