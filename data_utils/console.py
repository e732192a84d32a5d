"""Output that nobody may be reading any more: long work goes on without it."""

from __future__ import annotations

import io
import sys


class _Heedless(io.FileIO):
    """A file that drops what cannot be written: the reader has gone (`| head`), or the disk of a log is full."""

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def go_on_unread() -> None:
    """Lets no print of this process fail, whoever makes it, ours or a library's progress bar.

    For work whose results are files; where stdout is the result, its loss must be told.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and _descriptor(stream) in (1, 2):
            stream.flush()
            raw = _Heedless(stream.fileno(), "w", closefd=False)
            at_once = stream.line_buffering or stream.write_through
            text = io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, errors="backslashreplace", line_buffering=at_once
            )
            setattr(sys, name, text)


def _descriptor(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):  # a buffer in memory, or closed
        return None
