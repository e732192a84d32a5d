import pytest

from data_utils.errors import MMRoleError
from data_utils.images import find_image
from tests.closed import close


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"x")
    (tmp_path / "secret.png").write_bytes(b"x")
    return tmp_path / "images"


def test_images_are_found(folder):
    assert find_image(folder, "a/1.png") == folder / "a" / "1.png"
    assert find_image(folder, "a/2.png") is None
    assert find_image(folder, "a") is None
    assert find_image(folder, "x" * 5000) is None


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/passwd", "http://x/1.png"])
def test_names_that_lead_out_are_refused(folder, name):
    with pytest.raises(MMRoleError):
        find_image(folder, name, follow_links=True)


def test_links_that_lead_out_are_refused_unless_allowed(folder):
    (folder / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "in.png").symlink_to("a/1.png")
    assert find_image(folder, "in.png")
    with pytest.raises(MMRoleError, match="symbolic link"):
        find_image(folder, "out.png")
    assert find_image(folder, "out.png", follow_links=True) == folder / "out.png"


def test_the_image_folder_itself_may_be_a_link(folder):
    link = folder.parent / "linked"
    link.symlink_to(folder)
    assert find_image(link, "a/1.png") == link / "a" / "1.png"


def test_a_closed_folder_is_not_an_empty_one(folder, monkeypatch):
    close(monkeypatch, folder / "a")
    with pytest.raises(MMRoleError, match="cannot read: Permission denied"):
        find_image(folder, "a/1.png")
    assert find_image(folder, "b/1.png") is None
