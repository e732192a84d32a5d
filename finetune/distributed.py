"""The processes of a run: joining them, and telling a problem once."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import transformers

from data_utils.errors import MMRoleError, ProblemsError, shown

_PATIENCE = 30  # seconds
_LOST = ("Connection closed by peer", "Connection reset by peer")
_ALONE = 3  # equal problems up to this many are told one by one, more of them as one
_LISTED = 10


@contextmanager
def told_once() -> Iterator[None]:
    """For problems that all processes find alike: only the first one of them tells.

    The others wait until the launcher ends them, which it does once the first has ended.
    """
    try:
        yield
    except MMRoleError:
        if os.environ.get("RANK", "0") == "0":
            raise
        time.sleep(_PATIENCE)
        raise SystemExit(2) from None


@contextmanager
def quiet_followers() -> Iterator[None]:
    """For what the processes do in step: where the first one ends with an error that it tells, the others say nothing.

    They lose the connection then, and wait until the launcher ends them.
    """
    try:
        yield
    except RuntimeError as error:
        if os.environ.get("RANK", "0") == "0" or not any(sign in str(error) for sign in _LOST):
            raise
        time.sleep(_PATIENCE)
        raise SystemExit(2) from None


def together(problems: Sequence[MMRoleError]) -> None:
    """Ends all processes if any has found a problem; the first one tells all that were found, each once.

    Raises:
        ProblemsError: On the first process.
    """
    if not dist.is_initialized():
        merged = list(problems)
    else:
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, list(problems))
        merged = list({str(problem): problem for share in shares for problem in share}.values())
    if not merged:
        return
    if not dist.is_initialized() or dist.get_rank() == 0:
        raise ProblemsError(grouped(merged))
    dist.barrier()  # the launcher ends this process when the first one has told what is wrong
    raise SystemExit(2)


def grouped(problems: Sequence[MMRoleError]) -> list[MMRoleError]:
    """The problems with those that differ in their value and place alone as one, of which some are listed.

    Args:
        problems: In the order in which they were found.
    """
    groups: dict[tuple[str, str | None], list[MMRoleError]] = {}
    for problem in problems:
        groups.setdefault((problem.what, problem.fix), []).append(problem)
    told = []
    for (what, fix), group in groups.items():
        if len(group) <= _ALONE:
            told += group
            continue
        listed = [f"{shown(problem.value)} ({shown(problem.where)})" for problem in group[:_LISTED]]
        more = [f"… and {len(group) - _LISTED:,} more"] if len(group) > _LISTED else []
        told.append(MMRoleError(f"{what} ({len(group):,} times)", [*listed, *more], None, fix))
    return told


def settle_devices(arguments: transformers.TrainingArguments) -> None:
    """CPU and gloo where there is no GPU; and a group of one where DeepSpeed runs without a launcher."""
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
    """Lets DeepSpeed know of the group of CPU processes, which transformers joins without it."""
    import deepspeed

    # DeepSpeed would compile an exchange of its own; gloo's is there without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
