"""Who does what: a run's missing texts dealt to its processes by expected cost."""

from __future__ import annotations

import heapq
import os.path
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from eval.running.result_files import ResultFile, Unit

# Costs are in tokens of a prompt; only their proportions matter, and only for how evenly the processes end.
_PICTURE = 258  # <img>, 256 features, </img>
_BYTES_PER_TOKEN = 4  # of UTF-8: English words are about that, a Chinese character is 3
_ANSWER = 100  # what writing a text costs, as so many tokens of a prompt


class Missing(NamedTuple):
    """A text to get: the number of its file, of its unit in there, and the attempt that is next."""

    file: int
    unit: int
    attempt: int


def deal(missing: Sequence[Missing], files: Mapping[int, ResultFile], processes: int) -> list[list[Missing]]:
    """Deals texts to processes so that all end at about the same time.

    The texts of one row (eight reviews) stay together, because they begin with the same long prompt, which is computed
    once. The costliest rows are dealt first, each to the process with the least to do, and stand first in its share.

    Args:
        missing: What is to be made.
        files: The files they are for, by number.
        processes: How many shares.

    Returns:
        A share for each process; empty ones if there are fewer rows than processes.
    """
    rows: dict[tuple[int, str], list[Missing]] = {}
    for text in missing:
        rows.setdefault((text.file, files[text.file].units[text.unit].row), []).append(text)
    costs = {key: expected_cost([files[text.file].units[text.unit] for text in row]) for key, row in rows.items()}
    shares: list[list[Missing]] = [[] for _ in range(processes)]
    load = [(0.0, process) for process in range(processes)]
    for key in sorted(rows, key=lambda key: -costs[key]):
        cost, process = heapq.heappop(load)
        shares[process] += rows[key]
        heapq.heappush(load, (cost + costs[key], process))
    return shares


def expected_cost(units: Sequence[Unit]) -> float:
    """What the texts of one row will cost together, in tokens of a prompt: what they begin with alike counts once."""
    prompts = [(unit.system + unit.text).encode("utf-8", "replace") for unit in units]
    shared = len(os.path.commonprefix(prompts))  # noqa: RUF071 - these are texts, not paths
    own = sum(len(prompt) - shared for prompt in prompts)
    return _PICTURE + (shared + own) / _BYTES_PER_TOKEN + _ANSWER * len(units)
