"""The files of a checkpoint: what is missing, what is damaged, whether it is an adapter, and its fingerprint.

Nothing is loaded, and neither torch nor transformers is imported.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
VOCAB_FILE = "qwen.tiktoken"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_SETTINGS = ("config.json", GENERATION_CONFIG, "tokenizer_config.json", ADAPTER_CONFIG)
_WEIGHTS = {  # of a complete checkpoint and of an adapter, in the order in which a loader looks for them
    False: (("model", ".safetensors"), ("pytorch_model", ".bin")),
    True: (("adapter_model", ".safetensors"), ("adapter_model", ".bin")),
}
_CHUNKS = 128
_CHUNK_BYTES = 32 * 1024
_ZIP, _PICKLE = b"PK", b"\x80"  # first bytes of files by torch.save, since version 1.6 and before
_ZIPPED = (".bin", ".pt", ".pth")
_FETCH = "fetch the checkpoint again (see model_weights/README.md), or give another folder"


class CheckpointError(ValueError):
    """A problem with the files of a checkpoint.

    Args:
        what: What is wrong, one sentence.
        value: The offending value, or a list of them.
        where: The file or folder.
        fix: What to do about it.
    """

    def __init__(self, what: str, value: object = None, where: object = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.value = value
        self.where = where
        self.fix = fix

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[object, ...]]:
        return type(self), (self.what, self.value, self.where, self.fix)

    def __str__(self) -> str:
        value = ", ".join(map(str, self.value)) if isinstance(self.value, list) else self.value
        text = self.what if value is None else f"{self.what}: {value}"
        text += f" ({self.where})" if self.where is not None else ""
        return f"{text}. {self.fix[:1].upper()}{self.fix[1:]}." if self.fix else text


class MissingFilesError(CheckpointError, FileNotFoundError):
    """A checkpoint, or a file that it needs, is missing."""


def read_json_file(path: Path) -> dict[str, Any]:
    """Returns the JSON object that a file of a checkpoint holds.

    Raises:
        CheckpointError: It cannot be read, is not JSON, or not an object; names the file and the place.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not a JSON file", str(error), path, "fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError("the file holds no JSON object", type(content).__name__, path, "fetch it again")
    return content


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder holds a LoRA adapter, which needs a base checkpoint.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    try:
        return (folder / ADAPTER_CONFIG).is_file()
    except OSError as error:
        raise _unreadable(folder, error) from error


def adapter_base(folder: Path) -> Path:
    """Returns the base checkpoint that an adapter names; a relative path counts from the working directory, or else
    from the adapter's folder.

    Raises:
        CheckpointError: The adapter names none.
    """
    base = read_json_file(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        fix = "set base_model_name_or_path there"
        raise CheckpointError("the adapter does not name its base", base, folder / ADAPTER_CONFIG, fix)
    return Path(base) if Path(base).is_absolute() or Path(base).is_dir() else folder / base


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of weights that a loader takes: safetensors before bin, every shard that the index names.

    Raises:
        CheckpointError: The index is damaged.
    """
    for stem, suffix in _WEIGHTS[is_adapter(folder)]:
        whole, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return [folder / name for name in _shard_names(index)]
    return []


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json_file(index).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError("the index of the weights names no files of its folder", names, index, "fetch it again")
    return names


# ---------------------------------------------------------------------------- complete?


def missing_files(folder: Path) -> list[str]:
    """Returns the names of the missing files of a checkpoint or an adapter.

    Raises:
        CheckpointError: The index of its weights is damaged.
    """
    adapter = is_adapter(folder)
    missing = [] if adapter or (folder / "config.json").is_file() else ["config.json"]
    if not adapter and not (folder / VOCAB_FILE).is_file():
        missing.append(VOCAB_FILE)
    weights = weight_files(folder)
    if not weights:
        (first, _), (second, _) = _WEIGHTS[adapter]
        missing.append(f"the weights ({first}*.safetensors or {second}*.bin)")
    return missing + [path.name for path in weights if not path.is_file()]


def checkpoint_problems(
    folder: str | Path, *, use_lora: bool = False, flag: str = "--model_path"
) -> list[CheckpointError]:
    """Returns everything that is missing from a checkpoint folder.

    Args:
        folder: A checkpoint in the released layout, or a LoRA adapter, whose base is checked too.
        use_lora: Whether it has to be an adapter.
        flag: The flag of the folder, for the messages.
    """
    folder = Path(folder)
    fetch = f"download or copy the checkpoint completely (see model_weights/README.md), or give another {flag}"
    if not folder.is_dir():
        return [MissingFilesError("there is no such checkpoint folder", folder, flag, fetch)]
    try:
        next(folder.iterdir(), None)
        if use_lora and not is_adapter(folder):
            fix = "leave out --use_lora for a complete checkpoint"
            return [MissingFilesError("--use_lora is given, but the folder holds no adapter", None, folder, fix)]
        missing = missing_files(folder)
        base = adapter_base(folder) if is_adapter(folder) else None
    except CheckpointError as error:
        return [error]
    except OSError as error:
        return [_unreadable(folder, error)]
    problems = [MissingFilesError("the checkpoint is not complete, it lacks", missing, folder, fetch)]
    return (problems if missing else []) + (_base_problems(base, folder) if base else [])


def _base_problems(base: Path, adapter: Path) -> list[CheckpointError]:
    """Returns the same for the base that an adapter names; no flag does."""
    named = adapter / ADAPTER_CONFIG
    if base.is_dir() and base.resolve() != adapter.resolve():
        return checkpoint_problems(base, flag=f"base_model_name_or_path in {named}")
    fix = f"put the base model there, or correct base_model_name_or_path in {named}"
    return [MissingFilesError("the adapter names a base model that is not a checkpoint folder here", base, named, fix)]


# ---------------------------------------------------------------------------- damaged?


def weight_problems(folder: Path) -> list[CheckpointError]:
    """Returns the damage of a complete checkpoint's weights and vocabulary, an adapter's base included.

    Headers and sizes are checked, no weight is read.

    Raises:
        CheckpointError: An adapter names no base, or an index is damaged.
    """
    vocabulary = [path for path in [folder / VOCAB_FILE] if path.is_file()]
    problems = [
        CheckpointError(f"the checkpoint cannot be loaded: {path.name} {damage}", _size(path), path, fix)
        for path in vocabulary + weight_files(folder)
        for damage, fix in file_damages(path)
    ]
    return problems + (weight_problems(adapter_base(folder)) if is_adapter(folder) else [])


def file_damages(path: Path) -> list[tuple[str, str]]:
    """Returns the certain damage of a file of weights or optimizer state, and what to do about it."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            fix = f"fetch the files themselves: git lfs pull, in {path.parent}"
            return [("is a pointer of git-lfs, not the file itself", fix)]
        if not start:
            return [("is empty", _FETCH)]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):  # compares the header with the file's size
                return []
        return [(damage, _FETCH)] if path.suffix in _ZIPPED and (damage := _bin_damage(path, start)) else []
    except SafetensorError as error:
        return [(f"is cut off or damaged: {error}", _FETCH)]
    except OSError as error:
        return [(f"cannot be read: {error.strerror or error}", "check its permissions")]


def _bin_damage(path: Path, start: bytes) -> str | None:
    if start.startswith(_ZIP):
        return None if zipfile.is_zipfile(path) else "is cut off: the end of the archive is missing"
    return None if start.startswith(_PICKLE) else "is not a file of weights"


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size:,} bytes"
    except OSError:
        return "unknown size"


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    kind = MissingFilesError if isinstance(error, FileNotFoundError) else CheckpointError
    return kind(f"cannot read: {error.strerror or error}", Path(error.filename or path), fix="check its permissions")


# ---------------------------------------------------------------------------- which one?


def checkpoint_fingerprint(folder: str | Path) -> str:
    """Returns a hash that stays when a checkpoint is copied or renamed, and changes with its settings or weights.

    Settings, vocabulary and small files are read completely. Of each larger weight file it uses the name, the size and
    128 evenly spread chunks of 32 KiB, so that 19 GB take about a second. An adapter's includes its base's.

    Args:
        folder: A complete checkpoint folder or LoRA adapter.

    Returns:
        16 hexadecimal digits.

    Raises:
        CheckpointError: A file cannot be read, or an adapter names no base.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    settings = [folder / name for name in _SETTINGS if (folder / name).is_file()] + sorted(folder.glob("*.tiktoken"))
    try:
        for path in settings:
            digest.update(f"{path.name}\0".encode() + hashlib.sha256(_settings_bytes(path)).digest())
        for path in weight_files(folder):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + _sampled(path))
    except OSError as error:
        raise _unreadable(folder, error) from error
    if is_adapter(folder):
        digest.update(checkpoint_fingerprint(adapter_base(folder)).encode())
    return digest.hexdigest()[:16]


def _settings_bytes(path: Path) -> bytes:
    if path.suffix != ".json":
        return path.read_bytes()
    # The path of a folder when it was saved says nothing about its content.
    left_out = ("_name_or_path", "base_model_name_or_path")
    kept = {key: value for key, value in read_json_file(path).items() if key not in left_out}
    return repr(sorted(kept.items())).encode("utf-8", "surrogatepass")


def _sampled(path: Path) -> bytes:
    """Returns the sha256 of evenly spread chunks, the first and last bytes included; of a small file, of all of it."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _CHUNKS * _CHUNK_BYTES:
            digest.update(file.read())
        else:
            for chunk in range(_CHUNKS):
                file.seek(chunk * (size - _CHUNK_BYTES) // (_CHUNKS - 1))
                digest.update(file.read(_CHUNK_BYTES))
    return digest.digest()


# ---------------------------------------------------------------------------- released code


def check_vision(config: dict[str, Any], where: object) -> None:
    """Checks that a `config.json` describes a vision tower; the text-only Qwen has the same `model_type`.

    Raises:
        CheckpointError: It does not.
    """
    if not isinstance(config.get("visual"), dict):
        what = "config.json has no vision tower (visual): this is not a Qwen-VL checkpoint"
        fix = "give a Qwen-VL checkpoint; a text-only Qwen has the same model_type, and is not supported"
        raise CheckpointError(what, f"model_type {config.get('model_type')}", where, fix)


def code_files(folder: str | Path) -> list[Path]:
    """Returns the `.py` files of a checkpoint folder: remote code, which is never run."""
    path = Path(folder)
    return sorted(path.glob("*.py")) if str(folder) and path.is_dir() else []


def copy_code_files(source: str | Path, target: str | Path) -> list[Path]:
    """Copies the released code files to a saved checkpoint, for those who still use them; runs nothing."""
    copied = []
    for file in code_files(source):
        destination = Path(target) / file.name
        if destination.resolve() != file.resolve():
            shutil.copyfile(file, destination)
            copied.append(destination)
    return copied


def names_code_of(auto_map: object, folder: str | Path) -> bool:
    """Returns whether a folder has all files that an `auto_map` names (`"module.Class"`, or lists with None)."""
    entries = auto_map.values() if isinstance(auto_map, dict) else ()
    references = [name for entry in entries for name in (entry if isinstance(entry, list | tuple) else [entry])]
    modules = [reference.partition(".")[0] for reference in references if isinstance(reference, str)]
    return bool(modules) and all((Path(folder) / f"{module}.py").is_file() for module in modules)
