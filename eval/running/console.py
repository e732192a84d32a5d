"""The progress of a long run: a bar on a terminal, otherwise a plain line now and then."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

_SHARE = 0.05  # of the work, from which on the time left is shown


class Progress:
    """Counts finished units and shows rate and time left on stderr.

    Args:
        total: Number of units.
        unit: The name of one unit ("answer").
        every: Seconds between two plain lines.
        stream: Where to show it; stderr by default.
    """

    def __init__(self, total: int, unit: str, *, every: float = 30.0, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar = tqdm(total=total, unit=unit, disable=None, file=self._stream, dynamic_ncols=True)
        self._total, self._unit, self._every = total, unit, every
        self._done = self._failed = 0
        self._began = self._shown = time.monotonic()
        self._reported: set[str] = set()

    def advance(self, *, failed: bool = False, again: bool = False) -> None:
        """Count a unit that is done, has failed, or must be repeated."""
        self._done += 1
        self._failed += failed
        self._total += again
        if not self._bar.disable:
            self._bar.total = self._total
            if failed:
                self._bar.set_postfix(failed=self._failed, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._shown >= self._every or self._done == self._total:
            self._plain_line()

    def report_once(self, text: str) -> None:
        """Show a line beside the bar; the same text only once."""
        if text not in self._reported:
            self._reported.add(text)
            tqdm.write(text, file=self._stream)

    def _plain_line(self) -> None:
        self._shown = time.monotonic()
        seconds = self._shown - self._began
        rate = self._done / seconds if seconds > 0 else 0.0
        # Texts of one batch end together, so the first ones say nothing about the rest.
        known = rate and self._done >= self._total * _SHARE
        left = tqdm.format_interval((self._total - self._done) / rate) if known else "?"
        line = f"{self._done}/{self._total} {self._unit}s, {rate:.2f}/s, {left} left, {self._failed} failed"
        print(line, file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
