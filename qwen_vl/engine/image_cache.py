"""Features of images, which are opened in threads and encoded in batches; the latest are kept."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from qwen_vl.engine.cache import OUT_OF_MEMORY_ALONE, is_out_of_memory
from qwen_vl.images import QwenVLImageProcessor

AT_ONCE = 4  # through the vision tower
KEPT = 64  # features of the latest images, for later groups


def image_key(image: Any) -> Hashable:
    """Identifies an image: by the path of a file, else by the object, which must live as long as its key is used."""
    return str(image) if isinstance(image, str | Path) else id(image)


class ImageCache:
    """Features of images, each computed once while it is among the latest.

    Args:
        encode: Pixels (N, 3, size, size) to features (N, 256, C).
        processor: Opens an image.

    Attributes:
        encoded: Images encoded so far.
        kept: Features that are kept at the most.
    """

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], processor: QwenVLImageProcessor) -> None:
        self.encode, self.processor = encode, processor
        self.encoded, self.kept = 0, KEPT
        self._kept: dict[Hashable, tuple[Any, torch.Tensor]] = {}  # with the image, so that its id is not reused

    def of(
        self, images: Sequence[Any], upcoming: Iterable[Any] = (), *, one_by_one: bool = False
    ) -> tuple[dict[Hashable, torch.Tensor], dict[Hashable, str]]:
        """Returns the features (256, C) of each image by its key; and for those that cannot be read, why.

        Args:
            images: What is needed.
            upcoming: What will be needed next: encoded along with it while there is room among `AT_ONCE`.
            one_by_one: Encode each alone, and treat an out-of-memory error as a failure of that image.
        """
        wanted = {image_key(image): image for image in images}
        missing = {key: image for key, image in wanted.items() if key not in self._kept}
        if missing:
            for image in upcoming:
                if len(missing) < AT_ONCE and image_key(image) not in self._kept:
                    missing.setdefault(image_key(image), image)
        broken = self._add(missing, 1 if one_by_one else AT_ONCE, forgiving=one_by_one)
        for key in wanted.keys() & self._kept.keys():
            self._kept[key] = self._kept.pop(key)  # the latest now
        found = {key: self._kept[key][1] for key in wanted if key in self._kept}
        for key in list(self._kept)[: max(len(self._kept) - self.kept, 0)]:
            del self._kept[key]
        return found, broken

    def _add(self, images: dict[Hashable, Any], at_once: int, *, forgiving: bool) -> dict[Hashable, str]:
        """Opens and encodes images; gives the reason for each that cannot be."""
        if not images:
            return {}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            opened = dict(zip(images, pool.map(self._open, images.values()), strict=True))
        broken = {key: error for key, error in opened.items() if isinstance(error, str)}
        whole = [key for key in opened if key not in broken]
        for start in range(0, len(whole), at_once):
            keys = whole[start : start + at_once]
            try:
                features = self.encode(torch.stack([opened[key] for key in keys]))
            except RuntimeError as error:
                if not forgiving or not is_out_of_memory(error):
                    raise
                broken |= dict.fromkeys(keys, OUT_OF_MEMORY_ALONE)
                continue
            # Copies: a view would keep the features of all that were encoded with it.
            self._kept |= {key: (images[key], feature.clone()) for key, feature in zip(keys, features, strict=True)}
            self.encoded += len(keys)
        return broken

    def _open(self, image: Any) -> torch.Tensor | str:
        try:
            return self.processor.load(image)
        except Exception as error:  # noqa: BLE001 - per-image boundary: any error fails its request
            return f"{type(error).__name__}: {error}"
