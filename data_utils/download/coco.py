"""Downloads the images of MS-COCO's train2017 that a data root refers to, instead of all 118,287."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from tqdm import tqdm

from data_utils.errors import MMRoleError
from data_utils.files import write_error

COCO_FOLDER = "images/COCO/train2017"
COCO_URL = "http://images.cocodataset.org/train2017"  # its https certificate belongs to another host
IMAGE_BYTES = 170_000  # an image's mean, rounded up: 19.3 GB for 118,287
_TIMEOUT = (10, 30)  # seconds to connect, and without a byte
GIVE_UP_AFTER = 20  # consecutive failures after which the server or the network is to blame, not the images
_NAME = re.compile(rb'"image"\s*:\s*"COCO/train2017/(\d{12}\.jpg)"')
_START, _END = b"\xff\xd8", b"\xff\xd9"
_TAIL = 4096
_AGAIN = (408, 425, 429)  # and all from 500


def referenced_coco(data_root: Path) -> list[str]:
    """Return the file names of the COCO images that dialogues and samples of a data root refer to, sorted.

    Raises:
        MMRoleError: There are no such files.
    """
    folders = [data_root / name for name in ("dialogues", "data", "RM_data")]
    files = sorted(file for folder in folders for file in folder.rglob("*.json"))
    if not files:
        raise MMRoleError(
            "no dialogues and no samples, so the needed images are unknown", None, data_root,
            "fetch the data set first (bash scripts/download_data.sh), or choose its folder",
        )  # fmt: skip
    return sorted({name for file in files for name in _names(file)})


def missing_coco(data_root: Path, names: Sequence[str]) -> list[str]:
    """Return the missing or broken images among `names`. Quick, because each was decoded when it was fetched."""
    folder = data_root / COCO_FOLDER
    return [name for name in names if not _looks_whole(folder / name)]


def fetch_coco(data_root: Path, names: Sequence[str], *, workers: int, attempts: int, url: str = "") -> list[str]:
    """Fetches images into `images/COCO/train2017` of a data root.

    Args:
        data_root: The data root.
        names: File names.
        workers: Images fetched at once.
        attempts: How often each is tried.
        url: Where they lie; by default `COCO_URL` of the environment, or MS-COCO's own server.

    Returns:
        A line for each image that could not be fetched.

    Raises:
        MMRoleError: They cannot be written, or too many fail in a row.
    """
    url = (url or os.environ.get("COCO_URL") or COCO_URL).rstrip("/")
    folder = data_root / COCO_FOLDER
    failed, in_a_row = {}, 0
    session = requests.Session()
    session.mount(url, HTTPAdapter(pool_maxsize=workers))
    with ThreadPoolExecutor(workers) as pool:
        tasks = {pool.submit(_fetch, session, f"{url}/{name}", folder / name, attempts): name for name in names}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for task in tqdm(as_completed(tasks), "MS-COCO", len(tasks), unit="image", disable=None):
                problem = task.result()
                in_a_row = in_a_row + 1 if problem else 0
                if problem:
                    failed[tasks[task]] = problem
                if in_a_row == GIVE_UP_AFTER:
                    raise _unreachable(url, str(problem))
        except OSError as error:
            raise write_error(folder, error, "finished images are kept") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [f"{name}: {problem}" for name, problem in sorted(failed.items())]


def jpeg_problem(data: bytes) -> str | None:
    """Decode a JPEG and return its problem, or None."""
    if not data.startswith(_START):
        return "it is not a JPEG"
    if _END not in data[-_TAIL:]:
        return "its end is missing"
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"it cannot be decoded ({error})"
    return None


def _fetch(session: requests.Session, url: str, target: Path, attempts: int) -> str | None:
    """Fetch one image and return the problem, or None."""
    problem = None
    for attempt in range(attempts):
        time.sleep(max(0, attempt - 1))
        try:
            response = session.get(url, timeout=_TIMEOUT)
        except requests.RequestException as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        if response.status_code == 200:
            broken = jpeg_problem(response.content)
            if not broken:
                part = target.with_name(f"{target.name}.part")
                part.write_bytes(response.content)
                part.replace(target)
                return None
            problem = f"the download is broken: {broken}"
        else:
            problem = f"status {response.status_code}"
            if response.status_code < 500 and response.status_code not in _AGAIN:
                break
    return problem


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
    return (
        path.is_file() and jpeg_problem(path.read_bytes()) is None
    )  # a few images of MS-COCO have something after their end


def _unreachable(url: str, problem: str) -> MMRoleError:
    return MMRoleError(
        f"{GIVE_UP_AFTER} images in a row failed", problem, url,
        "check the network, or name a mirror with COCO_URL=http://...; then run the same command again",
    )  # fmt: skip
