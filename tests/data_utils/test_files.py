import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_utils import files
from data_utils.errors import MMRoleError
from data_utils.files import Journal, published_json, read_journal, read_json, write_json, write_text
from data_utils.paths import sha256_of
from data_utils.row_files import write_rows

SETTINGS = {"model": "abc", "seed": 0}


def begin(path: Path, *entries: tuple[str, object], **settings: object) -> None:
    with Journal.open(path, {**SETTINGS, **settings}, {}) as journal:
        for key, value in entries:
            journal.add(key, value)


# ---- reading JSON


def test_read_json_gives_what_write_json_wrote(tmp_path):
    rows = [{"b": "西游记\u2028\\", "a": [1.5, None, ""]}]
    write_json(tmp_path / "x.json", rows)
    assert read_json(tmp_path / "x.json") == rows
    assert list(read_json(tmp_path / "x.json")[0]) == ["b", "a"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'[1,\n  {"a": }]', "line 2, column 9"),
        (b"", "line 1, column 1"),
        (b'[\n {"id":"a"},\n', "the file ends here"),
        (b'[\n {"id":"a"},\n', "line 3, column 1"),
        ('["\u2028",\n nothing]'.encode(), "nothing"),  # a line's end for Python, not for JSON
        (b'["\xff"]', "not UTF-8"),
        (b"[NaN]", "NaN is not a JSON value"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_json_is_told_with_its_place(tmp_path, content, told):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(MMRoleError) as caught:
        read_json(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.fix


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(MMRoleError, match="No such file"):
        read_json(tmp_path / "nowhere.json")


# ---- writing


def test_the_published_format():
    assert published_json([{"名": "é", "n": 1}]) == '[\n    {\n        "名": "é",\n        "n": 1\n    }\n]'.encode()


def test_half_a_surrogate_pair_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, ["old"])
    with pytest.raises(MMRoleError, match="surrogate"):
        write_json(path, ["bad \ud83d"])
    assert read_json(path) == ["old"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, ["old"])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(MMRoleError, match="No space left") as caught:
        write_json(path, ["new"])
    assert "free some space" in caught.value.fix
    assert read_json(path) == ["old"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("write", [lambda path: write_text(path, "x"), lambda path: write_rows(path, [{"id": "x"}])])
def test_a_file_for_a_folder_is_told(tmp_path, write):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MMRoleError, match="cannot write"):
        write(tmp_path / "file" / "x.json")


@pytest.mark.parametrize("write", [lambda path: write_text(path, "x"), lambda path: write_rows(path, [{"id": "x"}])])
def test_a_read_only_file_system_is_told(tmp_path, monkeypatch, write):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(MMRoleError, match="Read-only"):
        write(tmp_path / "x.json")


def test_written_files_have_ordinary_permissions(tmp_path):
    write_text(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_sha256_of_nothing(tmp_path):
    assert sha256_of(tmp_path / "nowhere") is None


# ---- the journal


def test_a_journal_goes_on_where_it_stopped(tmp_path):
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


def test_a_half_written_header_begins_anew(tmp_path):
    path = tmp_path / "x.journal"
    begin(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:10])
    assert read_journal(path) is None
    begin(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("number", [1, 2])
def test_a_broken_line_in_the_middle_is_told(tmp_path, number):
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
    told = str(caught.value)
    assert 'model: "abc" (/old/model) there, "xyz" (/new/model) now' in told
    assert "seed: 0 there, 7 now" in told
    assert "gone: true there, nothing now" in told
    assert "new: nothing there, 1 now" in told
    assert "--overwrite" in told
    assert path.read_bytes() == before


def test_overwrite_begins_anew(tmp_path):
    path = tmp_path / "x.journal"
    begin(path, ("a", 1))
    with Journal.open(path, {"model": "xyz"}, {}, overwrite=True) as journal:
        assert journal.entries == {}
    assert read_journal(path).settings == {"model": "xyz"}


def test_two_processes_cannot_write_one_journal(tmp_path):
    path = tmp_path / "x.journal"
    code = (
        "import sys; from pathlib import Path; from data_utils.files import Journal; from data_utils.errors import *\n"
        f"sys.exit(run_main(lambda: Journal.open(Path({str(path)!r}), {SETTINGS!r}, {{}}).close()))"
    )
    root = Path(__file__).resolve().parents[2]
    with Journal.open(path, SETTINGS, {}):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert second.returncode == 2
    assert "another process" in second.stderr
    third = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert third.returncode == 0, third.stderr


def test_a_full_disk_leaves_a_journal_to_go_on_with(tmp_path, monkeypatch):
    path = tmp_path / "x.journal"
    begin(path, ("a", 1))
    before = path.read_bytes()
    write = os.write

    def full(descriptor, data):
        write(descriptor, bytes(data)[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal.open(path, SETTINGS, {}) as journal:
        monkeypatch.setattr(files.os, "write", full)
        with pytest.raises(MMRoleError, match="No space left") as caught:
            journal.add("b", 2)
        monkeypatch.undo()
    assert "run the same command again" in caught.value.fix
    assert path.read_bytes() == before
    begin(path, ("b", 2))
    assert read_journal(path).entries == {"a": 1, "b": 2}


def test_short_writes_are_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:3]))
    begin(tmp_path / "x.journal", ("a", "long enough"))
    monkeypatch.undo()
    assert read_journal(tmp_path / "x.journal").entries == {"a": "long enough"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_really_full_device(tmp_path):
    (tmp_path / "x.journal").symlink_to("/dev/full")
    with pytest.raises(MMRoleError, match=r"cannot (write|read)"):
        Journal.open(tmp_path / "x.journal", SETTINGS, {}, overwrite=True)


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


def test_overwriting_can_wait_for_the_first_unit(tmp_path):
    path = tmp_path / "x.journal"
    begin(path, ("a", 1))
    before = path.read_bytes()
    with Journal.open(path, {"model": "xyz"}, {}, overwrite=True, at_once=False) as journal:
        assert journal.entries == {}
    assert path.read_bytes() == before
    with Journal.open(path, {"model": "xyz"}, {}, overwrite=True, at_once=False) as journal:
        journal.add("b", 2)
        journal.add("c", 3)
    assert (read_journal(path).settings, read_journal(path).entries) == ({"model": "xyz"}, {"b": 2, "c": 3})


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (1, {"journal": 1, "settings": 3, "info": {}}),
        (1, {"journal": 1, "settings": {}, "info": 3}),
        (1, [1]),
        (2, {"key": 3, "value": 1}),
        (2, {"key": "a"}),
        (2, 5),
        (3, {"key": ["b"], "value": 1}),
        (3, "text"),
    ],
)
def test_json_that_is_no_line_of_a_journal_is_told(tmp_path, number, line):
    path = tmp_path / "x.journal"
    begin(path, ("a", 1), ("b", 2))
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps(line)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(MMRoleError, match="the journal is damaged") as caught:
        Journal.open(path, SETTINGS, {})
    assert f"line {number}" in str(caught.value)
    assert caught.value.fix


def test_names_that_are_no_names_do_not_hide_the_settings(tmp_path):
    path = tmp_path / "x.journal"
    with Journal.open(path, SETTINGS, {"names": 3}) as journal:
        journal.add("a", 1)
    with pytest.raises(MMRoleError, match="different settings") as caught:
        Journal.open(path, {**SETTINGS, "model": "xyz"}, {"names": {"model": "/new"}})
    assert 'model: "abc" there, "xyz" (/new) now' in str(caught.value)


def test_sha256_of_what_is_no_file(tmp_path):
    (tmp_path / "file").touch()
    assert sha256_of(tmp_path) is None
    assert sha256_of(tmp_path / "file" / "below") is None
    with pytest.raises(MMRoleError, match="cannot read the file") as caught:
        sha256_of(tmp_path / ("x" * 300))
    assert caught.value.fix


def test_a_journal_knows_paths_that_are_no_utf_8(tmp_path):
    info = {"names": {"model": "/m \udcff"}}
    with Journal.open(tmp_path / "x.journal", SETTINGS, info) as journal:
        journal.add("a", 1)
        with pytest.raises(UnicodeEncodeError):
            journal.add("b", "half \ud800")
    content = read_journal(tmp_path / "x.journal")
    assert (content.info, content.entries) == (info, {"a": 1})
