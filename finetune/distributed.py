"""The processes of a run: joining them, and reporting a problem once."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from data_utils.errors import MMRoleError, ProblemsError, first_of, shown

if TYPE_CHECKING:
    import transformers

_SECONDS_TO_END = 30  # in which the launcher ends the other processes after the first
_LOST = ("Connection closed by peer", "Connection reset by peer")
_REPORTED_ALONE = 3  # up to so many equal problems are reported one by one, more as one


@contextmanager
def report_once() -> Iterator[None]:
    """Lets only the first process report a problem that all processes find."""
    try:
        yield
    except MMRoleError:
        if os.environ.get("RANK", "0") == "0":
            raise
        _wait_for_the_end(2)


@contextmanager
def end_with_the_first() -> Iterator[None]:
    """Silences a process that loses its connection because the first process ended with an error."""
    try:
        yield
    except RuntimeError as error:
        if os.environ.get("RANK", "0") == "0" or not any(sign in str(error) for sign in _LOST):
            raise
        _wait_for_the_end(2)


def _wait_for_the_end(status: int) -> None:
    time.sleep(_SECONDS_TO_END)
    raise SystemExit(status) from None


def gathered(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Returns the first process's value on all processes."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def raise_together(problems: Sequence[MMRoleError]) -> None:
    """Ends all processes if any has found a problem; the first one reports all that were found, each once.

    Raises:
        ProblemsError: On the first process.
    """
    merged = list({str(problem): problem for share in gathered(list(problems)) for problem in share}.values())
    if not merged:
        return
    if os.environ.get("RANK", "0") == "0":
        raise ProblemsError(grouped(merged))
    _wait_for_the_end(2)


def grouped(problems: Sequence[MMRoleError]) -> list[MMRoleError]:
    """Joins problems that differ only in their value and place into one, which lists some of them.

    Args:
        problems: In the order in which they were found.
    """
    groups: dict[tuple[str, str | None], list[MMRoleError]] = {}
    for problem in problems:
        groups.setdefault((problem.what, problem.fix), []).append(problem)
    joined = []
    for (what, fix), group in groups.items():
        if len(group) <= _REPORTED_ALONE:
            joined += group
            continue
        values = [f"{shown(problem.value)} ({shown(problem.where)})" for problem in group]
        joined.append(MMRoleError(f"{what} ({len(group):,} times)", first_of(values), None, fix))
    return joined


def leave_group() -> None:
    """Ends this process's part in the group, whose threads can abort a process that exits within it."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def choose_devices(arguments: transformers.TrainingArguments) -> None:
    """Chooses CPU and gloo where there is no GPU, and a group of one where DeepSpeed runs without a launcher."""
    import torch

    if not torch.cuda.is_available():
        arguments.use_cpu = True
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it finds that out itself
    if arguments.deepspeed and "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    if arguments.use_cpu and "RANK" in os.environ:
        arguments.ddp_backend = "gloo"
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # or accelerate warns


def join_deepspeed() -> None:
    """Registers the group of CPU processes with DeepSpeed, because transformers joins it without DeepSpeed."""
    import deepspeed

    # DeepSpeed would compile its communication; gloo's needs no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
