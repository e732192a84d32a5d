"""The next token of each request: greedy, or drawn exactly as `generate()` draws it, from the request's own generator.

Shapes: n requests, V rows of the head (ids without a token among them), U ids that have one.
"""

from collections.abc import Sequence

import torch

from qwen_vl.sampling_params import SamplingSettings

CANDIDATES = 64  # kept tokens that the quick road can hold; top-p 0.3 rarely leaves more than a few
MARGIN = 1e-4  # of probability mass: nearer to the limit than this, rounding could decide, and the exact road is taken


class RequestGenerator:
    """The random numbers of one request: those that `torch.multinomial` would use after `torch.manual_seed(seed)`.

    A draw costs V exponential variates, whatever it chooses among; draws with a single candidate are only counted, and
    made up for if a later one needs its place in the sequence.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._skipped = 0

    def skip(self) -> None:
        """Passes over a draw whose outcome is certain."""
        self._skipped += 1

    def restarted(self, draws: int = 0) -> "RequestGenerator":
        """The same random numbers from the beginning, or after so many draws."""
        again = RequestGenerator(self._seed, self.device)
        again._skipped = draws
        return again

    def variates(self, size: int) -> torch.Tensor:
        """The exponential variates (size,) of the next draw, float32."""
        if self._generator is None:
            self._generator = torch.Generator(self.device).manual_seed(self._seed)
        values = torch.empty(size, device=self.device)
        for _ in range(self._skipped + 1):
            values.exponential_(1, generator=self._generator)
        self._skipped = 0
        return values


def choose(
    logits: torch.Tensor, settings: Sequence[SamplingSettings], generators: Sequence[RequestGenerator], used: int
) -> list[int | None]:
    """The next token of each request.

    Args:
        logits: (n, V) of the last positions.
        settings: One per request.
        generators: One per request; only sampling uses it.
        used: U; ids from here on are never chosen.

    Returns:
        n ids below U: for each request what `generate()` would choose for it alone; None where the logits are no
        numbers (NaN, or infinite).
    """
    size = logits.shape[-1]
    best = logits[:, :used].argmax(dim=-1, keepdim=True)  # a NaN counts as the largest
    sound = logits.gather(-1, best).isfinite()[:, 0].tolist()
    tokens = [token if good else None for token, good in zip(best[:, 0].tolist(), sound, strict=True)]
    rows = [i for i, setting in enumerate(settings) if setting.do_sample and sound[i]]
    if not rows:
        return tokens
    scaled = logits[:, :used] if len(rows) == len(settings) else logits[rows, :used]
    scaled = scaled.float()
    temperatures = [settings[i].temperature for i in rows]
    if any(temperature != 1 for temperature in temperatures):
        scaled = scaled / torch.tensor(temperatures, device=logits.device)[:, None]
    quick = _quick_candidates(scaled, [settings[i] for i in rows])
    for place, row in enumerate(rows):
        kept = quick[place]
        if kept is None:
            whole = logits[row].float() / settings[row].temperature
            whole[used:] = -torch.inf
            kept = _exact_candidates(whole, settings[row])
        ids, scores = kept
        if len(ids) == 1:
            generators[row].skip()
            tokens[row] = int(ids[0])
            continue
        # As torch.multinomial does it: the largest ratio of probability to exponential variate.
        variates = generators[row].variates(size)[ids.to(logits.device)].to(ids.device)
        tokens[row] = int(ids[(scores.softmax(-1) / variates).argmax()])
    return tokens


def _quick_candidates(
    scores: torch.Tensor, settings: Sequence[SamplingSettings]
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Kept ids and their scores of each row, by id, from its highest scores alone; None where they don't do."""
    width = min(CANDIDATES, scores.shape[-1])
    top, ids = scores.topk(width, dim=-1)  # (rows, width)
    mass = (top - scores.logsumexp(dim=-1, keepdim=True)).exp()
    before = (mass.double().cumsum(-1) - mass).tolist()  # probability of all that is more likely
    top, ids = top.cpu(), ids.cpu()  # at once: a GPU would be waited for several times a row
    found: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    for row, setting in enumerate(settings):
        distances = [abs(b - setting.top_p) for b in before[row]]
        keep = sum(b < setting.top_p for b in before[row])
        if setting.top_k or setting.top_p == 1 or keep == width or min(distances) < MARGIN or _ties(top[row], keep):
            found.append(None)
            continue
        order = ids[row, :keep].sort()
        found.append((order.values, top[row, :keep][order.indices]))
    return found


def _ties(top: torch.Tensor, keep: int) -> bool:
    """Whether the last kept and the first dropped score are equal: which goes is then a matter of the sort."""
    return bool(top[keep - 1] == top[keep])


def _exact_candidates(scores: torch.Tensor, setting: SamplingSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept ids and scores of one row, by the arithmetic of transformers' top-k and top-p, step by step."""
    scores = scores[None].clone()
    if setting.top_k:
        limit = scores.topk(min(setting.top_k, scores.shape[-1])).values[..., -1, None]
        scores = scores.masked_fill(scores < limit, -torch.inf)
    if setting.top_p < 1:
        ordered, places = scores.sort(descending=False)
        drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - setting.top_p
        drop[..., -1:] = False
        scores = scores.masked_fill(drop.scatter(1, places, drop), -torch.inf)
    ids = scores[0].isfinite().nonzero()[:, 0]
    return ids, scores[0, ids]
