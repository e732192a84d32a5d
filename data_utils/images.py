"""Where a sample's image lies: only ever below the image folder; and which images of two data roots clash."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from data_utils.errors import MMRoleError, raise_problems
from data_utils.paths import is_file

PLAIN_IMAGE = "play/plain.png"  # made for characters without pictures, in any data root
_NO_IMAGES = (".json", ".txt", ".md", ".db", ".ini")  # what else lies in folders of pictures
_LONGEST_NAME = 200  # bytes; file systems take 255, and suffixes are added


def image_name_problem(name: str) -> str | None:
    """Why an image name cannot be allowed, or None. Allowed is a relative path that stays below the image folder."""
    if not name.strip():
        return "the image name is empty"
    if "://" in name or name.lower().startswith(("data:", "file:", "http:", "https:")):
        return "an image must be a file below the image folder, not a URL"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name.startswith("\\"):
        return "an image must be named relative to the image folder, not by an absolute path"
    if ".." in name.replace("\\", "/").split("/"):
        return "an image name must not climb out of the image folder"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "an image name must not hold control characters"
    return None


def file_name_problem(name: str) -> str | None:
    """Why a character's or a script's name cannot be a part of file names, or None."""
    if not name.strip() or name != name.strip():
        return "it is empty or has blanks at its edges"
    if any("\ud800" <= character <= "\udfff" for character in name):
        return "it is not UTF-8 text, or holds half of a surrogate pair"
    if "/" in name or "\\" in name or name.startswith("."):
        return "it holds / or \\ or begins with a full stop"
    if len(name.encode("utf-8")) > _LONGEST_NAME:
        return f"it is longer than {_LONGEST_NAME} bytes"
    return image_name_problem(name)


def find_image(image_dir: str | Path, name: str, *, follow_links: bool = False) -> Path | None:
    """The file of an image.

    Args:
        image_dir: The image folder; it may itself be a link.
        name: The image's name in the data, relative to that folder.
        follow_links: Allows symbolic links below the folder that lead out of it, such as a linked COCO folder.

    Returns:
        Its path, or None where there is no such file.

    Raises:
        MMRoleError: If the name is not allowed, or a link leads out of the folder and links are not allowed.
        UnreadableError: If the folder may not be looked into.
    """
    problem = image_name_problem(name)
    if problem:
        raise MMRoleError(problem, name, image_dir, "correct the image name in the data")
    path = Path(image_dir) / name
    if not is_file(path):
        return None
    if not follow_links and leads_outside(Path(image_dir), path):
        raise MMRoleError(
            "a symbolic link leads out of the image folder",
            f"{name} -> {path.resolve()}",
            image_dir,
            "give --follow_links if you made that link yourself, otherwise put the file itself there",
        )
    return path


def leads_outside(image_dir: Path, path: Path) -> bool:
    """Whether links lead from an image's path out of the image folder, which may itself be a link."""
    return not path.resolve().is_relative_to(image_dir.resolve())


def images_below(root: Path) -> Iterator[tuple[str, Path]]:
    """The images of a data root in order, with their names: all below `images/` but texts and hidden files.

    Links to folders are entered, but not one to MS-COCO's images, which are the same everywhere.
    """
    images = root / "images"
    for place, folders, files in os.walk(images, followlinks=True):
        folder = Path(place)
        folders[:] = sorted(name for name in folders if not _stays_out(images, folder / name))
        for path in (folder / name for name in sorted(files)):
            if not path.name.startswith(".") and path.suffix.lower() not in _NO_IMAGES and path.is_file():
                yield path.relative_to(images).as_posix(), path


def clashing_images(root: Path, others: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """The images that are another picture in another data root: one name, different bytes.

    Args:
        root: The data root whose images are compared.
        others: Those that they are compared with.

    Yields:
        The name, and the first of the others in which it is another picture.

    Raises:
        ProblemsError: Images cannot be read, with all of them.
    """
    problems = []
    for name, path in images_below(root):
        for other in others:
            there = other / "images" / name
            try:
                if name != PLAIN_IMAGE and there.is_file() and not _same(path, there):
                    yield name, other
                    break
            except OSError as error:
                fix = "check its permissions"
                problems.append(MMRoleError(f"an image cannot be read: {error.strerror}", name, error.filename, fix))
    raise_problems(problems)


def _stays_out(images: Path, folder: Path) -> bool:
    """Whether a folder is a link to MS-COCO's images, or to one that it lies in itself."""
    if not folder.is_symlink():
        return False
    loops = folder.parent.resolve().is_relative_to(folder.resolve())
    return loops or folder.relative_to(images).as_posix() in ("COCO", "COCO/train2017")


def _same(one: Path, other: Path) -> bool:
    return one.samefile(other) or filecmp.cmp(one, other, shallow=False)
