"""Where a sample's image lies: only ever below the image folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from data_utils.errors import MMRoleError


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
    """
    problem = image_name_problem(name)
    if problem:
        raise MMRoleError(problem, name, image_dir, "correct the image name in the data")
    path = Path(image_dir) / name
    try:
        if not path.is_file():
            return None
    except OSError:  # a name longer than the file system allows
        return None
    root, real = Path(image_dir).resolve(), path.resolve()
    if not follow_links and not real.is_relative_to(root):
        raise MMRoleError(
            "a symbolic link leads out of the image folder",
            f"{name} -> {real}",
            image_dir,
            "give --follow_links if you made that link yourself, otherwise put the file itself there",
        )
    return path
