"""The vision tower: 448x448 pixels to 1024 patches, 48 pre-norm blocks, and a resampler to 256 features per image.

Shapes: B images, P patches, Q queries (256), W tower width, C decoder width, H heads, D width per head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

NORM_EPS = 1e-6
QUERIES = 256  # outputs of the resampler, and entries of both position tables
TABLE_SIDE = math.isqrt(QUERIES)
RESAMPLER_HEAD_WIDTH = 128


def interpolate_positions(table: torch.Tensor, patches: int) -> torch.Tensor:
    """Stretches a square table of positions to another number of patches.

    Args:
        table: (positions, W), positions a square number.
        patches: Square number of positions wanted.

    Returns:
        (patches, W) in the table's dtype; bicubic in float32, corners not aligned.
    """
    have, want = math.isqrt(table.shape[0]), math.isqrt(patches)
    if have == want:
        return table
    grid = table.float().reshape(1, have, have, -1).permute(0, 3, 1, 2)  # (1, W, have, have)
    grid = F.interpolate(grid, size=(want, want), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)  # (patches, W)


def sincos_positions(width: int, side: int) -> torch.Tensor:
    """Returns the 2-D sine-cosine table with which the resampler's positions start.

    Args:
        width: Width of an entry, a multiple of 4.
        side: Side of the square grid.

    Returns:
        float32 (side * side, width): the first half of the width encodes the column, the second the row, each as
        `[sin, cos]` of `position * 10000 ** -(i / quarter)`.
    """
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, quarter)
    encoded = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns = encoded.repeat(side, 1)  # (side * side, width / 2)
    rows = encoded.repeat_interleave(side, dim=0)  # (side * side, width / 2)
    return torch.cat([columns, rows], dim=1).float()


class VisionAttention(nn.Module):
    """Full self-attention over the patches; published: q, k and v stand interleaved per head in `in_proj`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, P, W = x.shape
        qkv = self.in_proj(x).view(B, P, self.heads, 3, W // self.heads)  # (B, P, H, 3, D)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each (B, H, P, D)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).reshape(B, P, W))  # (B, P, W)


class VisionMLP(nn.Module):
    """Two layers with the exact GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class VisionBlock(GradientCheckpointingLayer):
    """One pre-norm block of the tower."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.ln_2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = VisionAttention(width, heads)
        self.mlp = VisionMLP(width, int(width * mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionBlocks(nn.Module):
    """The blocks, one after the other, under the name that the checkpoint gives them."""

    def __init__(self, width: int, layers: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisionBlock(width, heads, mlp_ratio) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class PoolAttention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`.

    The projection goes through `out_proj`'s own forward, so that sharded training, which gathers a module's weights
    when that module is called, sees it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        q, k, v = (self._heads(F.linear(x, w, b)) for x, w, b in zip(inputs, weights, biases, strict=True))
        out = F.scaled_dot_product_attention(q.expand(k.shape[0], -1, -1, -1), k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, Q, C)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, P, D)


class Resampler(nn.Module):
    """256 learned queries that read the patches by cross-attention.

    Source: the released `visual.py` (behaviour).
    """

    def __init__(self, patch_width: int, width: int) -> None:
        super().__init__()
        # A trainable, saved parameter (the released trainer tunes it), filled by the model's weight initialisation.
        self.pos_embed = nn.Parameter(torch.empty(QUERIES, width))
        self.query = nn.Parameter(torch.empty(QUERIES, width))
        self.kv_proj = nn.Linear(patch_width, width, bias=False)
        self.attn = PoolAttention(width, width // RESAMPLER_HEAD_WIDTH)
        self.ln_q = nn.LayerNorm(width, eps=NORM_EPS)
        self.ln_kv = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Patches (B, P, W) to features (B, 256, C)."""
        x = self.ln_kv(self.kv_proj(x))  # (B, P, C)
        query = self.ln_q(self.query) + self.pos_embed  # (Q, C)
        key = x + interpolate_positions(self.pos_embed, x.shape[1])
        return self.attn(query[None], key, x)


class VisionTransformer(nn.Module):
    """Images to features that take the place of token embeddings.

    Args:
        image_size: Side of the square input, in pixels.
        patch_size: Side of a patch, in pixels.
        width: Width W of the tower.
        layers: Number of blocks.
        heads: Attention heads of a block.
        mlp_ratio: Inner width of a block's MLP over W (rounded down).
        output_dim: Width C of the decoder, a multiple of 128.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        output_dim: int,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(QUERIES, width))
        self.ln_pre = nn.LayerNorm(width, eps=NORM_EPS)
        self.transformer = VisionBlocks(width, layers, heads, mlp_ratio)
        self.attn_pool = Resampler(width, output_dim)
        self.ln_post = nn.LayerNorm(output_dim, eps=NORM_EPS)
        self.proj = nn.Parameter(torch.empty(output_dim, output_dim))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes pixels (B, 3, image_size, image_size) into features (B, 256, C)."""
        x = self.conv1(pixel_values.to(self.conv1.weight.dtype))  # (B, W, side, side)
        x = x.flatten(2).transpose(1, 2)  # (B, P, W)
        x = self.ln_pre(x + interpolate_positions(self.positional_embedding, x.shape[1]))
        x = self.attn_pool(self.transformer(x))
        return self.ln_post(x) @ self.proj
