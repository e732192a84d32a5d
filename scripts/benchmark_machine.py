"""Measures a machine's matrix rate and bandwidth, and names it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Return one line with the machine and the versions."""
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        models = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
        what = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{what}; {str(dtype).removeprefix('torch.')}; {versions}"


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large matrix product on random data."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median_seconds(lambda: a @ b, device)


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second of reading a large array."""
    count = 2**31 if device.type == "cuda" else 2**28
    values = torch.ones(count // 4, device=device)
    return count / _median_seconds(lambda: values.sum(), device)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's work; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, object]:
    """Return the seconds of some work, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def reset_peak(device: torch.device) -> None:
    """Starts the count that `finetune.report.peak_bytes` reads anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5") if os.access("/proc/self/clear_refs", os.W_OK) else None


def _cpu_lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.is_file() else []


def _median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    work()
    return sorted(timed(work, device)[0] for _ in range(repeats))[repeats // 2]
