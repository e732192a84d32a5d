"""How far a long run is: a bar on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from tqdm import tqdm

_TELLING = 0.05  # share of the work after which the time left is told


def unshare_progress_bars() -> None:
    """Gives the bars of a process that was forked a lock of its own.

    tqdm shares one among the process where it was first used and all its children, and another with the threads that
    a child does not have: whoever is killed while drawing a bar would stop every other one for ever.
    """
    lock = threading.RLock()
    kinds: list[type[tqdm]] = [tqdm]
    for kind in kinds:
        kind.set_lock(lock)
        kinds += kind.__subclasses__()


class Progress:
    """Counts finished units and shows rate and time left on stderr.

    Args:
        total: Units to come.
        unit: What one of them is called ("answer").
        every: Seconds between two plain lines.
        stream: Where to show it; stderr by default.
        shown: False shows nothing.
    """

    def __init__(
        self, total: int, unit: str, *, every: float = 30.0, stream: TextIO | None = None, shown: bool = True
    ) -> None:
        self._stream = stream or sys.stderr
        self._hidden = not shown
        self._bar = tqdm(total=total, unit=unit, disable=self._hidden or None, file=self._stream, dynamic_ncols=True)
        self._total, self._unit, self._every = total, unit, every
        self._done = self._failed = 0
        self._began = self._shown = time.monotonic()

    def advance(self, *, failed: bool = False, again: bool = False) -> None:
        """One more unit is done, has failed, or has to be done once more."""
        self._done += 1
        self._failed += failed
        self._total += again
        if self._hidden:
            return
        if not self._bar.disable:
            self._bar.total = self._total
            if failed:
                self._bar.set_postfix(failed=self._failed, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._shown >= self._every or self._done == self._total:
            self._plain_line()

    def _plain_line(self) -> None:
        self._shown = time.monotonic()
        seconds = self._shown - self._began
        rate = self._done / seconds if seconds > 0 else 0.0
        # Texts are written many at once and end together: the first of them say nothing about the rest.
        told = rate and self._done >= self._total * _TELLING
        left = tqdm.format_interval((self._total - self._done) / rate) if told else "?"
        line = f"{self._done}/{self._total} {self._unit}s, {rate:.2f}/s, {left} left, {self._failed} failed"
        print(line, file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
