"""The decoder: rotary positions with dynamic NTK, log-n attention, RMSNorm and a gated MLP.

Shapes: B batch, T tokens, S cached and new tokens, C width, H heads, D width per head.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwen_vl.configuration import QwenVLConfig

# Attention of an engine that keeps keys and values itself: (layer, q, k, v, scaling) to (1, T, H, D), where q, k and v
# are (1, H, T, D).
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def ntk_alpha(length: int, seq_length: int) -> float:
    """Returns dynamic NTK's factor for a prompt of `length` tokens, at least 1.

    published: it follows from the prompt's own length at prefill and then stays for that request.
    """
    return max(2 ** math.ceil(math.log2(length / seq_length) + 1) - 1, 1)


def rotary_frequencies(alpha: float, base: float, width: int, device: torch.device) -> torch.Tensor:
    """Returns the inverse frequencies (width / 2,) in float32 for the base stretched by `alpha`."""
    stretched = base * alpha ** (width / (width - 2))
    return 1.0 / (stretched ** (torch.arange(0, width, 2, device=device).float() / width))


def rotary_tables(frequencies: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the cosines and sines of the rotary angles.

    Args:
        frequencies: float32 (B, D / 2), a row's own.
        positions: int64 (B, T), counted from 0 without padding.

    Returns:
        Two float32 tensors (B, 1, T, D / 2).
    """
    angles = (positions[..., None].float() * frequencies[:, None, :])[:, None]  # (B, 1, T, D / 2)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns queries or keys (B, H, T, D) by their positions, in float32, and casts back; the result is contiguous."""
    low, high = x.float().chunk(2, dim=-1)
    turned = torch.addcmul(low * cos, high, sin, value=-1), torch.addcmul(high * cos, low, sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


def logn_factors(positions: torch.Tensor, seq_length: int) -> torch.Tensor:
    """Returns the factors of log-n attention for the queries: float32 (B, 1, T, 1).

    published: a query at 1-based position p > seq_length gets log(p) / log(seq_length), an earlier one 1.
    """
    factors = (positions + 1).float().log() / math.log(seq_length)
    return torch.where(positions + 1 > seq_length, factors, 1.0)[:, None, :, None]


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for reference; the mask is additive (B, 1, T, S)."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights  # (B, T, H, D)


def segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: list[int], scaling: float
) -> torch.Tensor:
    """Causal attention within each of several samples in one row.

    Each sample is a call of its own: exact, no mask, and the work is the sum of the squares, not the square of the sum.

    Args:
        query, key, value: (1, H, T, D).
        segments: Lengths that sum to T.
        scaling: Factor of the scores.

    Returns:
        (1, T, H, D).
    """
    parts = zip(*(x.split(segments, dim=2) for x in (query, key, value)), strict=True)
    outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in parts]
    return torch.cat(outs, dim=2).transpose(1, 2)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, times the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return x32.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal self-attention; `c_attn` gives q, k and v one after the other."""

    is_causal = True

    def __init__(self, config: QwenVLConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        *,
        rotary: tuple[torch.Tensor, torch.Tensor],
        logn: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        segments: list[int] | None = None,
        attend: Attend | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        qkv = self.c_attn(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, 3 * H, T, D)
        heads = qkv.shape[1] // 3
        q, k = rotate(qkv[:, : 2 * heads], *rotary).chunk(2, dim=1)  # (B, H, T, D)
        v = qkv[:, 2 * heads :]
        if logn is not None:
            q = q * logn.to(q.dtype)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)  # (B, H, S, D)
        if attend is not None:
            out = attend(self.layer_idx, q, k, v, self.scaling)
        elif segments is not None:
            out = segment_attention(q, k, v, segments, self.scaling)
        else:
            function = self._attention_function()
            out, _ = function(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.c_proj(out.flatten(2))  # (B, T, C)

    def _attention_function(self) -> Callable[..., tuple[torch.Tensor, Any]]:
        name = self.config._attn_implementation
        return eager_attention if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS[name]


class MLP(nn.Module):
    """Gated MLP; published: `w2` is the branch that goes through SiLU, and each branch is half of intermediate_size."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=False)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class DecoderLayer(GradientCheckpointingLayer):
    """One pre-norm layer of the decoder."""

    def __init__(self, config: QwenVLConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), **kwargs)
        return x + self.mlp(self.ln_2(x))
