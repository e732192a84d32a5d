"""What can be seen of a device without using it."""

from __future__ import annotations

from data_utils.errors import MMRoleError


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
    if asked.type != "cuda":
        return []
    # Not is_available(): after that a forked child cannot use the GPU, and the work is done in one.
    count = torch.cuda.device_count()
    if not count:
        return [_no_device("PyTorch finds no GPU here", device)]
    if (asked.index or 0) >= count:
        return [_no_device(f"there is no such GPU: the last one here is cuda:{count - 1}", device)]
    return []


def _no_device(what: str, device: str) -> MMRoleError:
    return MMRoleError(what, device, "--device", "give --device cpu, or cuda:N of a GPU that nvidia-smi lists")
