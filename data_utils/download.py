"""Fetches the data set, its MS-COCO images, or weights: `python -m data_utils.download data|weights --help`.

Everything is fetched in parallel, can be stopped and gone on with, and appears under its name only when its size and,
where the source gives one, its hash are right. A second run checks what is there and fetches only what is missing or
broken. Nothing is fetched but by this command. `HF_ENDPOINT` names a mirror of the Hugging Face Hub, `COCO_URL` one of
MS-COCO's train2017 folder.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_utils.download_coco import COCO_FOLDER, IMAGE_BYTES, Retries, fetch_coco, missing_coco, referenced_coco
from data_utils.errors import MMRoleError, run_main
from data_utils.image_files import image_name_problem

DATASET = "YanqiDai/MMRole_dataset"
WEIGHTS = {
    "qwen-vl-chat": ("Qwen/Qwen-VL-Chat", "Qwen-VL-Chat"),
    "mmrole-agent": ("YanqiDai/MMRole-Agent", "MMRole-Agent"),
    "reward-model": ("YanqiDai/MMRole-Eval_RM", "MMRole-Eval_RM"),
}
DATA_FOLDERS = ("data", "dialogues", "images", "profiles", "RM_data")  # not the data set's README.md: ours stands there
# Code is never run here; the others are leftovers of a training, the last a pickle.
NOT_WANTED = (
    "*.py",
    "*.pyc",
    ".*",
    "*.pth",
    "*.pt",
    "*.pkl",
    "global_step*",
    "checkpoint-*",
    "runs/*",
    "training_args.bin",
)
STAGING = ".download"
REFERENCED_COCO = 10_839  # by the whole data set; reckoned with before it is there to be counted
MARGIN = 200 * 2**20  # bytes left free
_MANY = 50  # files from which one bar for all is clearer than a bar for each


@dataclass(frozen=True)
class HubFile:
    """A file of a hub repository: its path there, bytes, git id, and sha256 if it is a large one."""

    path: str
    size: int
    blob_id: str
    sha256: str | None = None


@dataclass(frozen=True)
class HubRepo:
    """A hub repository at one commit, and the files of it that are wanted."""

    name: str
    kind: str  # "model" or "dataset"
    commit: str
    files: tuple[HubFile, ...]
    endpoint: str | None = None


def list_repo(
    name: str, kind: str, revision: str, wanted: Callable[[str], bool], endpoint: str | None = None
) -> HubRepo:
    """What a hub repository holds.

    Args:
        name: Owner and name.
        kind: "model" or "dataset".
        revision: A branch, tag or commit.
        wanted: Whether a path is to be fetched.
        endpoint: Another hub than `HF_ENDPOINT` or Hugging Face's own.

    Raises:
        MMRoleError: The hub cannot be reached, knows no such repository, or lists a path that leads elsewhere.
    """
    from huggingface_hub import HfApi

    endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
    api = HfApi(endpoint=endpoint)
    try:
        commit = api.repo_info(name, repo_type=kind, revision=revision).sha or revision
        tree = list(api.list_repo_tree(name, repo_type=kind, revision=commit, recursive=True))
    except Exception as error:  # the hub's clients raise what their versions' HTTP libraries raise
        raise MMRoleError(
            f"the hub does not list the repository ({type(error).__name__})", _first_line(error),
            f"{name} at {revision}",
            "check the network; a mirror can be named with HF_ENDPOINT=https://..., an access token with HF_TOKEN=...",
        ) from error  # fmt: skip
    files = [_hub_file(entry) for entry in tree if hasattr(entry, "blob_id")]
    for file in files:
        if image_name_problem(file.path):
            raise MMRoleError("the hub lists a path that leads elsewhere", file.path, name, "use another mirror")
    return HubRepo(name, kind, commit, tuple(file for file in files if wanted(file.path)), endpoint)


def content_problem(path: Path, file: HubFile) -> str | None:
    """Why a file on the disk is not the hub's, or None. Large files have a sha256, small ones git's id."""
    if not path.is_file():
        return "not there"
    size = path.stat().st_size
    if size != file.size:
        return f"{size:,} bytes instead of {file.size:,}"
    if file.sha256:
        return None if _digest(path, hashlib.sha256()) == file.sha256 else "its sha256 is another"
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return None if _digest(path, git) == file.blob_id else "its git id is another"


def fetch_repo(repo: HubRepo, folder: Path, staging: Path, workers: int, retries: Retries) -> tuple[int, list[str]]:
    """Fetches what is missing or broken.

    Args:
        repo: What there is.
        folder: Where it belongs.
        staging: Where files lie until they are whole and verified; removed when nothing failed.
        workers: How many are fetched at once.
        retries: How often, after which waits.

    Returns:
        How many files were fetched, and a line for each that could not be.

    Raises:
        MMRoleError: The disk has no room for it, or cannot be written.
    """
    missing = _missing(repo, folder, workers)
    check_space(folder, sum(file.size for file in missing))
    failed = []
    with _quiet_bars(len(missing) >= _MANY), ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_fetch, repo, file, folder, staging, retries): file for file in missing}
        bar = tqdm(as_completed(futures), repo.name, len(futures), unit="file", disable=None, mininterval=0.5)
        try:
            for future in bar:
                problem = future.result()
                if problem:
                    failed.append(f"{futures[future].path}: {problem}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if not failed:
        shutil.rmtree(staging, ignore_errors=True)
    return len(missing) - len(failed), sorted(failed)


def check_space(folder: Path, size: int) -> None:
    """Raises if the disk that holds `folder` has no room for `size` bytes more.

    Raises:
        MMRoleError: It has not; with both numbers.
    """
    there = next(parent for parent in [folder.resolve(), *folder.resolve().parents] if parent.exists())
    free = shutil.disk_usage(there).free
    if size and size + MARGIN > free:
        raise MMRoleError(
            "not enough room on the disk", f"{_gigabytes(size)} to fetch, {_gigabytes(free)} free", folder,
            "free some space or choose another folder; what was fetched before is kept",
        )  # fmt: skip


def _missing(repo: HubRepo, folder: Path, workers: int) -> list[HubFile]:
    with ThreadPoolExecutor(workers) as pool:
        problems = pool.map(lambda file: content_problem(folder / file.path, file), repo.files)
        bar = tqdm(problems, "checking", len(repo.files), unit="file", disable=None, leave=False)
        return [file for file, problem in zip(repo.files, bar, strict=True) if problem]


def _fetch(repo: HubRepo, file: HubFile, folder: Path, staging: Path, retries: Retries) -> str | None:
    """Fetches one file; gives why it could not, if so."""
    from huggingface_hub import hf_hub_download

    problem, anew = "", False
    for attempt in range(retries.attempts):
        time.sleep(retries.wait(attempt))
        try:
            path = hf_hub_download(
                repo.name, file.path, repo_type=repo.kind, revision=repo.commit, local_dir=staging,
                endpoint=repo.endpoint, force_download=anew,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - one file's failure; the clients raise their HTTP libraries' errors
            problem = f"{type(error).__name__}: {_first_line(error)}"
            if _status(error) in (401, 403, 404):
                return problem
            # What was resumed to a wrong length is of no use; after a mere drop of the line it is.
            anew = _status(error) == 416 or "onsistency check" in str(error)
            continue
        wrong = content_problem(Path(path), file)
        if wrong is None:
            _move(Path(path), folder / file.path)
            return None
        Path(path).unlink()
        problem, anew = f"what came is not what the hub lists: {wrong}", True
    return problem


def _move(path: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        whole = target.with_name(f"{target.name}.part")  # on the target's own disk, should that be another
        shutil.move(path, whole)
        whole.replace(target)
    except OSError as error:
        raise MMRoleError(
            f"cannot write: {error.strerror}", target, fix="check the folder and its permissions, then run it again"
        ) from error


def _hub_file(entry: Any) -> HubFile:
    return HubFile(entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, however deep the hub's client wrapped it."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status:
            return status
        error = error.__cause__
    return None


def _quiet_bars(quiet: bool) -> contextlib.ExitStack:
    """Hides the hub's bars while the stack is open."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    stack = contextlib.ExitStack()
    if quiet and not are_progress_bars_disabled():
        disable_progress_bars()
        stack.callback(enable_progress_bars)
    return stack


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).split("\n")[0]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _is_data(path: str) -> bool:
    return path.split("/")[0] in DATA_FOLDERS and not Path(path).name.startswith(".")


def _is_weight(path: str) -> bool:
    return not any(
        fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(Path(path).name, pattern) for pattern in NOT_WANTED
    )


def _without_twins(repo: HubRepo) -> HubRepo:
    """Leaves out pickled weights that are there as safetensors too."""
    if not any(file.path.endswith(".safetensors") for file in repo.files):
        return repo
    kept = [file for file in repo.files if not fnmatch.fnmatch(file.path, "pytorch_model*.bin*")]
    return HubRepo(repo.name, repo.kind, repo.commit, tuple(kept), repo.endpoint)


def _report(name: str, total: int, fetched: int, failed: Sequence[str]) -> int:
    print(f"{name}: {total - len(failed):,} of {total:,} files are there and verified, {fetched:,} fetched now")
    for line in failed[:10]:
        print(f"  failed: {line}")
    if failed:
        print(f"  {len(failed):,} failed; the same command tries them again")
    return 1 if failed else 0


def download_data(options: argparse.Namespace) -> int:
    """Fetches the data set into `options.data_root`, then the MS-COCO images it refers to; 1 if a file failed."""
    root, retries, status = options.data_root, Retries(options.attempts), 0
    if not options.only_coco:
        repo = list_repo(DATASET, "dataset", options.revision, _is_data)
        if not repo.files:
            raise MMRoleError(
                "the repository holds none of the data folders", ", ".join(DATA_FOLDERS), f"{DATASET} at {repo.commit}",
                "choose another --revision",
            )  # fmt: skip
        missing = sum(file.size for file in repo.files if not (root / file.path).is_file())
        coco_there = sum(1 for _ in (root / COCO_FOLDER).glob("*.jpg"))
        images = 0 if options.no_coco else max(0, REFERENCED_COCO - coco_there)
        print(
            f"{DATASET} at {repo.commit}: {len(repo.files):,} files, {_gigabytes(missing)} to fetch to {root.resolve()}"
        )
        check_space(root, missing + images * IMAGE_BYTES)
        fetched, failed = fetch_repo(repo, root, root / "data" / STAGING, options.workers, retries)
        status = _report(DATASET, len(repo.files), fetched, failed)
    if not options.no_coco:
        names = referenced_coco(root)
        missing_names = missing_coco(root, names)
        check_space(root / COCO_FOLDER, len(missing_names) * IMAGE_BYTES)
        failed = fetch_coco(root, missing_names, workers=2 * options.workers, retries=retries)
        status |= _report("MS-COCO train2017", len(names), len(missing_names) - len(failed), failed)
    return status


def download_weights(options: argparse.Namespace) -> int:
    """Fetches the named checkpoints, each into its folder below `options.out_dir`; 1 if a file failed."""
    repos = {}
    for name in dict.fromkeys(options.names or WEIGHTS):
        hub_name, folder = WEIGHTS[name]
        repos[folder] = _without_twins(list_repo(hub_name, "model", options.revision, _is_weight))
    missing = sum(
        f.size for folder, r in repos.items() for f in r.files if not (options.out_dir / folder / f.path).is_file()
    )
    print(
        f"{', '.join(r.name for r in repos.values())}: {_gigabytes(missing)} to fetch, to {options.out_dir.resolve()}"
    )
    check_space(options.out_dir, missing)
    status = 0
    for folder, repo in repos.items():
        target = options.out_dir / folder
        fetched, failed = fetch_repo(repo, target, target / STAGING, options.workers, Retries(options.attempts))
        status |= _report(f"{repo.name} at {repo.commit}", len(repo.files), fetched, failed)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.download", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(required=True, metavar="data|weights")
    data = commands.add_parser("data", help="the data set and the MS-COCO images it refers to")
    data.add_argument("data_root", type=Path, help="the data root to fill")
    parts = data.add_mutually_exclusive_group()
    parts.add_argument("--no_coco", action="store_true", help="leave out the MS-COCO images")
    parts.add_argument("--only_coco", action="store_true", help="only the MS-COCO images that the data root refers to")
    data.set_defaults(run=download_data, workers=8)
    weights = commands.add_parser("weights", help="checkpoints")
    weights.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(WEIGHTS)} (default: all)")
    weights.add_argument("--out_dir", type=Path, required=True, help="the folder of checkpoint folders")
    weights.set_defaults(run=download_weights, workers=4)
    for command in (data, weights):
        command.add_argument("--revision", default="main", help="a branch, tag or commit of the hub repositories")
        command.add_argument("--workers", type=int, help="files fetched at once (%(default)s)")
        command.add_argument("--attempts", type=int, default=5, help="tries for each file (%(default)s)")
    options = parser.parse_args(arguments)
    unknown = [name for name in getattr(options, "names", ()) if name not in WEIGHTS]
    if unknown:
        raise MMRoleError("no such weights", unknown, "the command line", f"choose from {', '.join(WEIGHTS)}")
    if min(options.workers, options.attempts) < 1:
        raise MMRoleError("a number must be at least 1", None, "--workers, --attempts", "give a larger number")
    return options.run(options)


if __name__ == "__main__":
    sys.exit(run_main(main))
