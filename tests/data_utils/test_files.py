import errno
from pathlib import Path

import pytest

from data_utils import files
from data_utils.errors import MMRoleError
from data_utils.files import published_json, read_json, write_json, write_rows, write_text
from data_utils.paths import sha256_of

# ---- reading JSON


def test_read_json_gives_what_write_json_wrote(tmp_path):
    rows = [{"b": "西游记\u2028\\", "a": [1.5, None, ""]}]
    write_json(tmp_path / "x.json", rows)
    assert read_json(tmp_path / "x.json") == rows
    assert list(read_json(tmp_path / "x.json")[0]) == ["b", "a"]


@pytest.mark.parametrize(
    ("content", "expected"),
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
def test_broken_json_is_reported_with_its_place(tmp_path, content, expected):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(MMRoleError) as caught:
        read_json(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.fix


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_json_lines_are_read_as_a_list(tmp_path):
    rows = [{"id": "a", "text": "\u2028"}, {"id": "b"}]
    assert write_rows(tmp_path / "x.jsonl", rows, as_lines=True) == 2
    assert read_json(tmp_path / "x.jsonl") == rows


def test_a_missing_file_is_reported(tmp_path):
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
def test_a_file_for_a_folder_is_reported(tmp_path, write):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MMRoleError, match="cannot write"):
        write(tmp_path / "file" / "x.json")


@pytest.mark.parametrize("write", [lambda path: write_text(path, "x"), lambda path: write_rows(path, [{"id": "x"}])])
def test_a_read_only_file_system_is_reported(tmp_path, monkeypatch, write):
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


def test_sha256_of_what_is_no_file(tmp_path):
    (tmp_path / "file").touch()
    assert sha256_of(tmp_path) is None
    assert sha256_of(tmp_path / "file" / "below") is None
    with pytest.raises(MMRoleError, match="cannot read the file") as caught:
        sha256_of(tmp_path / ("x" * 300))
    assert caught.value.fix
