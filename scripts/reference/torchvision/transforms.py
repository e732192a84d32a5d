"""The parts of torchvision that the released code uses, on Pillow alone: replaces `torchvision.transforms`.

It is beside `run.py`, whose folder is first on Python's path; nothing else imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    """Interpolation of `Resize`."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class Compose:
    """Applies transforms in order."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """Resizes a Pillow image to `(height, width)`, or its shorter side to one number, with its aspect kept."""

    def __init__(
        self,
        size: int | Sequence[int],
        interpolation: InterpolationMode = InterpolationMode.BILINEAR,
        max_size: int | None = None,
        antialias: bool | None = None,
    ) -> None:
        if max_size is not None:
            raise NotImplementedError("this replacement of torchvision's Resize has no max_size")
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
    """Converts an 8-bit Pillow image to float32 (channels, height, width) from 0 to 1."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        values = np.asarray(image)
        if values.dtype != np.uint8:
            raise NotImplementedError(f"this replacement of ToTensor supports 8-bit images, not {image.mode}")
        channels = torch.from_numpy(np.atleast_3d(values).copy()).permute(2, 0, 1)  # (C, H, W)
        return channels.contiguous().float().div(255)


class Normalize:
    """Computes (x - mean) / std by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> None:
        self.mean, self.std = mean, std

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(v, dtype=image.dtype).view(-1, 1, 1) for v in (self.mean, self.std))
        return (image - mean) / std
