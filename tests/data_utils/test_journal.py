"""The journal: resuming, cuts, damage, other settings, a full disk."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_utils import journal as journal_module
from data_utils.errors import MMRoleError
from data_utils.journal import Journal, read_journal

SETTINGS = {"model": "abc", "seed": 0}


def begin(path: Path, *entries: tuple[str, object], **settings: object) -> None:
    with Journal.open(path, {**SETTINGS, **settings}, {}) as journal:
        for key, value in entries:
            journal.add(key, value)


def test_a_journal_resumes_where_it_stopped(tmp_path):
    path = tmp_path / "x.journal"
    begin(path, ("a", "甲\n"), ("b", 1))
    with Journal.open(path, SETTINGS, {}) as journal:
        assert journal.entries == {"a": "甲\n", "b": 1}
        journal.add("a", "again")
    assert read_journal(path).entries == {"a": "again", "b": 1}


def test_every_cut_of_the_last_line_is_dropped(tmp_path):
    path = tmp_path / "x.journal"
    begin(path, ("a", 1), ("b", "乙"))
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        assert read_journal(path).entries == {"a": 1}
        begin(path, ("b", "乙"))
        assert path.read_bytes() == whole


def test_a_half_written_header_starts_again(tmp_path):
    path = tmp_path / "x.journal"
    begin(path, ("a", 1))
    whole = path.read_bytes()
    path.write_bytes(whole[:10])
    assert read_journal(path) is None
    begin(path, ("a", 1))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("number", [1, 2])
def test_a_broken_line_in_the_middle_is_reported(tmp_path, number):
    path = tmp_path / "x.journal"
    begin(path, ("a", 1), ("b", 2))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = b'{"key": "a", "val\n'
    path.write_bytes(b"".join(lines))
    with pytest.raises(MMRoleError) as caught:
        Journal.open(path, SETTINGS, {})
    assert f"line {number}" in str(caught.value)
    assert path.read_bytes() == b"".join(lines)


def test_other_settings_are_refused_and_both_are_named(tmp_path):
    path = tmp_path / "x.journal"
    with Journal.open(path, {**SETTINGS, "gone": True}, {"names": {"model": "/old/model"}}) as journal:
        journal.add("a", 1)
    before = path.read_bytes()
    with pytest.raises(MMRoleError) as caught:
        Journal.open(path, {"model": "xyz", "seed": 7, "new": 1}, {"names": {"model": "/new/model"}})
    result = str(caught.value)
    assert 'model: "abc" (/old/model) there, "xyz" (/new/model) now' in result
    assert "seed: 0 there, 7 now" in result
    assert "gone: true there, nothing now" in result
    assert "new: nothing there, 1 now" in result
    assert "--overwrite" in result
    assert path.read_bytes() == before


def test_overwriting_waits_for_the_first_unit(tmp_path):
    path = tmp_path / "x.journal"
    begin(path, ("a", 1))
    before = path.read_bytes()
    with Journal.open(path, {"model": "xyz"}, {}, overwrite=True) as journal:
        assert journal.entries == {}
    assert path.read_bytes() == before
    with Journal.open(path, {"model": "xyz"}, {}, overwrite=True) as journal:
        journal.add("b", 2)
        journal.add("c", 3)
    assert (read_journal(path).settings, read_journal(path).entries) == ({"model": "xyz"}, {"b": 2, "c": 3})


def test_two_processes_cannot_write_one_journal(tmp_path):
    path = tmp_path / "x.journal"
    code = (
        "import sys; from pathlib import Path\n"
        "from data_utils.errors import run_main; from data_utils.journal import Journal\n"
        f"sys.exit(run_main(lambda: Journal.open(Path({str(path)!r}), {SETTINGS!r}, {{}}).close()))"
    )
    root = Path(__file__).resolve().parents[2]
    with Journal.open(path, SETTINGS, {}):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert second.returncode == 2
    assert "another process" in second.stderr
    third = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert third.returncode == 0, third.stderr


def test_a_full_disk_leaves_a_journal_to_resume(tmp_path, monkeypatch):
    path = tmp_path / "x.journal"
    begin(path, ("a", 1))
    before = path.read_bytes()
    write = os.write

    def full(descriptor, data):
        write(descriptor, bytes(data)[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal.open(path, SETTINGS, {}) as journal:
        monkeypatch.setattr(journal_module.os, "write", full)
        with pytest.raises(MMRoleError, match="No space left") as caught:
            journal.add("b", 2)
        monkeypatch.undo()
        assert "run the same command again" in caught.value.fix
        assert path.read_bytes().startswith(before)
        assert read_journal(path).entries == {"a": 1}
        journal.add("c", 3)  # of another thread, when there is room again
    begin(path, ("b", 2))
    assert read_journal(path).entries == {"a": 1, "c": 3, "b": 2}


def test_short_writes_are_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(journal_module.os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:3]))
    begin(tmp_path / "x.journal", ("a", "long enough"))
    monkeypatch.undo()
    assert read_journal(tmp_path / "x.journal").entries == {"a": "long enough"}


def test_a_journal_of_another_version_is_refused(tmp_path):
    path = tmp_path / "x.journal"
    path.write_text(json.dumps({"journal": 99, "settings": {}, "info": {}}) + "\n")
    with pytest.raises(MMRoleError, match="another version"):
        Journal.open(path, SETTINGS, {})


def test_a_journal_without_a_unit_locks_nobody_to_its_settings(tmp_path):
    path = tmp_path / "x.journal"
    begin(path)
    with Journal.open(path, {"model": "xyz"}, {"by": 2}) as journal:
        journal.add("a", 1)
    assert read_journal(path).settings == {"model": "xyz"}
    assert read_journal(path).info == {"by": 2}


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (1, {"journal": 1, "settings": {}}),
        (1, [1]),
        (2, {"key": "a"}),
        (2, 5),
        (3, {"key": ["b"], "value": 1}),
        (3, "text"),
    ],
)
def test_json_that_is_no_line_of_a_journal_is_reported(tmp_path, number, line):
    path = tmp_path / "x.journal"
    begin(path, ("a", 1), ("b", 2))
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps(line)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(MMRoleError, match="the journal is damaged") as caught:
        Journal.open(path, SETTINGS, {})
    assert f"line {number}" in str(caught.value)
    assert caught.value.fix


def test_a_journal_knows_paths_that_are_no_utf_8(tmp_path):
    info = {"names": {"model": "/m \udcff"}}
    with Journal.open(tmp_path / "x.journal", SETTINGS, info) as journal:
        journal.add("a", 1)
        with pytest.raises(UnicodeEncodeError):
            journal.add("b", "half \ud800")
    content = read_journal(tmp_path / "x.journal")
    assert (content.info, content.entries) == (info, {"a": 1})
