"""The next token of each sequence: greedy, or drawn exactly as `generate()` draws it, for the whole batch at once.

Shapes: n rows, V rows of the head (ids without a token among them), U ids that have one; W candidates of a row.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import torch

from qwen_vl.sampling_params import SamplingSettings

CANDIDATES = 64  # W; top-p 0.3 rarely leaves more than a few
CHUNK = 128  # ids whose largest logit is found first
MARGIN = 1e-4  # of probability mass: nearer to the limit, rounding could decide, so the exact way is used


class RequestGenerator:
    """The random numbers of one request: those that `torch.multinomial` would use after `torch.manual_seed(seed)`.

    Each draw of `generate()` uses V exponential variates, whatever it chooses among. A draw is asked for by its number,
    so that one which is certain costs nothing unless a later one is not, and one that is repeated gives the same.

    Attributes:
        drawn: Draws that the generator is past.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._device = seed, device
        self._generator: torch.Generator | None = None
        self.drawn = 0

    def variates(self, draw: int, size: int, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the exponential variates of a draw, counted from 0, for these ids of `size`, or for all: float32."""
        if self._generator is None or draw < self.drawn:
            self._generator, self.drawn = torch.Generator(self._device).manual_seed(self._seed), 0
        suffice = numbers_suffice(self._device)
        values = torch.empty(size, dtype=torch.int64 if suffice else torch.float32, device=self._device)
        while self.drawn < draw:
            self._draw(values)
        values = values if ids is not None else torch.empty(size, device=self._device)
        self._draw(values)
        if ids is None:
            return values
        return _variates(values[ids]) if suffice else values[ids]

    def _draw(self, values: torch.Tensor) -> None:
        """Fills in the next draw's variates, or into int64 values the numbers behind them, in a fifth of the time."""
        if values.dtype == torch.int64:
            values.random_(generator=self._generator)
        else:
            values.exponential_(1, generator=self._generator)
        self.drawn += 1


def _variates(numbers: torch.Tensor) -> torch.Tensor:
    """What `exponential_` makes of random int64 numbers on a CPU."""
    return torch.tensor([-math.log1p(-(number & (2**53 - 1)) * 2.0**-53) for number in numbers.tolist()])


@lru_cache
def numbers_suffice(device: torch.device) -> bool:
    """Returns whether variates follow from random int64 numbers of the same generator, as on a CPU."""
    if device.type != "cpu":
        return False
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    expected = torch.empty(1000).exponential_(1, generator=one)
    numbers = torch.empty(1000, dtype=torch.int64).random_(generator=other)
    return torch.equal(_variates(numbers), expected) and torch.equal(one.get_state(), other.get_state())


def choose(
    logits: torch.Tensor,
    settings: Sequence[SamplingSettings],
    draws: Sequence[tuple[RequestGenerator, int]],
    used: int,
) -> list[int | None]:
    """Returns the next token of each row.

    Args:
        logits: (n, V) of the last positions.
        settings: One per row.
        draws: One per row: whose random numbers, and the number of the draw; only sampling uses it.
        used: U; ids from here on are never chosen.

    Returns:
        n ids below U: for each row what `generate()` would choose for it alone; None where the logits are no numbers
        (NaN, or infinite).
    """
    device, size = logits.device, logits.shape[-1]
    largest = _chunk_maxima(logits, used)
    columns = _columns(largest.argmax(dim=-1, keepdim=True), used)  # a NaN counts as the largest
    best = logits.gather(1, columns.clamp(max=used - 1)).max(dim=-1, keepdim=True)
    ids = columns.gather(1, best.indices).clamp(max=used - 1)
    certain = torch.ones_like(ids, dtype=torch.bool)
    sampled = [i for i, setting in enumerate(settings) if setting.do_sample]
    if sampled:
        rows = torch.tensor(sampled, device=device)
        fields = zip(*((s.temperature, s.top_k, s.top_p) for s in map(settings.__getitem__, sampled)), strict=True)
        limits = _Limits(*(torch.tensor(field, device=device)[:, None] for field in fields))
        highest = best.values[rows].float() / limits.temperature
        total = _logsumexp(logits, rows, limits, highest, used)
        certain[rows] = (highest - total).exp() > limits.top_p + MARGIN
    found = torch.cat([ids, best.values.isfinite(), certain], dim=1).tolist()
    tokens = [token if sound else None for token, sound, _ in found]
    places = [place for place, i in enumerate(sampled) if found[i][1] and not found[i][2]]
    if not places:
        return tokens
    undecided = [sampled[place] for place in places]
    at = torch.tensor(places, device=device)
    kept_ids, scores, summary = _candidates(
        logits, largest, rows[at], _Limits(*(t[at] for t in limits)), total[at], used
    )
    uncertain = [place for place, (_, count, exact) in enumerate(summary) if count > 1 or exact]

    def variates(place: int) -> torch.Tensor:
        generator, draw = draws[undecided[place]]
        return generator.variates(draw, size, None if summary[place][2] else kept_ids[place].clamp(max=size - 1))

    def ahead(place: int) -> int:
        generator, draw = draws[undecided[place]]
        return generator.drawn - draw

    if device.type == "cpu" and len(uncertain) > 1:  # a generator runs in one thread; the longest work goes first
        uncertain.sort(key=ahead)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            drawn = dict(zip(uncertain, threads.map(variates, uncertain), strict=True))
    else:
        drawn = {place: variates(place) for place in uncertain}
    several = []
    for place, (first, _, exact) in enumerate(summary):
        row = undecided[place]
        if place not in drawn:
            tokens[row] = first
        elif exact:
            tokens[row] = exact_choice(logits[row], settings[row], drawn[place], used)
        else:
            several.append((row, place, drawn[place]))
    if several:
        chosen_rows, places, values = zip(*several, strict=True)
        at = torch.tensor(places, device=device)
        best = _largest_ratio(scores[at], torch.stack(values))
        for row, token in zip(chosen_rows, kept_ids[at].gather(1, best[:, None])[:, 0].tolist(), strict=True):
            tokens[row] = token
    return tokens


class _Limits(NamedTuple):
    """Settings of several rows, each (rows, 1)."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor


def _chunk_maxima(logits: torch.Tensor, used: int) -> torch.Tensor:
    """Returns the largest logit (n, U / CHUNK) of each chunk of ids: a quick pass, unlike `argmax` and `topk`."""
    whole = used // CHUNK * CHUNK
    parts = [logits[:, :whole].unflatten(1, (-1, CHUNK)).amax(dim=-1)] if whole else []
    if whole < used:
        parts.append(logits[:, whole:used].amax(dim=-1, keepdim=True))
    return torch.cat(parts, dim=1)


def _columns(chunks: torch.Tensor, used: int) -> torch.Tensor:
    """Returns the ids (n, c * CHUNK) of chunks (n, c); those of the last may go beyond `used`."""
    return (chunks[..., None] * CHUNK + torch.arange(CHUNK, device=chunks.device)).flatten(1)


def _logsumexp(
    logits: torch.Tensor, rows: torch.Tensor, limits: _Limits, highest: torch.Tensor, used: int
) -> torch.Tensor:
    """Returns the log-sum-exp of the scores, of which the highest is known: float32 (rows, 1).

    It is infinite where top-k comes first.
    """
    total = torch.full_like(highest, torch.inf)
    wanted = (limits.top_k == 0).nonzero()[:, 0]
    # One row at a time on a CPU: what does not fit its caches takes three times as long.
    for part in wanted.split(1) if logits.device.type == "cpu" else [wanted]:
        at = rows[part]
        chosen = logits[at[0]][None] if len(at) == 1 else logits[at]  # the first is no copy
        scores = chosen[:, :used].float() / limits.temperature[part]
        shares = scores.sub_(highest[part]).exp_().sum(dim=-1, keepdim=True)
        total[part] = shares.log() + highest[part]
    return total


def _candidates(
    logits: torch.Tensor, largest: torch.Tensor, rows: torch.Tensor, limits: _Limits, total: torch.Tensor, used: int
) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Returns what top-k and top-p keep of rows, from their W highest scores.

    Returns:
        Ids (rows, W), scores (rows, W), -inf where an id is dropped; and for each row its best id, how many ids are
        kept, and whether that is uncertain and must be found the exact way.
    """
    chunks = largest[rows].topk(min(CANDIDATES, largest.shape[1])).indices
    columns = _columns(chunks, used)
    scores = logits[rows[:, None], columns.clamp(max=used - 1)].float() / limits.temperature
    top, places = scores.masked_fill_(columns >= used, -torch.inf).topk(min(CANDIDATES, used))  # (rows, W)
    ids, width = columns.gather(1, places), top.shape[1]
    in_top_k = (torch.arange(width, device=top.device) < limits.top_k) | (limits.top_k == 0)
    total = torch.where(limits.top_k > 0, top.masked_fill(~in_top_k, -torch.inf).logsumexp(-1, keepdim=True), total)
    mass = (top - total).exp().double().masked_fill_(~in_top_k, 0)
    before = mass.cumsum(-1) - mass  # probability of all that is more likely
    keep = in_top_k & ((before < limits.top_p) | (limits.top_p == 1))
    count = keep.sum(-1, keepdim=True)
    next_score = top.gather(1, count.clamp(max=width - 1))
    near = (in_top_k & ((before - limits.top_p).abs() < MARGIN) & (limits.top_p < 1)).any(-1, keepdim=True)
    tie = top.gather(1, count - 1) == next_score  # which goes is then a matter of the sort
    exact = (count == width) | near | tie | (limits.top_k > width)
    return ids, top.masked_fill(~keep, -torch.inf), torch.cat([ids[:, :1], count, exact], dim=1).tolist()


def _largest_ratio(scores: torch.Tensor, variates: torch.Tensor) -> torch.Tensor:
    """As `torch.multinomial` does it: the largest ratio of probability to exponential variate; dropped ids are -inf."""
    return (scores.softmax(-1) / variates).masked_fill_(scores == -torch.inf, -1).argmax(-1)


def exact_choice(logits: torch.Tensor, setting: SamplingSettings, variates: torch.Tensor, used: int) -> int:
    """Draws for one row (V,) with the exact arithmetic of transformers' temperature, top-k and top-p."""
    scores = logits.float()[None] / setting.temperature
    scores[:, used:] = -torch.inf
    if setting.top_k:
        limit = scores.topk(min(setting.top_k, scores.shape[-1])).values[..., -1, None]
        scores = scores.masked_fill(scores < limit, -torch.inf)
    if setting.top_p < 1:
        ordered, places = scores.sort(descending=False)
        drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - setting.top_p
        drop[..., -1:] = False
        scores = scores.masked_fill(drop.scatter(1, places, drop), -torch.inf)
    return int(_largest_ratio(scores, variates[None]))
