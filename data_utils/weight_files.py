"""Damage of a checkpoint's weights that can be seen without loading them."""

from __future__ import annotations

import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data_utils.errors import MMRoleError
from data_utils.fingerprint import adapter_base, is_adapter

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ZIP, _PICKLE = b"PK", b"\x80"  # what torch.save begins a file with, since version 1.6 and before
_ZIPPED = (".bin", ".pt", ".pth")
_FETCH = "fetch the checkpoint again (README: where weights come from), or give another folder"


def weight_problems(folder: Path) -> list[MMRoleError]:
    """Files of a complete checkpoint that are damaged for sure, an adapter's base included; each is looked at briefly.

    Args:
        folder: A checkpoint in the released layout, or a LoRA adapter.

    Raises:
        MMRoleError: If an adapter names no base.
    """
    paths = sorted(folder.glob("*.tiktoken")) + _weight_files(folder)
    problems = [
        MMRoleError(f"the checkpoint cannot be loaded: {path.name} {damage}", _size(path), path, fix)
        for path in paths
        for damage, fix in file_damages(path)
    ]
    return problems + (weight_problems(adapter_base(folder)) if is_adapter(folder) else [])


def _weight_files(folder: Path) -> list[Path]:
    """What a loader takes: safetensors if there are any."""
    stems = ("adapter_model",) if is_adapter(folder) else ("model", "pytorch_model")
    for suffix in (".safetensors", ".bin"):
        found = [path for stem in stems for path in sorted(folder.glob(f"{stem}*{suffix}"))]
        if found:
            return found
    return []


def file_damages(path: Path) -> list[tuple[str, str]]:
    """What is surely wrong with a file of weights or of an optimizer's state, and what to do about it."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            fix = f"fetch the files themselves: git lfs pull, in {path.parent}"
            return [("is a pointer of git-lfs, not the file itself", fix)]
        if not start:
            return [("is empty", _FETCH)]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):  # holds the header against the file's size
                return []
        return [(damage, _FETCH)] if path.suffix in _ZIPPED and (damage := _bin_damage(path, start)) else []
    except SafetensorError as error:
        return [(f"is cut off or damaged: {error}", _FETCH)]
    except OSError as error:
        return [(f"cannot be read: {error.strerror or error}", "check its permissions")]


def _bin_damage(path: Path, start: bytes) -> str | None:
    if start.startswith(_ZIP):
        return None if zipfile.is_zipfile(path) else "is cut off: the end of the archive is not there"
    return None if start.startswith(_PICKLE) else "is no file of weights"


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size:,} bytes"
    except OSError:
        return "unknown size"
