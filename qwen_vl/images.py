"""Opens image files safely and makes the pixels that the vision tower expects."""

import re
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

# Not from transformers itself, which up to 5.17 replaces it where torchvision is not installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from qwen_vl.configuration import QwenVLConfig

# The normalisation of CLIP, per channel R, G, B.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


_URL = re.compile(r"(https?|ftp|file|data):", re.IGNORECASE)


class QwenVLImageProcessor(BaseImageProcessor):
    """Images to normalised pixels, without torchvision.

    Args:
        image_size: Height and width of the result, in pixels.

    Source: the released `visual.py`'s image transform (behaviour).
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(self, image_size: int = 448, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size

    @classmethod
    def get_image_processor_dict(cls, path: str | Path, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the settings of a checkpoint, which released ones have in `config.json`."""
        try:
            return super().get_image_processor_dict(path, **kwargs)
        except OSError:
            return {"image_size": QwenVLConfig.from_pretrained(path).visual["image_size"]}, {}

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """`pixel_values` (N, 3, image_size, image_size) of one image or a list: paths or Pillow images."""
        rows = images if isinstance(images, list | tuple) else [images]
        return BatchFeature({"pixel_values": self.load_all(list(rows))}, tensor_type=return_tensors)

    def load(self, image: str | Path | Image.Image) -> torch.Tensor:
        """Opens a local file (never a URL) or takes a Pillow image.

        Returns:
            float32 tensor (3, image_size, image_size).

        Raises:
            FileNotFoundError, ValueError, TypeError: See `decode`.
        """
        return self._normalise(image.convert("RGB") if isinstance(image, Image.Image) else self.decode(image))

    def decode(self, image: str | Path) -> Image.Image:
        """Opens a local file and returns all of its pixels in RGB, in its own size.

        Raises:
            FileNotFoundError: There is no such file, or it is a URL.
            ValueError: It is not an image, is cut short, or has more pixels than Pillow allows; names the file.
            TypeError: It is no path.
        """
        if not isinstance(image, str | Path):
            raise TypeError(f"a picture is a path or a Pillow image, not {type(image).__name__}")
        if _URL.match(str(image)):
            raise FileNotFoundError(
                f"URLs are not fetched: {str(image)[:200]}. Download the picture and give its path."
            )
        path = Path(image)
        if not path.is_file():
            raise FileNotFoundError(f"no such image file: {path}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as opened:
                    return opened.convert("RGB")
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"image too large to open safely: {path} ({error})") from error
        except Exception as error:  # per-image boundary: each of Pillow's decoders raises other errors
            raise ValueError(f"not a readable image: {path} ({error})") from error

    def load_all(self, images: list[Any]) -> torch.Tensor | None:
        """Returns the pixels (N, 3, image_size, image_size) of several images in order, or None for none."""
        return torch.stack([self.load(image) for image in images]) if images else None

    def _normalise(self, image: Image.Image) -> torch.Tensor:
        # published: RGB, then straight to the square by bicubic resampling; the aspect ratio is not kept.
        square = self._resize(image)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).to(torch.float32).div(255)  # (3, H, W)
        return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)

    def _resize(self, image: Image.Image) -> Image.Image:
        """Resizes to the square, one axis after the other, in the order of Pillow 13 with every version.

        The order shows in the last bits of tall pictures, because the result of the first axis is rounded to bytes.
        """
        side, (width, height) = self.image_size, image.size
        rows_first = height > side and height - side > 2 * (width - side)
        first = (width, side) if rows_first else (side, height)
        return image.resize(first, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.BICUBIC)


AutoImageProcessor.register(QwenVLConfig, slow_image_processor_class=QwenVLImageProcessor)
