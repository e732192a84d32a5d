"""Keeps long runs going when their output can no longer be written."""

from __future__ import annotations

import io
import sys


class _LossyFile(io.FileIO):
    """A file that drops what cannot be written: the reader is gone (`| head`), or the disk of a log is full."""

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def ignore_lost_output() -> None:
    """Make every print of this process safe, our own or a library's progress bar.

    For programs whose results are files; a program whose result is its stdout must fail instead.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and _descriptor(stream) in (1, 2):
            stream.flush()
            raw = _LossyFile(stream.fileno(), "w", closefd=False)
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
