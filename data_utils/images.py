"""Images of data roots: their names, where they lie (only ever below the image folder), and what form they have."""

from __future__ import annotations

import filecmp
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from data_utils.errors import MMRoleError, raise_problems
from data_utils.layout import PLAIN_IMAGE
from data_utils.paths import is_file

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
NO_IMAGES = (".json", ".txt", ".md", ".db", ".ini")  # other files in folders of pictures
# Forms of pictures that people see otherwise than the model, which reads 8-bit RGB without any metadata.
FORMS = {
    "rotated_image": "an EXIF orientation, which the model ignores: it sees the picture turned or mirrored",
    "deep_image": "more than 8 bits per channel, which are clipped: the model sees most of it white",
    "transparent_image": "transparency, which the model ignores: it sees the colours behind it",
    "animated_image": "several frames: the model sees the first one",
}
_ORIENTATION = 0x0112  # of EXIF
_LONGEST_NAME = 200  # bytes; file systems take 255, and suffixes are added


def image_name_problem(name: str) -> str | None:
    """Return why an image name is not allowed, or None; it must be a relative path below the image folder."""
    if not name.strip():
        return "the image name is empty"
    if "://" in name or name.lower().startswith(("data:", "file:", "http:", "https:")):
        return "an image must be a file below the image folder, not a URL"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name.startswith("\\"):
        return "an image name must be relative to the image folder, not an absolute path"
    if ".." in name.replace("\\", "/").split("/"):
        return "an image name must not climb out of the image folder"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "an image name must not hold control characters"
    return None


def file_name_problem(name: str) -> str | None:
    """Return why a character's or a script's name cannot be a part of file names, or None."""
    if not name.strip() or name != name.strip():
        return "it is empty or has leading or trailing blanks"
    if any("\ud800" <= character <= "\udfff" for character in name):
        return "it is not UTF-8 text, or holds half of a surrogate pair"
    if "/" in name or "\\" in name or name.startswith("."):
        return "it contains / or \\ or begins with a dot"
    if len(name.encode("utf-8")) > _LONGEST_NAME:
        return f"it is longer than {_LONGEST_NAME} bytes"
    return image_name_problem(name)


def find_image(image_dir: str | Path, name: str, *, follow_links: bool = False) -> Path | None:
    """Return the file of an image, or None if there is none.

    Args:
        image_dir: The image folder; it may itself be a link.
        name: The image's name in the data, relative to that folder.
        follow_links: Allow symbolic links that lead out of the folder, such as a linked COCO folder.

    Raises:
        MMRoleError: If the name is not allowed, or a link leads out of the folder and links are not allowed.
        UnreadableError: If the folder cannot be read.
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
    """Return whether an image's path leads out of the image folder through links; the folder may itself be a link."""
    return not path.resolve().is_relative_to(image_dir.resolve())


def images_below(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the images of a data root in order, with their names: all files below `images/` but texts and hidden files.

    Links to folders are followed, except one to MS-COCO's images, which are the same everywhere.
    """
    images = root / "images"
    for place, folders, files in os.walk(images, followlinks=True):
        folder = Path(place)
        folders[:] = sorted(name for name in folders if not _stays_out(images, folder / name))
        for path in (folder / name for name in sorted(files)):
            if not path.name.startswith(".") and path.suffix.lower() not in NO_IMAGES and path.is_file():
                yield path.relative_to(images).as_posix(), path


def clashing_images(root: Path, others: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield the images that differ from an image of the same name in another data root.

    Args:
        root: The data root whose images are compared.
        others: The data roots that they are compared with.

    Yields:
        The name, and the first of the others whose picture differs.

    Raises:
        ProblemsError: Images cannot be read; every one is reported.
    """
    problems = []
    for name, path in images_below(root):
        for other in others:
            same_name = other / "images" / name
            try:
                if name != PLAIN_IMAGE and same_name.is_file() and not _same(path, same_name):
                    yield name, other
                    break
            except OSError as error:
                fix = "check its permissions"
                problems.append(MMRoleError(f"an image cannot be read: {error.strerror}", name, error.filename, fix))
    raise_problems(problems)


def image_forms(image: Image.Image) -> list[str]:
    """Return the keys of `FORMS` that apply to an opened picture."""
    forms = {
        "rotated_image": image.getexif().get(_ORIENTATION) in range(2, 9),
        "deep_image": image.mode.startswith("I") or image.mode == "F",
        "transparent_image": image.has_transparency_data and _alpha(image).getextrema()[0] < 255,
        "animated_image": getattr(image, "n_frames", 1) > 1,
    }
    return [form for form, applies in forms.items() if applies]


def _alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A")


def upright_rgb(data: bytes) -> tuple[bytes, str]:
    """Return a picture as people see it: upright, 8-bit RGB, transparency on white.

    Args:
        data: The content of a picture file.

    Returns:
        The content and suffix of a JPEG or WebP or PNG file; unchanged if possible.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data)) as image:
        suffix = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}.get(image.format or "", "")
        if suffix and not image_forms(image) and image.mode in ("RGB", "L"):
            return data, suffix
        picture = ImageOps.exif_transpose(image)
    if picture.mode.startswith("I"):
        picture = picture.convert("I").point(lambda value: value / 256).convert("L")
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    content = io.BytesIO()
    if suffix == ".jpg":
        picture.convert("RGB").save(content, "JPEG", quality=95)
        return content.getvalue(), suffix
    picture.convert("RGB").save(content, "PNG")
    return content.getvalue(), ".png"


def plain_picture() -> Image.Image:
    """Return the grey picture that is shown where there is no other."""
    from PIL import Image

    return Image.new("RGB", (448, 448), (160, 160, 160))


def _stays_out(images: Path, folder: Path) -> bool:
    """Return whether a folder is a link to MS-COCO's images, or to a folder that contains it."""
    if not folder.is_symlink():
        return False
    loops = folder.parent.resolve().is_relative_to(folder.resolve())
    return loops or folder.relative_to(images).as_posix() in ("COCO", "COCO/train2017")


def _same(one: Path, other: Path) -> bool:
    return one.samefile(other) or filecmp.cmp(one, other, shallow=False)
