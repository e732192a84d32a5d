"""Downloads files of a Hugging Face repository with huggingface_hub, and checks each by its size and hash."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_utils.errors import MMRoleError
from data_utils.files import write_error
from data_utils.images import image_name_problem

STAGING = ".download"  # in the target folder; verified files are moved from here to their places
MARGIN = 200 * 2**20  # bytes left free
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its path there, bytes, git id, and sha256 if it is a large one."""

    path: str
    size: int
    blob_id: str
    sha256: str | None = None


@dataclass(frozen=True)
class HubRepo:
    """A repository at one commit, and its wanted files; `kind` is "model" or "dataset"."""

    name: str
    kind: str
    commit: str
    files: tuple[HubFile, ...]


def list_repo(name: str, kind: str, revision: str, wanted: Callable[[str], bool]) -> HubRepo:
    """Return the files of a repository at a branch, tag or commit; `wanted` chooses by path.

    Raises:
        MMRoleError: The hub cannot be reached, has no such repository, or lists a path outside of it.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint())
    try:
        commit = api.repo_info(name, repo_type=kind, revision=revision).sha or revision
        tree = list(api.list_repo_tree(name, repo_type=kind, revision=commit, recursive=True))
    except Exception as error:  # its errors change with its HTTP library from version to version
        raise MMRoleError(
            f"the hub does not list the repository ({type(error).__name__})", _first_line(error),
            f"{name} at {revision}",
            "check the network; HF_ENDPOINT=https://... names a mirror; for a repository with terms accept them on its "
            "page, and give an access token: HF_TOKEN=...",
        ) from error  # fmt: skip
    files = [
        HubFile(entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
        for entry in tree
        if hasattr(entry, "blob_id")
    ]
    for file in files:
        if image_name_problem(file.path):
            raise MMRoleError("the hub lists a path outside of the repository", file.path, name, "use another mirror")
    return HubRepo(name, kind, commit, tuple(file for file in files if wanted(file.path)))


def content_problem(path: Path, file: HubFile) -> str | None:
    """Return how a local file differs from the hub's, or None."""
    if not path.is_file():
        return "not there"
    size = path.stat().st_size
    if size != file.size:
        return f"{size:,} bytes instead of {file.size:,}"
    if file.sha256:
        return None if _digest(path, hashlib.sha256()) == file.sha256 else "its sha256 differs"
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return None if _digest(path, git) == file.blob_id else "its git id differs"


def fetch_repo(repo: HubRepo, folder: Path, workers: int, attempts: int) -> tuple[int, list[str]]:
    """Fetches the files of a repository that are missing or broken.

    Args:
        repo: The repository.
        folder: The target folder.
        workers: Files fetched at once.
        attempts: How often a missing file is tried.

    Returns:
        The number of files fetched, and a line for each that could not be.

    Raises:
        MMRoleError: The disk has not enough room, or a file cannot be written.
    """
    missing = _problems(repo.files, folder, workers)
    wanted, last = len(missing), ""
    missing = _place(missing, folder, workers)  # left by a killed run
    check_space(folder, sum(file.size for file in missing))
    for _ in range(attempts):
        if missing:
            last = _download(repo, list(missing), folder / STAGING, workers)
            missing = _place(missing, folder, workers)
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    failed = [f"{file.path}: {problem}{last and f' ({last})'}" for file, problem in missing.items()]
    return wanted - len(failed), sorted(failed)


def bytes_to_come(repo: HubRepo, folder: Path) -> int:
    """Return how many bytes are still to be fetched, judging by file names alone."""
    places = (folder, folder / STAGING)
    return sum(file.size for file in repo.files if not any((place / file.path).is_file() for place in places))


def check_space(folder: Path, size: int) -> None:
    """Check that the disk of `folder` has room for `size` more bytes.

    Raises:
        MMRoleError: It has not enough room; names both numbers.
    """
    exists = next(parent for parent in [folder.resolve(), *folder.resolve().parents] if parent.exists())
    free = shutil.disk_usage(exists).free
    if size and size + MARGIN > free:
        raise MMRoleError(
            "not enough room on the disk", f"{gigabytes(size)} to fetch, {gigabytes(free)} free", folder,
            "free some space or choose another folder; what was fetched before is kept",
        )  # fmt: skip


def gigabytes(size: int) -> str:
    """Return a number of bytes as text."""
    return f"{size / 1e9:.1f} GB"


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _problems(files: Iterable[HubFile], folder: Path, workers: int) -> dict[HubFile, str]:
    """Return what is wrong with each file that is missing or broken."""
    files = list(files)
    with ThreadPoolExecutor(workers) as pool:
        problems = pool.map(lambda file: content_problem(folder / file.path, file), files)
        bar = tqdm(zip(files, problems, strict=True), "checking", len(files), unit="file", disable=None, leave=False)
        return {file: problem for file, problem in bar if problem}


def _download(repo: HubRepo, files: Sequence[HubFile], staging: Path, workers: int) -> str:
    """Fetch the files into `staging` and return the error that ended it early, if any."""
    from huggingface_hub import snapshot_download

    shutil.rmtree(staging / ".cache", ignore_errors=True)  # partial files of a killed run cannot be resumed
    try:
        snapshot_download(
            repo.name, repo_type=repo.kind, revision=repo.commit, local_dir=staging, max_workers=workers,
            allow_patterns=[glob.escape(file.path) for file in files], endpoint=_endpoint(), force_download=True,
        )  # fmt: skip
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise write_error(staging, error, "finished files are kept") from error
        return _first_line(error)
    return ""


def _place(files: Iterable[HubFile], folder: Path, workers: int) -> dict[HubFile, str]:
    """Move the verified files to their places and return the problem of each other file.

    A JSON file that is already there is kept beside it: the user may have edited it.
    """
    files = list(files)
    problems = _problems(files, folder / STAGING, workers)
    for file in files:
        if file in problems:
            continue
        path = folder / file.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json" and path.is_file() and path.stat().st_size:
                kept = path.with_name(f"{path.name}.before")
                path.replace(kept)
                print(f"{path} differed from the hub's; it is kept as {kept.name}")
            shutil.move(folder / STAGING / file.path, path)
        except OSError as error:
            raise write_error(path, error, "the old file is kept") from error
    return problems


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).split("\n")[0]
