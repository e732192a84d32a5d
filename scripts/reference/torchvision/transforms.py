"""What the released code takes from torchvision, on Pillow alone: this file stands in for `torchvision.transforms`.

It lies beside `run.py`, whose folder comes first where Python looks for modules; nothing else sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    """How `Resize` fills in pixels."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """A Pillow image to `(height, width)`, or its shorter side to one number, its aspect kept."""

    def __init__(
        self,
        size: int | Sequence[int],
        interpolation: InterpolationMode = InterpolationMode.BILINEAR,
        max_size: int | None = None,
        antialias: bool | None = None,
    ) -> None:
        if max_size is not None:
            raise NotImplementedError("this stand-in for torchvision's Resize has no max_size")
        self.size = size
        self.resampling = Image.Resampling[interpolation.name]

    def __call__(self, image: Image.Image) -> Image.Image:
        if isinstance(self.size, int):
            shorter = min(image.size)
            width, height = (int(self.size * side / shorter) for side in image.size)
        else:
            height, width = self.size
        return image.resize((width, height), self.resampling)


class ToTensor:
    """An 8-bit Pillow image to float32 (channels, height, width) from 0 to 1."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        values = np.asarray(image)
        if values.dtype != np.uint8:
            raise NotImplementedError(f"this stand-in for torchvision's ToTensor knows 8-bit images, not {image.mode}")
        channels = torch.from_numpy(np.atleast_3d(values).copy()).permute(2, 0, 1)  # (C, H, W)
        return channels.contiguous().float().div(255)


class Normalize:
    """(x - mean) / std, channel by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> None:
        self.mean, self.std = mean, std

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(v, dtype=image.dtype).view(-1, 1, 1) for v in (self.mean, self.std))
        return (image - mean) / std
