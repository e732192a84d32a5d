"""The journal of a long run: an append-only file of finished units, from which the next run resumes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError
from data_utils.files import write_error

Facts = Mapping[str, Any]  # JSON values
JOURNAL_FORMAT = 1


@dataclass
class JournalContent:
    """The content of a journal.

    Attributes:
        settings: What must be equal for two runs to share a file.
        info: Other facts about the run, which are never compared.
        entries: The value of each finished unit by its key; the last line of a key counts.
        end: Length of the complete lines in bytes.
    """

    settings: dict[str, Any]
    info: dict[str, Any]
    entries: dict[str, Any] = field(default_factory=dict)
    end: int = 0


def read_journal(path: Path) -> JournalContent | None:
    """Read a journal without locking it.

    Returns:
        The content without a half-written last line, which a killed run leaves behind; None if there is no file, or
        not even a complete first line.

    Raises:
        MMRoleError: It cannot be read, a line is damaged, or another version wrote it.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise MMRoleError(f"cannot read the journal: {error.strerror}", path, fix="check its permissions") from error
    *lines, half = data.split(b"\n")
    content: JournalContent | None = None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if content is None:
                _check_format(path, record["journal"])
                content = JournalContent(record["settings"], record["info"], end=len(data) - len(half))
            else:
                content.entries[record["key"]] = record["value"]
        except (ValueError, LookupError, TypeError) as error:
            fix = "delete that line if the rest is sound (its unit is done again), or give --overwrite to start again"
            raise MMRoleError("the journal is damaged", path, f"line {number}", fix) from error
    return content


def check_settings(path: Path, content: JournalContent, settings: Facts, info: Facts) -> None:
    """Refuse to resume a journal of other settings.

    Args:
        path: The journal, for the message.
        content: Its content.
        settings: The present run's settings.
        info: The present run's info; `info["names"]` may name the things behind settings (a fingerprint's folder).

    Raises:
        MMRoleError: A setting differs; both values of each are named.
    """
    now = json.loads(json.dumps(dict(settings)))
    keys = [key for key in {**content.settings, **now} if content.settings.get(key) != now.get(key)]
    if not keys:
        return
    lines = [
        f"{key}: {_named(content.settings, content.info, key)} there, {_named(now, info, key)} now" for key in keys
    ]
    raise MMRoleError(
        "results of different settings would be mixed in one file",
        lines,
        path,
        "run with the settings of the journal, or choose another output folder, or give --overwrite to start again",
    )


class Journal:
    """An append-only file of finished units, for one writing process; use `open`.

    One JSON line per unit, handed to the system before `add` returns: killing the process loses nothing. The first line
    holds the run's settings.
    """

    def __init__(self, path: Path, descriptor: int, content: JournalContent) -> None:
        self.path = path
        self._descriptor = descriptor
        self._content = content

    @classmethod
    def open(cls, path: Path, settings: Facts, info: Facts, *, overwrite: bool = False) -> Journal:
        """Open a journal for writing and lock it. Its content changes only when a unit is added.

        Args:
            path: The file; its folder must exist.
            settings: What must be equal for a run to resume from it; JSON values.
            info: Other facts about the run, kept when the journal is new.
            overwrite: The first unit that is added replaces the whole content.

        Raises:
            MMRoleError: Another process writes it, other settings began it, a line is damaged, or it cannot be written.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(path, error, "nothing was started") from error
        try:
            _lock(path, descriptor)
            content = None if overwrite else read_journal(path)
            if content is not None and content.entries:
                check_settings(path, content, settings, info)
            else:
                content = JournalContent(dict(settings), dict(info))
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, content)

    @property
    def entries(self) -> Facts:
        """The value of each finished unit by its key."""
        return self._content.entries

    def add(self, key: str, value: Any) -> None:
        """Append one unit; when this returns, a kill of this process cannot lose it.

        Raises:
            MMRoleError: It cannot be written; everything before it is kept.
        """
        content = self._content
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False).encode("utf-8") + b"\n"
        if not content.end:
            header = {"journal": JOURNAL_FORMAT, "settings": content.settings, "info": content.info}
            # Paths need not be UTF-8.
            line = json.dumps(header, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" + line
        try:
            os.ftruncate(self._descriptor, content.end)  # removes a half-written line, or everything with --overwrite
            _write_all(self._descriptor, line)
        except OSError as error:
            raise write_error(self.path, error, "everything finished so far is kept") from error
        content.end += len(line)
        content.entries[key] = value

    def sync(self) -> None:
        """Force everything to the disk.

        Raises:
            MMRoleError: The disk does not take it.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(self.path, error, "everything finished so far is kept") from error

    def close(self) -> None:
        """Force everything to the disk and close the file, which frees the lock."""
        try:
            self.sync()
        finally:
            os.close(self._descriptor)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fix = "wait until it has ended, or choose another output folder"
        raise MMRoleError("another process is writing this journal", path, fix=fix) from None


def _check_format(path: Path, version: object) -> None:
    if version != JOURNAL_FORMAT:
        raise MMRoleError(
            "the journal was written by another version", version, path, "give --overwrite to start again"
        )


def _named(settings: Facts, info: Facts, key: str) -> str:
    value = json.dumps(settings[key], ensure_ascii=False) if key in settings else "nothing"
    names = info.get("names", {})
    return f"{value} ({names[key]})" if key in names else value
