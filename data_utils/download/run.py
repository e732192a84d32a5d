"""The downloads: the data set with its MS-COCO images, and the checkpoints."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_utils.download.coco import COCO_FOLDER, IMAGE_BYTES, fetch_coco, missing_coco, referenced_coco
from data_utils.download.hub import HubRepo, bytes_to_come, check_space, fetch_repo, gigabytes, list_repo
from data_utils.errors import MMRoleError
from data_utils.network import check_network_settings

DATASET = "YanqiDai/MMRole_dataset"
WEIGHTS = {
    "qwen-vl-chat": ("Qwen/Qwen-VL-Chat", "Qwen-VL-Chat"),
    "mmrole-agent": ("YanqiDai/MMRole-Agent", "MMRole-Agent"),
    "reward-model": ("YanqiDai/MMRole-Eval_RM", "MMRole-Eval_RM"),
}
DATA_FOLDERS = ("data", "dialogues", "images", "profiles", "RM_data")  # not its README.md, which would replace ours
# Code is never run here; the others are leftovers of training, the last a pickle.
NOT_WANTED = (
    *("*.py", "*.pyc", ".*", "*.pth", "*.pt", "*.pkl", "global_step*", "checkpoint-*", "runs/*"),
    "training_args.bin",
)
REFERENCED_COCO = 10_839  # by the complete data set; for the disk check before it can be counted


def download_data(options: argparse.Namespace) -> int:
    """Fetches the data set into `options.data_root`, then the MS-COCO images it refers to; 1 if a file failed."""
    root, status = options.data_root, 0
    check_network_settings(["HF_ENDPOINT", "COCO_URL"])
    if not options.only_coco:
        repo = list_repo(DATASET, "dataset", options.revision, is_data)
        if not repo.files:
            raise MMRoleError(
                "the repository holds none of the data folders", ", ".join(DATA_FOLDERS), f"{DATASET} at {repo.commit}",
                "choose another --revision",
            )  # fmt: skip
        missing = bytes_to_come(repo, root)
        coco_there = sum(1 for _ in (root / COCO_FOLDER).glob("*.jpg"))
        images = 0 if options.no_coco else max(0, REFERENCED_COCO - coco_there)
        print(
            f"{DATASET} at {repo.commit}: {len(repo.files):,} files, {gigabytes(missing)} to fetch to {root.resolve()}"
        )
        check_space(root, missing + images * IMAGE_BYTES)
        fetched, failed = fetch_repo(repo, root, options.workers, options.attempts)
        status = _report(DATASET, len(repo.files), fetched, failed)
    if not options.no_coco:
        names = referenced_coco(root)
        missing_names = missing_coco(root, names)
        check_space(root / COCO_FOLDER, len(missing_names) * IMAGE_BYTES)
        failed = fetch_coco(root, missing_names, workers=2 * options.workers, attempts=options.attempts)
        status |= _report("MS-COCO train2017", len(names), len(missing_names) - len(failed), failed)
    return status


def download_weights(options: argparse.Namespace) -> int:
    """Fetches the named checkpoints, each into its folder below `options.out_dir`; 1 if a file failed."""
    check_network_settings(["HF_ENDPOINT"])
    repos = {}
    for name in dict.fromkeys(options.names or WEIGHTS):
        hub_name, folder = WEIGHTS[name]
        repos[folder] = without_twins(list_repo(hub_name, "model", options.revision, is_weight))
    missing = sum(bytes_to_come(repo, options.out_dir / folder) for folder, repo in repos.items())
    names = ", ".join(repo.name for repo in repos.values())
    print(f"{names}: {gigabytes(missing)} to fetch, to {options.out_dir.resolve()}")
    check_space(options.out_dir, missing)
    status = 0
    for folder, repo in repos.items():
        fetched, failed = fetch_repo(repo, options.out_dir / folder, options.workers, options.attempts)
        status |= _report(f"{repo.name} at {repo.commit}", len(repo.files), fetched, failed)
    return status


def is_data(path: str) -> bool:
    """Return whether a file of the data set's repository is wanted."""
    return path.split("/")[0] in DATA_FOLDERS and not Path(path).name.startswith(".")


def is_weight(path: str) -> bool:
    """Return whether a file of a checkpoint's repository is wanted."""
    return not any(
        fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(Path(path).name, pattern) for pattern in NOT_WANTED
    )


def without_twins(repo: HubRepo) -> HubRepo:
    """Leave out pickled weights that also exist as safetensors."""
    if not any(file.path.endswith(".safetensors") for file in repo.files):
        return repo
    return replace(
        repo, files=tuple(file for file in repo.files if not fnmatch.fnmatch(file.path, "pytorch_model*.bin*"))
    )


def _report(name: str, total: int, fetched: int, failed: Sequence[str]) -> int:
    print(f"{name}: {total - len(failed):,} of {total:,} files verified, {fetched:,} fetched now")
    for line in failed[:10]:
        print(f"  failed: {line}")
    if failed:
        print(f"  {len(failed):,} failed; run the same command again to retry them")
    return 1 if failed else 0
