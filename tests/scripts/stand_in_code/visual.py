"""Stand-in for a released vision tower."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def stretched(table, count):
    side, wanted = int(len(table) ** 0.5), int(count**0.5)
    grid = table.float().T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, (wanted, wanted), mode="bicubic", align_corners=False)
    return grid.reshape(grid.shape[1], -1).T.to(table.dtype)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        size = x.shape[-1] // self.heads
        heads = self.in_proj(x).reshape(*x.shape[:2], self.heads, 3 * size).transpose(1, 2)
        q, k, v = heads.split(size, dim=-1)
        weights = (q @ k.transpose(-1, -2) / size**0.5).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, width, heads, ratio):
        super().__init__()
        inner = int(width * ratio)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class Pool(nn.Module):
    def __init__(self, patch_width, width):
        super().__init__()
        self.query, self.pos_embed = nn.Parameter(torch.zeros(256, width)), nn.Parameter(torch.zeros(256, width))
        self.kv_proj = nn.Linear(patch_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, width // 128)
        self.ln_q, self.ln_kv = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        x = self.ln_kv(self.kv_proj(x)).transpose(0, 1)
        keys = x + stretched(self.pos_embed, len(x))[:, None]
        queries = (self.ln_q(self.query) + self.pos_embed)[:, None].expand(-1, x.shape[1], -1)
        return self.attn(queries, keys, x, need_weights=False)[0].transpose(0, 1)


class VisionTransformer(nn.Module):
    def __init__(self, image_size, patch_size, width, layers, heads, mlp_ratio, output_dim, differs, **_):
        super().__init__()
        mean = (0.5, 0.5, 0.5) if "pixels" in differs else MEAN
        square = transforms.Resize((image_size, image_size), interpolation=InterpolationMode.BICUBIC)
        self.image_transform = transforms.Compose([square, transforms.ToTensor(), transforms.Normalize(mean, STD)])
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(256, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(output_dim, eps=1e-6)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(layers))
        self.attn_pool = Pool(width, output_dim)
        self.proj = nn.Parameter(torch.zeros(output_dim, output_dim))

    def encode(self, paths):
        pixels = [self.image_transform(Image.open(path).convert("RGB")) for path in paths]
        return self(torch.stack(pixels).to(self.proj))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + stretched(self.positional_embedding, x.shape[1]))
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(self.attn_pool(x)) @ self.proj
