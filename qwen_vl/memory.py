"""How much a machine can hold, and how to tell that it was too much."""

import psutil
import torch

ALONE = "out of memory, even alone"
_MESSAGES = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a GPU's or the machine's."""
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in _MESSAGES)


def free_bytes(device: torch.device) -> float:
    """Bytes that may be used: nine tenths of what a GPU has free, half of what the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 0.9
    return psutil.virtual_memory().available * 0.5
