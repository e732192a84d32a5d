"""What can be seen of a device and of a checkpoint's generation settings without using or loading anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError
from data_utils.files import read_json
from qwen_vl.checkpoint import GENERATION_CONFIG, adapter_base, is_adapter
from qwen_vl.sampling_params import SamplingSettings, check_limit, unknown_settings


def device_problems(device: str) -> list[MMRoleError]:
    """Why nothing can run on a device; empty if it can, as far as is seen without using it.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", ...
    """
    if device in ("auto", "cpu"):
        return []
    import torch  # takes seconds, and is not needed where all is finished

    try:
        asked = torch.device(device)
    except (RuntimeError, ValueError):
        return [_no_device("there is no such device", device)]
    if asked.type == "cpu":
        return []
    if asked.type != "cuda":  # "meta" and the like
        return [_no_device("texts are written on a CPU or an NVIDIA GPU only", device)]
    # Not is_available(): after that a forked child cannot use the GPU, and the work is done in one.
    count = torch.cuda.device_count()
    if not count:
        return [_no_device("PyTorch finds no GPU here", device)]
    if (asked.index or 0) >= count:
        return [_no_device(f"there is no such GPU: the last one here is cuda:{count - 1}", device)]
    return []


def _no_device(what: str, device: str) -> MMRoleError:
    return MMRoleError(what, device, "--device", "give --device cpu, or cuda:N of a GPU that nvidia-smi lists")


def generation_problems(folder: Path, *, greedy: bool, limit: int | None, batched: bool) -> list[MMRoleError]:
    """What of a checkpoint's generation settings nothing could be answered with.

    Args:
        folder: A complete checkpoint, or an adapter's folder, whose base then counts.
        greedy: Nothing is sampled, whatever the checkpoint says.
        limit: Tokens of an answer, if not the checkpoint's.
        batched: The engine answers, which does not know every setting.

    Raises:
        MMRoleError: The file is not JSON.
    """
    path = (adapter_base(folder) if is_adapter(folder) else folder) / GENERATION_CONFIG
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        return [MMRoleError("the file is not a JSON object", settings, path, "fetch it again")]
    problems = []
    given = {name: settings[name] for name in ("temperature", "top_k", "top_p") if settings.get(name) is not None}
    try:
        SamplingSettings(do_sample=bool(settings.get("do_sample")) and not greedy, **given)
        if limit is None and settings.get("max_new_tokens") is not None:
            check_limit(settings["max_new_tokens"])
    except (ValueError, TypeError) as error:
        problems.append(MMRoleError("a generation setting cannot be used", str(error), path, "correct it there"))
    if batched and (unknown := unknown_settings(settings)):
        told = [f"{name}: {value}" for name, value in unknown.items()]
        fix = "take them out there, or ask one by one, which is slow: --batch_size 1"
        problems.append(MMRoleError("the batching engine does not know these generation settings", told, path, fix))
    return problems
