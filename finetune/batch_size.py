"""How the paper's global batch comes about on any number of processes: micro-batch and accumulation."""

from __future__ import annotations

from data_utils.errors import MMRoleError

_MOST_LISTED = 16


def accumulation_steps(global_batch: int, micro_batch: int, processes: int) -> int:
    """Micro-batches that each process accumulates before an optimizer step.

    Args:
        global_batch: Samples of one optimizer step, over all processes.
        micro_batch: Samples of one forward pass of one process.
        processes: Processes, one a GPU.

    Raises:
        MMRoleError: The three do not divide; says which values would.
    """
    at_once = micro_batch * processes
    if min(global_batch, micro_batch, processes) > 0 and global_batch % at_once == 0:
        return global_batch // at_once
    raise MMRoleError(
        "the global batch does not divide into whole micro-batches",
        f"global batch {global_batch}, micro-batch {micro_batch}, {processes} process(es)",
        "--global_batch_size (GLOBAL_BATCH), --per_device_train_batch_size (MICRO_BATCH), number of GPUs (PROCESSES)",
        "\n".join(_ways_out(global_batch, micro_batch, processes)),
    )


def _ways_out(global_batch: int, micro_batch: int, processes: int) -> list[str]:
    """What could be changed so that it divides, one change a line."""
    if min(global_batch, micro_batch, processes) <= 0:
        return ["give whole numbers above 0"]
    ways = []
    if global_batch % processes == 0:
        ways.append(f"micro-batch {_listed(_divisors(global_batch // processes))} with these {processes} process(es)")
    if global_batch % micro_batch == 0:
        ways.append(f"{_listed(_divisors(global_batch // micro_batch))} process(es) with this micro-batch")
    at_once = micro_batch * processes
    below = global_batch // at_once * at_once
    near = [str(size) for size in (below, below + at_once) if size > 0]
    ways.append(f"global batch {' or '.join(near)} with both as they are (no longer the paper's)")
    return ["any one of these divides:", *(f"  {way}" for way in ways)]


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_MOST_LISTED]))
    return shown + (", …" if len(numbers) > _MOST_LISTED else "")
