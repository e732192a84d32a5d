"""Fetches the data set, its MS-COCO images, or weights: `python -m data_utils.download data|weights --help`.

Everything is fetched in parallel, can be stopped and gone on with, and appears under its name only when its size and,
where the source gives one, its hash are right. A second run checks what is there and fetches only what is missing or
broken. Nothing is fetched but by this command. `HF_ENDPOINT` names a mirror of the Hugging Face Hub, `COCO_URL` one of
MS-COCO's train2017 folder.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_utils.download.coco import COCO_FOLDER, IMAGE_BYTES, fetch_coco, missing_coco, referenced_coco
from data_utils.download.transfer import Retries, Source, StoppedError, failures, fetch_file, first_line, in_parallel
from data_utils.errors import MMRoleError
from data_utils.files import write_error
from data_utils.images import image_name_problem

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
REFERENCED_COCO = 10_839  # by the whole data set; reckoned with before it is there to be counted
MARGIN = 200 * 2**20  # bytes left free
GIVE_UP_AFTER = 8  # files that failed one after the other, each after all its tries: then it is the hub or the line
_STAGING = (".download", "data/.download")  # where versions before this one kept what could not be gone on with
_PART = re.compile(r".+\.[0-9a-f]{12}\.part")


@dataclass(frozen=True)
class HubFile:
    """A file of a hub repository: its path there, bytes, git id, and sha256 if it is a large one."""

    path: str
    size: int
    blob_id: str
    sha256: str | None = None

    def part(self, folder: Path) -> Path:
        """Where it grows below `folder`; named by its content too, so that another version is not gone on with."""
        path = folder / self.path
        return path.with_name(f"{path.name}.{(self.sha256 or self.blob_id)[:12]}.part")


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
            f"the hub does not list the repository ({type(error).__name__})", first_line(error),
            f"{name} at {revision}",
            "check the network; a mirror can be named with HF_ENDPOINT=https://..., an access token with HF_TOKEN=...",
        ) from error  # fmt: skip
    files = [_hub_file(entry) for entry in tree if hasattr(entry, "blob_id")]
    for file in files:
        if image_name_problem(file.path):
            raise MMRoleError("the hub lists a path that leads elsewhere", file.path, name, "use another mirror")
        if not isinstance(file.size, int) or file.size < 0:
            raise MMRoleError(
                "the hub lists a size that is none", f"{file.path}: {file.size!r}", name, "use another mirror"
            )
    return HubRepo(name, kind, commit, tuple(file for file in files if wanted(file.path)), endpoint)


def content_problem(path: Path, file: HubFile, stop: threading.Event | None = None) -> str | None:
    """Why a file on the disk is not the hub's, or None. Large files have a sha256, small ones git's id.

    Raises:
        StoppedError: `stop` was set meanwhile.
    """
    if not path.is_file():
        return "not there"
    size = path.stat().st_size
    if size != file.size:
        return f"{size:,} bytes instead of {file.size:,}"
    if file.sha256:
        return None if _digest(path, hashlib.sha256(), stop) == file.sha256 else "its sha256 is another"
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return None if _digest(path, git, stop) == file.blob_id else "its git id is another"


def fetch_repo(repo: HubRepo, folder: Path, workers: int, retries: Retries) -> tuple[int, list[str]]:
    """Fetches what is missing or broken.

    A file that is stopped half-way stays as a `.part` file beside its place and is gone on with.

    Args:
        repo: What there is.
        folder: Where it belongs.
        workers: How many are fetched at once.
        retries: How often, after which waits.

    Returns:
        How many files were fetched, and a line for each that could not be.

    Raises:
        MMRoleError: The disk has no room for it, or does not take it, or so many files fail in a row that it cannot be
            the files.
    """
    remove_leftovers(repo, folder)
    missing = _missing(repo, folder, workers)
    come, size = sum(_come(file, folder) for file in missing), sum(file.size for file in missing)
    check_space(folder, size - come)
    keep_changed(missing, folder)
    with tqdm(
        desc=repo.name, total=size, initial=come, unit="B", unit_scale=True, disable=None, mininterval=0.5
    ) as bar:
        fetch = _fetcher(repo, folder, retries, bar.update)
        with closing(in_parallel(fetch, missing, workers)) as ended:
            failed = failures(ended, GIVE_UP_AFTER, lambda problem: _unreachable(repo, problem))
    return len(missing) - len(failed), sorted(f"{file.path}: {problem}" for file, problem in failed.items())


def remove_leftovers(repo: HubRepo, folder: Path) -> None:
    """Removes what stopped runs left and this one cannot go on with: parts of other versions, old staging folders."""
    for name in _STAGING:
        shutil.rmtree(folder / name, ignore_errors=True)
    wanted = {file.part(folder) for file in repo.files}
    for place in {path.parent for path in wanted}:
        for path in place.glob("*.part"):
            if _PART.fullmatch(path.name) and path not in wanted:
                path.unlink(missing_ok=True)


def keep_changed(missing: Sequence[HubFile], folder: Path) -> None:
    """Keeps JSON files that are there and are not the hub's beside their places: somebody may have worked on them.

    A file that is being fetched never stands in its place half-way.

    Raises:
        MMRoleError: One cannot be kept; nothing is fetched then.
    """
    for path in [folder / file.path for file in missing if file.path.endswith(".json")]:
        kept = path.with_name(f"{path.name}.before")
        try:
            if path.is_file() and path.stat().st_size:
                shutil.copy2(path, kept)
                print(f"{path} is not the hub's (any more); what is there is kept as {kept.name}")
        except OSError as error:
            raise write_error(kept, error, "nothing was fetched over it") from error


def bytes_to_come(repo: HubRepo, folder: Path) -> int:
    """How many bytes are still to be fetched, without a look into what is there."""
    files = [file for file in repo.files if not (folder / file.path).is_file()]
    return sum(file.size - _come(file, folder) for file in files)


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
    def check(file: HubFile, stop: threading.Event) -> str | None:
        return content_problem(folder / file.path, file, stop)

    with closing(in_parallel(check, repo.files, workers)) as ended:
        problems = dict(tqdm(ended, "checking", len(repo.files), unit="file", disable=None, leave=False))
    return [file for file in repo.files if problems[file]]


def _come(file: HubFile, folder: Path) -> int:
    """How many bytes of a file are in its part."""
    part = file.part(folder)
    return min(part.stat().st_size, file.size) if part.is_file() else 0


def _fetcher(
    repo: HubRepo, folder: Path, retries: Retries, moved: Callable[[int], object]
) -> Callable[[HubFile, threading.Event], str | None]:
    """What fetches one file of a repository."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers()  # the token among them, if there is one

    def fetch(file: HubFile, stop: threading.Event) -> str | None:
        def problem_of(part: Path) -> str | None:
            problem = content_problem(part, file, stop)
            return problem and f"what came is not what the hub lists: {problem}"

        url = hf_hub_url(repo.name, file.path, repo_type=repo.kind, revision=repo.commit, endpoint=repo.endpoint)
        source, target = Source(url, headers, file.size), folder / file.path
        return fetch_file(source, target, file.part(folder), problem_of, retries=retries, stop=stop, moved=moved)

    return fetch


def _unreachable(repo: HubRepo, problem: str) -> MMRoleError:
    return MMRoleError(
        f"{GIVE_UP_AFTER} files failed one after the other", problem, f"{repo.name} at {repo.commit}",
        "check the network; a mirror can be named with HF_ENDPOINT=https://..., an access token with HF_TOKEN=...; "
        "then run the same command again, what came so far is kept",
    )  # fmt: skip


def _hub_file(entry: Any) -> HubFile:
    return HubFile(entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)


def _digest(path: Path, digest: Any, stop: threading.Event | None) -> str:
    with path.open("rb") as file:
        while block := file.read(2**20):
            if stop and stop.is_set():
                raise StoppedError
            digest.update(block)
    return digest.hexdigest()


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
        remove_leftovers(repo, root)
        missing = bytes_to_come(repo, root)
        coco_there = sum(1 for _ in (root / COCO_FOLDER).glob("*.jpg"))
        images = 0 if options.no_coco else max(0, REFERENCED_COCO - coco_there)
        print(
            f"{DATASET} at {repo.commit}: {len(repo.files):,} files, {_gigabytes(missing)} to fetch to {root.resolve()}"
        )
        check_space(root, missing + images * IMAGE_BYTES)
        fetched, failed = fetch_repo(repo, root, options.workers, retries)
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
    for folder, repo in repos.items():
        remove_leftovers(repo, options.out_dir / folder)
    missing = sum(bytes_to_come(repo, options.out_dir / folder) for folder, repo in repos.items())
    print(
        f"{', '.join(r.name for r in repos.values())}: {_gigabytes(missing)} to fetch, to {options.out_dir.resolve()}"
    )
    check_space(options.out_dir, missing)
    status = 0
    for folder, repo in repos.items():
        fetched, failed = fetch_repo(repo, options.out_dir / folder, options.workers, Retries(options.attempts))
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
        command.add_argument(
            "--attempts", type=int, default=5, help="tries for each file without progress (%(default)s)"
        )
    options = parser.parse_args(arguments)
    unknown = [name for name in getattr(options, "names", ()) if name not in WEIGHTS]
    if unknown:
        raise MMRoleError("no such weights", unknown, "the command line", f"choose from {', '.join(WEIGHTS)}")
    if min(options.workers, options.attempts) < 1:
        raise MMRoleError("a number must be at least 1", None, "--workers, --attempts", "give a larger number")
    return options.run(options)
