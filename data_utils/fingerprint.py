"""What tells one checkpoint from another: a short hash of its settings and of samples of its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data_utils.errors import MMRoleError
from data_utils.files import read_json
from data_utils.paths import is_file, is_folder, listed

SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = {
    False: (("model", ".safetensors"), ("pytorch_model", ".bin")),
    True: (("adapter_model", ".safetensors"), ("adapter_model", ".bin")),
}
_CHUNKS = 128
_CHUNK_BYTES = 32 * 1024


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a LoRA adapter, which needs a base checkpoint.

    Raises:
        MMRoleError: If the folder may not be looked into.
    """
    return is_file(folder / ADAPTER_CONFIG)


def adapter_base(folder: Path) -> Path:
    """The base checkpoint that an adapter names.

    A relative path counts from the working directory, or else from the adapter's folder, as in `qwen_vl.load`.

    Raises:
        MMRoleError: If the adapter does not say.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise MMRoleError(
            "the adapter does not name its base", base, folder / ADAPTER_CONFIG, "set base_model_name_or_path there"
        )
    return Path(base) if Path(base).is_absolute() or Path(base).is_dir() else folder / base


def checkpoint_problems(folder: str | Path, *, use_lora: bool = False, flag: str = "--model_path") -> list[MMRoleError]:
    """Everything that is missing from a checkpoint folder, without loading it.

    Args:
        folder: A checkpoint in the released layout, or a LoRA adapter.
        use_lora: The user says it is an adapter.
        flag: What the folder was given with.

    Returns:
        The problems; for an adapter those of its base too.
    """
    folder = Path(folder)
    fetch = f"download or copy the checkpoint completely, or give its folder with {flag}"
    try:
        if not is_folder(folder):
            return [MMRoleError("there is no such checkpoint folder", folder, flag, fetch)]
        listed(folder)  # `glob` takes a folder that may not be read for an empty one
        if use_lora and not is_adapter(folder):
            fix = "leave --use_lora away for a whole checkpoint"
            return [MMRoleError("--use_lora is given, but the folder holds no adapter", ADAPTER_CONFIG, folder, fix)]
        missing = missing_files(folder)
        base = adapter_base(folder) if is_adapter(folder) else None
    except MMRoleError as error:
        return [error]
    problems = [MMRoleError("the checkpoint is not complete", missing, folder, fetch)] if missing else []
    return problems + (_base_problems(base, folder) if base else [])


def _base_problems(base: Path, adapter: Path) -> list[MMRoleError]:
    """The same for the base that an adapter names, which no flag can give."""
    said = adapter / ADAPTER_CONFIG
    try:
        if is_folder(base) and base.resolve() != adapter.resolve():
            return checkpoint_problems(base, flag=f"base_model_name_or_path in {said}")
    except MMRoleError as error:
        return [error]
    fix = f"put the base model there, or correct base_model_name_or_path in {said}"
    return [MMRoleError("the adapter names a base model that is no checkpoint folder here", base, said, fix)]


def checkpoint_fingerprint(folder: str | Path) -> str:
    """A hash that stays the same when a checkpoint is copied or renamed, and changes with its settings or weights.

    Settings and tokenizer are read whole. Of each weight file count the name, the size and 128 evenly spread chunks of
    32 KiB, so that 19 GB take about a second; small files are read whole. An adapter's includes its base's.

    Args:
        folder: A complete checkpoint folder or LoRA adapter.

    Returns:
        16 hexadecimal digits.

    Raises:
        MMRoleError: If a file cannot be read, or an adapter names no base.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    settings = [folder / name for name in SETTINGS if (folder / name).is_file()] + sorted(folder.glob("*.tiktoken"))
    try:
        for path in settings:
            digest.update(f"{path.name}\0".encode() + hashlib.sha256(_settings_bytes(path)).digest())
        for path in _weight_files(folder):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + _sampled(path))
    except OSError as error:
        raise MMRoleError(
            f"cannot read the checkpoint: {error.strerror}", error.filename, folder, "check its permissions"
        ) from error
    if is_adapter(folder):
        digest.update(checkpoint_fingerprint(adapter_base(folder)).encode())
    return digest.hexdigest()[:16]


def _settings_bytes(path: Path) -> bytes:
    if path.suffix != ".json":
        return path.read_bytes()
    content = read_json(path)
    if not isinstance(content, dict):
        return path.read_bytes()
    # Where a folder lay when it was saved says nothing about what is in it.
    kept = {key: value for key, value in content.items() if key not in ("_name_or_path", "base_model_name_or_path")}
    return repr(sorted(kept.items())).encode("utf-8", "surrogatepass")


def _weight_files(folder: Path) -> list[Path]:
    """The weights that a loader would take: safetensors before bin, and every shard of them."""
    for stem, suffix in _WEIGHTS[is_adapter(folder)]:
        whole, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return [folder / name for name in _shard_names(index)]
    return []


def _shard_names(index: Path) -> list[str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise MMRoleError("the index of the weights names no files of its folder", names, index, "fetch it anew")
    return names


def missing_files(folder: Path) -> list[str]:
    """Names of the files that a checkpoint or an adapter needs and that are not there.

    Raises:
        MMRoleError: The index of its weights is broken.
    """
    adapter = is_adapter(folder)
    missing = [] if adapter or (folder / "config.json").is_file() else ["config.json"]
    if not adapter and not any(folder.glob("*.tiktoken")):
        missing.append("qwen.tiktoken")
    weights = _weight_files(folder)
    stem = _WEIGHTS[adapter][0][0]
    if not weights:
        missing.append(f"the weights ({stem}*.safetensors or {_WEIGHTS[adapter][1][0]}*.bin)")
    return missing + [path.name for path in weights if not path.is_file()]


def _sampled(path: Path) -> bytes:
    """The sha256 of evenly spread chunks of a file, its first and last bytes among them; of a small file's whole."""
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
