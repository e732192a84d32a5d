"""The journals of a result file: where they lie, which of them count, and what they know together.

Beside `<name>.json` lies `<name>.journal`; processes that work on it together have one more each. A run with
--overwrite throws nothing away before its first text has come: each journal says how often the file was begun anew
before it, and those that were begun last, and hold a text, count alone. So a run that ends before its first text, as
one does whose model cannot be loaded, changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_utils.journal import JournalContent, check_settings, read_journal
from data_utils.paths import listed

FILE_KEY = ""  # a journal's lines about the result file itself; no unit has an empty key
TIMES = "times_begun_anew"  # in the info of a journal


def journal_path(target: Path) -> Path:
    """Where a result file's journal lies; no `.json`, which the released scripts would take for one more result."""
    return target.with_suffix(".journal")


def part_journals(target: Path) -> list[Path]:
    """Further journals of a result file, of processes that worked on it together: `<name>.journal.part-<process>`.

    No result file has a journal of such a name, whatever it is called itself.
    """
    start = f"{journal_path(target).name}.part-"
    return [path for path in listed(target.parent) if path.name.startswith(start) and path.name[len(start) :].isdigit()]


def part_journal(target: Path, process: int) -> Path:
    """The further journal of one of them."""
    path = journal_path(target)
    return path.with_name(f"{path.name}.part-{process}")


def times_begun_anew(path: Path) -> int | None:
    """How often the result file was begun anew before this journal; None if there is no journal.

    Nothing else is read, so that --overwrite also helps where a journal is damaged.
    """
    try:
        with path.open("rb") as file:
            return times_in(json.loads(file.readline())["info"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0


def times_in(info: Mapping[str, Any]) -> int:
    """The same from a journal's info; journals of old do not say, and were never begun anew."""
    times = info.get(TIMES) if isinstance(info, Mapping) else None
    return times if isinstance(times, int) else 0


def times_after_this(target: Path) -> int:
    """What the journals of a run say that begins a result file anew."""
    found = [times_begun_anew(path) for path in (journal_path(target), *part_journals(target))]
    return max((times + 1 for times in found if times is not None), default=0)


def known_of(
    target: Path, settings: Mapping[str, Any], info: Mapping[str, Any], *, since: int = 0
) -> JournalContent | None:
    """What all journals of a result file know together; None if none holds a text yet.

    Args:
        target: The result file.
        settings: The present run's, which must be theirs.
        info: The present run's.
        since: Journals that were begun anew less often do not count.

    Raises:
        MMRoleError: If one that counts is damaged, or was begun with other settings.
    """
    times = {path: times_begun_anew(path) for path in (journal_path(target), *part_journals(target))}
    for latest in sorted({number for number in times.values() if number is not None}, reverse=True):
        if latest < since:
            break
        paths = [path for path, number in times.items() if number == latest]
        found = {path: content for path in paths if (content := read_journal(path, _is_told)) and content.entries}
        for path, content in found.items():
            check_settings(path, content, settings, info)
        if found:
            return _together(list(found.values()))
    return None


def remove_older(target: Path, times: int) -> None:
    """Removes further journals that no longer count; where that cannot be done, they still do not."""
    for path in part_journals(target):
        if (times_begun_anew(path) or 0) < times:
            with suppress(OSError):
                path.unlink()


def _together(contents: Sequence[JournalContent]) -> JournalContent:
    together = JournalContent(contents[0].settings, contents[0].info)
    for content in contents:
        for key, value in content.entries.items():
            if key not in together.entries or _progress(value) >= _progress(together.entries[key]):
                together.entries[key] = value
    return together


def _progress(value: Mapping[str, Any]) -> tuple[int, bool]:
    """Orders what two journals say of one unit: a later attempt counts more, and of one attempt the text."""
    return value.get("attempt", 0), "error" not in value


def _is_told(key: str, value: Any) -> bool:
    """Whether a journal's line is one that a run writes."""
    if not isinstance(value, dict):
        return False
    if key == FILE_KEY:
        return isinstance(value.get("sha256"), list) and bool(value["sha256"]) and isinstance(value.get("rows"), int)
    came = [value[name] for name in ("text", "error") if name in value]
    sound = isinstance(value.get("prompt"), str) and isinstance(value.get("attempt"), int)
    return sound and bool(came) and all(isinstance(text, str) for text in came)
