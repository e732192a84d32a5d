"""The image transform against the released one's pixels, and files that are no images."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl.images import QwenVLImageProcessor
from tests.golden_checkpoint import GOLDEN


def test_golden_pixels() -> None:
    golden = np.load(GOLDEN / "image_transform.npz")
    names = [name for name in golden.files if not name.endswith(".mean_std")]
    assert len(names) == 8
    for name in names:
        pixels = QwenVLImageProcessor(448).load(GOLDEN / "images" / name)
        assert pixels.shape == (3, 448, 448)
        assert pixels.dtype == torch.float32
        np.testing.assert_allclose(pixels[:, ::16, 5::16], golden[name], atol=1e-6, rtol=0)
        mean_std = [pixels.double().mean(), pixels.double().std(correction=0)]
        np.testing.assert_allclose(mean_std, golden[f"{name}.mean_std"], atol=1e-5)


def test_aspect_is_not_kept(tmp_path: Path) -> None:
    left_red = Image.new("RGB", (100, 10), "blue")
    left_red.paste("red", (0, 0, 50, 10))
    pixels = QwenVLImageProcessor(28).load(left_red)
    assert (pixels[0, :, :10] > 1).all()
    assert (pixels[0, :, -10:] < 0).all()


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "truncated", "bomb"])
def test_unreadable_files(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "broken.png"
    if kind == "folder":
        file.mkdir()
    elif kind in ("text", "empty"):
        file.write_text("I am no picture" if kind == "text" else "")
    elif kind != "missing":
        noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
        noise.save(file)
        if kind == "truncated":
            file.write_bytes(file.read_bytes()[:2000])
        else:
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises((ValueError, FileNotFoundError), match=r"broken\.png"):
        QwenVLImageProcessor().load(file)


def test_a_decoder_that_fails_in_its_own_way_is_a_broken_image(tmp_path: Path, monkeypatch) -> None:
    """Pillow's AVIF decoder raises RuntimeError; one image must never end a run."""
    file = tmp_path / "broken.png"
    Image.new("RGB", (4, 4)).save(file)

    def failing(*_: object) -> None:
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr(Image.Image, "convert", failing)
    with pytest.raises(ValueError, match=r"broken\.png \(Failed to decode image\)"):
        QwenVLImageProcessor().load(file)


@pytest.mark.parametrize("url", ["http://localhost/a.png", Path("https://a.b/c.jpg"), "data:image/png;base64,AA"])
def test_urls_are_not_fetched(url: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"URLs are not fetched: .*Download the picture"):
        QwenVLImageProcessor().load(url)
