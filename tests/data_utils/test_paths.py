import pytest

from data_utils.paths import UnreadableError, is_file, is_folder, is_there, listed
from tests.closed import close


def test_what_is_there(tmp_path):
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "._b.json").write_text("")
    (tmp_path / "a").mkdir()
    assert [path.name for path in listed(tmp_path)] == ["a", "b.json"]
    assert listed(tmp_path, "*.json") == [tmp_path / "b.json"]
    assert (is_file(tmp_path / "b.json"), is_folder(tmp_path / "b.json"), is_there(tmp_path / "b.json")) == (1, 0, 1)
    assert (is_file(tmp_path / "a"), is_folder(tmp_path / "a"), is_there(tmp_path / "a")) == (0, 1, 1)


@pytest.mark.parametrize("name", ["none", "b.json/c", "loop", "x" * 5000, "a\0b"])
def test_what_is_not(tmp_path, name):
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "loop").symlink_to("loop")
    path = tmp_path / name
    assert not (is_file(path) or is_folder(path) or is_there(path))
    assert "\0" in name or listed(path) == []


@pytest.mark.parametrize("look", [is_file, is_folder, is_there, listed])
def test_a_closed_folder_is_named(tmp_path, monkeypatch, look):
    (tmp_path / "shut" / "deep").mkdir(parents=True)
    close(monkeypatch, tmp_path / "shut")
    with pytest.raises(UnreadableError, match="cannot read: Permission denied") as result:
        look(tmp_path / "shut" / "deep" / "x")
    assert result.value.value == tmp_path / "shut"
    with pytest.raises(UnreadableError) as result:
        listed(tmp_path / "shut")
    assert result.value.value == tmp_path / "shut"
