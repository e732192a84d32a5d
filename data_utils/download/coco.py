"""Fetches the images of MS-COCO's train2017 that a data root refers to, one by one instead of all 118,287."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data_utils.download.transfer import Retries, Source, failures, fetch_file, in_parallel
from data_utils.errors import MMRoleError

COCO_FOLDER = "images/COCO/train2017"
COCO_URL = "http://images.cocodataset.org/train2017"  # the certificate of its https is another host's
IMAGE_BYTES = 170_000  # an image's mean, rounded up: 19.3 GB for 118,287
LARGEST_IMAGE = 20 * 2**20
GIVE_UP_AFTER = 20  # images that failed one after the other: then it is the server or the line, not the images
_NAME = re.compile(rb'"image"\s*:\s*"COCO/train2017/(\d{12}\.jpg)"')
_START, _END = b"\xff\xd8", b"\xff\xd9"
_TAIL = 4096


def referenced_coco(data_root: Path) -> list[str]:
    """The file names of the COCO images that dialogues and samples of a data root refer to, sorted.

    Raises:
        MMRoleError: There are no such files.
    """
    folders = [data_root / name for name in ("dialogues", "data", "RM_data")]
    files = sorted(file for folder in folders for file in folder.rglob("*.json"))
    if not files:
        raise MMRoleError(
            "no dialogues and no samples, so no image is known to be needed", None, data_root,
            "fetch the data set first (bash scripts/download_data.sh), or choose its folder",
        )  # fmt: skip
    return sorted({name for file in files for name in _names(file)})


def missing_coco(data_root: Path, names: Sequence[str]) -> list[str]:
    """Those of `names` that are not there, or broken. A quick look only: a fetched image was decoded before."""
    folder = data_root / COCO_FOLDER
    return [name for name in names if not _looks_whole(folder / name)]


def fetch_coco(
    data_root: Path, names: Sequence[str], *, workers: int, retries: Retries, url: str | None = None
) -> list[str]:
    """Fetches images into `images/COCO/train2017` of a data root.

    An image that is stopped half-way stays as `NAME.part` and is gone on with.

    Args:
        data_root: The data root.
        names: File names.
        workers: How many are fetched at once.
        retries: How often, after which waits.
        url: Where they lie; by default `COCO_URL` of the environment, or MS-COCO's own server.

    Returns:
        A line for each image that could not be fetched.

    Raises:
        MMRoleError: The disk does not take them, or so many fail in a row that it cannot be the images.
    """
    url = (url or os.environ.get("COCO_URL") or COCO_URL).rstrip("/")
    folder = data_root / COCO_FOLDER

    def fetch(name: str, stop: threading.Event) -> str | None:
        source = Source(f"{url}/{name}", largest=LARGEST_IMAGE)
        part = folder / f"{name}.part"
        return fetch_file(source, folder / name, part, _broken, retries=retries, stop=stop)

    with closing(in_parallel(fetch, names, workers)) as ended:
        bar = tqdm(ended, "MS-COCO", len(names), unit="image", disable=None)
        failed = failures(bar, GIVE_UP_AFTER, lambda problem: _unreachable(url, problem))
    return [f"{name}: {problem}" for name, problem in sorted(failed.items())]


def jpeg_problem(path: Path) -> str | None:
    """Why a file is no whole JPEG, or None; decodes it."""
    data = path.read_bytes()
    if not data.startswith(_START):
        return "it is no JPEG"
    if _END not in data[-_TAIL:]:
        return "its end is missing"
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"it cannot be decoded ({error})"
    return None


def _names(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for line in lines:
            yield from (name.decode() for name in _NAME.findall(line))


def _looks_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(2)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2))
            end = file.read(2)
    except OSError:
        return False
    if start == _START and end == _END:
        return True
    return path.is_file() and jpeg_problem(path) is None  # a few images of MS-COCO have something after their end


def _broken(part: Path) -> str | None:
    problem = jpeg_problem(part)
    return problem and f"what came is broken: {problem}"


def _unreachable(url: str, problem: str) -> MMRoleError:
    return MMRoleError(
        f"{GIVE_UP_AFTER} images failed one after the other", problem, url,
        "check the network, or name a mirror with COCO_URL=http://...; then run the same command again",
    )  # fmt: skip
