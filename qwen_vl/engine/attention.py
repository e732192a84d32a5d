"""Attention to parts of the keys, and joining the parts: equal to attention to all keys at once.

Shapes: B batch, H heads, T queries, S keys of the part, D width per head.
"""

from collections.abc import Sequence

import torch

_HALF = (torch.bfloat16, torch.float16)


def partial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the queries to these keys alone, and how much weight that has beside other keys.

    Args:
        query: (B, H, T, D).
        key, value: (B, H, S, D).
        scaling: Factor of the scores.
        causal: Query t reads keys up to t; without a mask.
        mask: Added to the scores, in the queries' dtype: broadcastable to (B, H, T, S).

    Returns:
        (B, H, T, D), and the logarithm of the sum of the exponentials of the scores: float32 (B, H, T).
    """
    # PyTorch's public attention keeps the second to itself; its own context parallelism calls these operators as well.
    if query.device.type == "cpu":
        full = None if mask is None else mask.expand(-1, -1, query.shape[2], -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=full, scale=scaling
        )
    if query.dtype in _HALF and mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scaling)[:2]
    return written_out(query, key, value, scaling, causal=causal, mask=mask)


def causal_attention(
    parts: Sequence[Sequence[torch.Tensor]],
    past: Sequence[torch.Tensor] | None,
    scaling: float,
    *,
    last: bool = False,
) -> torch.Tensor:
    """Attention of continuations of one past: their tokens read the past, and their own tokens up to themselves.

    Args:
        parts: Queries, keys and values (1, H, T, D) of each continuation.
        past: Keys and values (1, H, S, D); None if nothing comes before.
        scaling: Factor of the scores.
        last: Only for the last query of each part.

    Returns:
        (1, T of all parts, H, D).
    """
    if last:
        parts = [(query[:, :, -1:], key, value) for query, key, value in parts]
    own = [partial_attention(*part, scaling, causal=not last) for part in parts]
    out, lse = (torch.cat([t.transpose(1, 2) for t in of_parts], dim=1) for of_parts in zip(*own, strict=True))
    if past is None:
        return out
    queries = torch.cat([query for query, _, _ in parts], dim=2)
    of_past = partial_attention(queries, *past, scaling)
    return join(*(t.transpose(1, 2) for t in of_past), out, lse)


def written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`partial_attention` by matrix products, with scores in float32."""
    scores = _scores(query, key, scaling)  # (B, H, T, S)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores.masked_fill_(later, torch.finfo(torch.float32).min)
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def join(out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Attention to the keys of two parts from what each part gave: (…, D), (…), and the same of the other."""
    share = torch.sigmoid(lse - other_lse)[..., None]  # of all weight: e^a / (e^a + e^b)
    return torch.lerp(other_out.float(), out.float(), share).to(out.dtype)


def _scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """query @ key^T * scaling in float32."""
    if query.dtype == torch.float32:
        return (query * scaling) @ key.transpose(-1, -2)
    if query.is_cuda:  # the products are summed in float32 anyway; here the sums are kept so
        flat = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        return flat.view(*query.shape[:-1], key.shape[-2]) * scaling
    return (query @ key.transpose(-1, -2)).float() * scaling
