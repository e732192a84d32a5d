"""The journal of a long run: an append-only file of finished units, from which the next run resumes."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError
from data_utils.files import sync_folder, write_error

Facts = Mapping[str, Any]  # JSON values
JOURNAL_FORMAT = 1
_SYNC_SECONDS = 1.0


@dataclass
class JournalContent:
    """The content of a journal.

    Attributes:
        settings: What must be equal for two runs to share a file.
        info: Other facts about the run, which are never compared.
        entries: The value of each finished unit by its key; the last line of a key counts.
        end: Bytes up to the end of the last whole line.
    """

    settings: dict[str, Any]
    info: dict[str, Any]
    entries: dict[str, Any] = field(default_factory=dict)
    end: int = 0


def read_journal(path: Path, is_value: Callable[[str, Any], bool] | None = None) -> JournalContent | None:
    """Read a journal without locking it; None if there is none, or not even a complete first line.

    A half-written last line, which a killed run leaves behind, does not count.

    Args:
        path: The file.
        is_value: Returns whether a unit's key and value are valid; without it all are.

    Raises:
        MMRoleError: If it cannot be read or any other line is broken.
    """
    content: JournalContent | None = None
    broken: int | None = None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if broken is not None:
                    raise _broken_line(path, broken)
                record = _parse_line(line)
                if record is None:
                    broken = number
                elif content is None:
                    content = _from_header(path, record, len(line))
                elif not _is_entry(record) or (is_value and not is_value(record["key"], record["value"])):
                    raise _broken_line(path, number)
                else:
                    content.entries[record["key"]] = record["value"]
                    content.end += len(line)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise MMRoleError(f"cannot read the journal: {error.strerror}", path, fix="check its permissions") from error
    return content


def check_settings(path: Path, content: JournalContent, settings: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Refuse to resume a journal of other settings.

    Args:
        path: The journal, for the message.
        content: What it holds.
        settings: The present run's settings.
        info: The present run's info; `info["names"]` may name the things behind settings (a fingerprint's folder).

    Raises:
        MMRoleError: If a setting differs; both values of each are named.
    """
    now = json.loads(json.dumps(dict(settings)))
    keys = [key for key in {**content.settings, **now} if content.settings.get(key) != now.get(key)]
    if not keys:
        return
    there_names, now_names = content.info.get("names"), info.get("names")
    lines = [
        f"{key}: {_named(content.settings, there_names, key)} there, {_named(now, now_names, key)} now" for key in keys
    ]
    raise MMRoleError(
        "results of different settings would be mixed in one file",
        lines,
        path,
        "run with the settings of the journal, or choose another output folder, or give --overwrite to start again",
    )


class Journal:
    """An append-only file of finished units, for one writing process.

    One JSON line per unit, handed to the system before `add` returns: killing the process loses nothing. It is forced
    to the disk once a second, so that a power cut loses a second's work. The first line holds the run's settings. Use
    `open`.
    """

    def __init__(self, path: Path, descriptor: int, content: JournalContent) -> None:
        self.path = path
        self._descriptor = descriptor
        self._content = content
        self._broken = False
        self._synced = 0.0  # by time.monotonic()

    @classmethod
    def open(
        cls, path: Path, settings: Facts, info: Facts, *, overwrite: bool = False, at_once: bool = True
    ) -> Journal:
        """Open a journal for writing and lock it; one that is missing or holds no unit is started.

        A half-written last line is cut off.

        Args:
            path: The file; its folder must exist.
            settings: What must be equal for a run to go on with it; JSON values.
            info: Other facts about the run, kept when the journal is new.
            overwrite: Discard the units in the file.
            at_once: False discards them only when the first unit is added.

        Raises:
            MMRoleError: If another process writes it, other settings began it, a line is broken, or it cannot be
                written.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(path, error, "nothing was started") from error
        try:
            _lock(path, descriptor)
            content = None if overwrite else read_journal(path)
            if content is None or not content.entries:
                return cls._begin(path, descriptor, settings, info, at_once=at_once)
            check_settings(path, content, settings, info)
            os.ftruncate(descriptor, content.end)
            return cls(path, descriptor, content)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                raise write_error(path, error, "nothing was started") from error
            raise

    @classmethod
    def _begin(cls, path: Path, descriptor: int, settings: Facts, info: Facts, *, at_once: bool) -> Journal:
        journal = cls(path, descriptor, JournalContent(dict(settings), dict(info)))
        if at_once:
            journal._append_header()
        sync_folder(path.parent)
        return journal

    @property
    def entries(self) -> Mapping[str, Any]:
        """The value of each finished unit by its key."""
        return self._content.entries

    def add(self, key: str, value: Any) -> None:
        """Append one unit; when this returns, a kill of this process cannot lose it.

        Raises:
            MMRoleError: If it cannot be written; the journal then ends with the unit before and can be resumed.
        """
        if not self._content.end:
            self._append_header()
        self._append({"key": key, "value": value})
        self._content.entries[key] = value

    def _append_header(self) -> None:
        header = {"settings": self._content.settings, "info": self._content.info}
        self._append({"journal": JOURNAL_FORMAT, **header}, errors="backslashreplace")  # paths need not be UTF-8

    def _append(self, record: dict[str, Any], errors: str = "strict") -> None:
        assert not self._broken, "a journal that could not be written must be opened again"
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", errors) + b"\n"
        try:
            if not self._content.end:  # the old content is discarded only now
                os.ftruncate(self._descriptor, 0)
            _write_all(self._descriptor, line)
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                os.fsync(self._descriptor)
                self._synced = time.monotonic()
        except OSError as error:
            self._cut()
            self._broken = True
            raise write_error(self.path, error, "everything finished so far is kept") from error
        self._content.end += len(line)

    def _cut(self) -> None:
        try:
            os.ftruncate(self._descriptor, self._content.end)
        except OSError:
            return  # a half-written line may stay; the next run cuts it off

    def sync(self) -> None:
        """Force everything to the disk.

        Raises:
            MMRoleError: If the disk does not take it.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(self.path, error, "everything finished so far is kept") from error

    def close(self) -> None:
        """Force everything to the disk and close the file, which frees the lock."""
        if self._descriptor >= 0:
            try:
                self.sync()
            finally:
                os.close(self._descriptor)
                self._descriptor = -1

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


def _parse_line(line: bytes) -> Any:
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _is_entry(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("key"), str) and "value" in record


def _broken_line(path: Path, number: int) -> MMRoleError:
    fix = "delete that line if the rest is sound (its unit is done again), or give --overwrite to start again"
    return MMRoleError("the journal is damaged", path, f"line {number}", fix)


def _from_header(path: Path, record: Any, length: int) -> JournalContent:
    parts = [record.get(name) for name in ("settings", "info")] if isinstance(record, dict) else []
    if not parts or "journal" not in record or not all(isinstance(part, dict) for part in parts):
        raise _broken_line(path, 1)
    if record["journal"] != JOURNAL_FORMAT:
        raise MMRoleError(
            "the journal was written by another version", record["journal"], path, "give --overwrite to start again"
        )
    return JournalContent(record["settings"], record["info"], end=length)


def _named(settings: Mapping[str, Any], names: object, key: str) -> str:
    value = json.dumps(settings[key], ensure_ascii=False) if key in settings else "nothing"
    return f"{value} ({names[key]})" if isinstance(names, Mapping) and key in names else value
