"""Fetches the images of MS-COCO's train2017 that a data root refers to, one by one instead of all 118,287."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import requests
from PIL import Image
from tqdm import tqdm

from data_utils.errors import MMRoleError
from data_utils.files import write_error

COCO_FOLDER = "images/COCO/train2017"
COCO_URL = "http://images.cocodataset.org/train2017"  # the certificate of its https is another host's
IMAGE_BYTES = 170_000  # an image's mean, rounded up: 19.3 GB for 118,287
LARGEST_IMAGE = 20 * 2**20
GIVE_UP_AFTER = 20  # images that failed one after the other: then it is the server or the line, not the images
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_WAIT = 60.0
_TIMEOUT = (10, 30)  # seconds to connect, and between two pieces
_NAME = re.compile(rb'"image"\s*:\s*"COCO/train2017/(\d{12}\.jpg)"')
_START, _END = b"\xff\xd8", b"\xff\xd9"
_TAIL = 4096
_PIECE = 2**13  # bytes; of a piece that the line dropped in, nothing is kept
_OF_THREAD = threading.local()


@dataclass(frozen=True)
class Retries:
    """How often something is tried, and how long is waited before: nothing, then twice as long each time."""

    attempts: int = 5
    first_wait: float = 1.0

    def wait(self, attempt: int) -> float:
        """Seconds before attempt number `attempt` (from 0)."""
        return min(self.first_wait * 2 ** (attempt - 1), _LONGEST_WAIT) if attempt else 0.0


class _AgainError(Exception):
    """A try failed in a way that the next may not."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


class _LostError(Exception):
    """A try failed in a way that the next will too."""


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
        MMRoleError: A folder cannot be written, or so many fail in a row that it cannot be the images.
    """
    url = (url or os.environ.get("COCO_URL") or COCO_URL).rstrip("/")
    folder = data_root / COCO_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error, "nothing was fetched") from error
    failed: dict[str, str] = {}
    in_a_row = 0
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_fetch, f"{url}/{name}", folder / name, retries): name for name in names}
        try:
            for future in tqdm(as_completed(futures), "MS-COCO", len(futures), unit="image", disable=None):
                problem = future.result()
                in_a_row = in_a_row + 1 if problem else 0
                if problem:
                    failed[futures[future]] = problem
                if in_a_row == GIVE_UP_AFTER:
                    raise _unreachable(url, problem or "")
        except BaseException:
            _drop(futures)
            raise
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


def _fetch(url: str, target: Path, retries: Retries) -> str | None:
    """Fetches one image; gives why it could not, if so."""
    part = target.with_name(f"{target.name}.part")
    problem, asked_wait = "", 0.0
    for attempt in range(retries.attempts):
        time.sleep(max(retries.wait(attempt), asked_wait))
        try:
            _receive(url, part)
            broken = jpeg_problem(part)
            if broken is None:
                part.replace(target)
                return None
            part.unlink()
            problem, asked_wait = f"what came is broken: {broken}", 0.0
        except _AgainError as error:
            problem, asked_wait = str(error), error.wait
        except _LostError as error:
            part.unlink(missing_ok=True)
            return str(error)
        except requests.RequestException as error:  # what came so far stays in the .part file
            problem, asked_wait = f"{type(error).__name__}: {error}", 0.0
        except OSError as error:
            raise write_error(target, error, "every image fetched so far is kept") from error
    return problem


def _receive(url: str, part: Path) -> None:
    """Fetches what is missing of `part`; returns when as much has come as the server announced."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with _session().get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code == 416:
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return  # it was all there already
            part.unlink(missing_ok=True)
            raise _AgainError("the server has not the rest of it")
        if response.status_code in _AGAIN:
            raise _AgainError(f"status {response.status_code}", _seconds(response.headers.get("Retry-After")))
        if response.status_code not in (200, 206):
            raise _LostError(f"status {response.status_code}")
        goes_on = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status_code == 206 and not goes_on:
            part.unlink(missing_ok=True)
            raise _AgainError("the server sent another part than asked for")
        with part.open("ab" if goes_on else "wb") as file:
            for piece in response.iter_content(_PIECE):
                file.write(piece)
                if file.tell() > LARGEST_IMAGE:
                    raise _LostError(f"over {LARGEST_IMAGE:,} bytes")
        announced = response.headers.get("Content-Length", "")
        came = part.stat().st_size - (have if goes_on else 0)
        if announced.isdigit() and came < int(announced):
            raise _AgainError(f"{came:,} of {int(announced):,} bytes came")


def _seconds(text: str | None) -> float:
    """What a Retry-After header asks for, within reason; a date counts as nothing."""
    return min(float(text), _LONGEST_WAIT) if text and text.strip().isdigit() else 0.0


def _session() -> requests.Session:
    """A session for each thread, which keeps its connection open from image to image."""
    if not hasattr(_OF_THREAD, "session"):
        _OF_THREAD.session = requests.Session()
    return _OF_THREAD.session


def _drop(futures: dict[Future[str | None], str]) -> None:
    for future in futures:
        future.cancel()


def _unreachable(url: str, problem: str) -> MMRoleError:
    return MMRoleError(
        f"{GIVE_UP_AFTER} images failed one after the other", problem, url,
        "check the network, or name a mirror with COCO_URL=http://...; then run the same command again",
    )  # fmt: skip
