"""The journal of what was grown: what has passed, which of it stands in files, what is to be grown once more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from data_utils.journal import Journal, JournalContent, check_settings, read_journal

Record = Mapping[str, Any]

# What is not about a single unit stands under keys without a slash, which a unit's key always has.
_SETTINGS, _WRITTEN, _AGAIN = "settings", "written", "again"


class GrowthJournal:
    """A journal of grown profiles or dialogues; use `open`.

    What was grown and written once is the user's: it is not written again, however it was edited. What is grown once
    more takes the place of the old as soon as it has passed.
    """

    def __init__(self, journal: Journal, settings: Mapping[str, Any], by: Mapping[str, Any]) -> None:
        self._journal, self._settings, self._by = journal, settings, by
        self.kept: set[str] = set()  # by this run

    @classmethod
    def open(cls, path: Path, by: Mapping[str, Any], *, alike: bool, overwrite: bool) -> GrowthJournal:
        """Opens the journal for writing and locks it.

        Args:
            path: The file; its folder must exist.
            by: What is grown with: JSON values.
            alike: Whether all must be grown with the same.
            overwrite: Allows what is grown now to be grown with something else.

        Raises:
            MMRoleError: What is there was grown with something else, another process writes it, or it is damaged.
        """
        there = read_journal(path)
        header = there.settings if there is not None and there.entries else by if alike else {}
        journal = Journal.open(path, header, by)
        settings = journal.entries.get(_SETTINGS, {}).get("by", header) if alike else by
        opened = cls(journal, settings, by)
        try:
            if not overwrite and opened.records():
                check_settings(path, JournalContent(dict(settings), {}), by, {})
        except BaseException:
            journal.close()
            raise
        return opened

    def record(self, key: str) -> Record | None:
        """What was grown under a key."""
        return self._journal.entries.get(key, {}).get("grown")

    def records(self) -> dict[str, Record]:
        """All that was grown."""
        return again(self._journal.entries, self._by, overwrite=True)

    def keep(self, key: str, record: Record) -> None:
        """Adds what has passed, in the place of what was grown under that key before."""
        if self._settings != self._by:
            self._journal.add(_SETTINGS, {"by": dict(self._by)})
            self._settings = self._by
        before = self.record(key)
        self._journal.add(key, {"grown": record, **({} if before is None else {"replaces": _name(before)})})
        self.kept.add(key)

    def fail(self, key: str, reason: str) -> None:
        """Adds why nothing passed; what was grown before stays."""
        self._journal.add(key, {**self._journal.entries.get(key, {}), "failed": reason})

    def wants(self, keys: Iterable[str], *, overwrite: bool) -> set[str]:
        """Which of the keys are to be grown: new ones, and those that are to be grown once more."""
        again = self.again(overwrite=overwrite)
        return {key for key in keys if key in again or self.record(key) is None}

    def again(self, *, overwrite: bool) -> dict[str, Record]:
        """What is to be grown once more: all with `overwrite`, else what such a run with the same settings left."""
        return again(self._journal.entries, self._by, overwrite=overwrite)

    def grow_again(self, keys: Collection[str]) -> None:
        """Remembers that these are to be grown once more, if they were grown before."""
        old = {**self.again(overwrite=False), **{key: self.record(key) for key in keys}}
        digests = {key: _digest(record) for key, record in old.items() if record is not None}
        if digests:
            self._journal.add(_AGAIN, {"by": dict(self._by), "keys": digests})

    def unwritten(self) -> dict[str, Any]:
        """The entries that were grown and never written to files."""
        written = self._journal.entries.get(_WRITTEN, {}).get("keys", {})
        grown = {key: entry for key, entry in self._journal.entries.items() if "grown" in entry}
        return {k: e for k, e in grown.items() if k in self.kept or written.get(k) != _digest(e["grown"])}

    def wrote(self, entries: Mapping[str, Any]) -> None:
        """Remembers that these entries were written to files."""
        if entries:
            written = self._journal.entries.get(_WRITTEN, {}).get("keys", {})
            new = {key: _digest(entry["grown"]) for key, entry in entries.items()}
            self._journal.add(_WRITTEN, {"keys": {**written, **new}})
        left = {key: record for key, record in self.again(overwrite=False).items() if key not in self.kept}
        if self.kept & self._journal.entries.get(_AGAIN, {}).get("keys", {}).keys():
            keys = {key: _digest(record) for key, record in left.items()}
            self._journal.add(_AGAIN, {"by": dict(self._by), "keys": keys})

    def __enter__(self) -> GrowthJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()


def again(entries: Mapping[str, Any], by: Mapping[str, Any], *, overwrite: bool) -> dict[str, Record]:
    """What a journal's entries say is to be grown once more; see `GrowthJournal.again`."""
    grown = {key: entry["grown"] for key, entry in entries.items() if "grown" in entry}
    if overwrite:
        return grown
    asked = entries.get(_AGAIN, {})
    keys = asked["keys"] if asked.get("by") == by else {}
    return {key: record for key, record in grown.items() if keys.get(key) == _digest(record)}


def _name(record: Record) -> str:
    return record["dialogue"]["id"] if "dialogue" in record else record["name"]


def _digest(record: Record) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
