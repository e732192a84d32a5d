"""Cross-entropy from hidden states, without ever holding the logits of a whole batch.

Shapes: N supervised positions, C width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100
CHUNK = 512  # positions whose logits exist at once: 512 x 151,936 in float32 are 311 MB


class LanguageHead(nn.Linear):
    """The language head; with labels it gives their summed cross-entropy instead of logits.

    Hidden states and weight meet inside this one module's forward, so that sharded training, which gathers a weight
    when its module is called, gathers it once a step on every rank, however many positions are supervised there.
    """

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the logits (..., V) of hidden states (..., C); with labels (N,), for (N, C), the float32 sum.

        Args:
            hidden: Hidden states.
            labels: int64 (N,).
            weights: float32 (N,), what each position's loss is multiplied by in the sum; None for 1.
        """
        if labels is None:
            return super().forward(hidden)
        if weights is None:
            weights = torch.ones(labels.shape, dtype=torch.float32, device=labels.device)
        return _LinearCrossEntropy.apply(hidden, self.weight, labels, weights)


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies in chunks; the backward computes each chunk's logits again.

    Under autocast both run as under autocast: an autograd function's backward would otherwise not.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, labels, weights)
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # The sum over nothing still depends on hidden and weight, so that every rank runs the same backward.
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, wanted, scale in zip(hidden.split(CHUNK), labels.split(CHUNK), weights.split(CHUNK), strict=True):
            total += F.cross_entropy(F.linear(rows, weight).float(), wanted, reduction="none") @ scale
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden, weight, labels, weights = ctx.saved_tensors
        dtype = ctx.dtype or hidden.dtype
        matrix = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            rows = hidden[part].to(dtype)
            slope = F.linear(rows, matrix).float().softmax(dim=-1)  # (chunk, V)
            slope[torch.arange(slope.shape[0], device=slope.device), labels[part]] -= 1
            slope = (slope * (grad * weights[part])[:, None]).to(dtype)
            grad_hidden[part] = (slope @ matrix).to(hidden.dtype)
            if grad_weight is None:
                continue
            if grad_weight.dtype == dtype:
                grad_weight.addmm_(slope.T, rows)
            else:
                grad_weight += slope.T @ rows
        return grad_hidden, grad_weight, None, None


def supervised_loss(
    head: LanguageHead, hidden: torch.Tensor, labels: torch.Tensor, divisors: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the cross-entropy over the supervised tokens of a micro-batch, logits at their positions only.

    published: without divisors it is the mean over this micro-batch's supervised tokens. Where there are none it is 0,
    with gradients of 0.

    Args:
        head: The language head.
        hidden: (B, T, C).
        labels: int64 (B, T), not shifted, -100 at positions without supervision.
        divisors: int64 (B, T), aligned with the labels; then the result is the sum of each token's loss by its divisor.

    Returns:
        float32 scalar.
    """
    labels = labels[:, 1:].to(hidden.device)
    kept = labels != IGNORED
    rows, wanted = hidden[:, :-1][kept], labels[kept]
    weights = None if divisors is None else 1 / divisors[:, 1:][kept].float()
    if hasattr(head, "base_layer"):  # an adapter on the head adds to its logits, so they must be computed
        losses = F.cross_entropy(head(rows).float(), wanted, reduction="none")
        total = losses.sum() if weights is None else losses @ weights
    else:
        total = head(rows, wanted, weights)
    return total / kept.sum().clamp(min=1) if divisors is None else total
