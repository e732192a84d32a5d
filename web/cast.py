"""The characters of a data root, with their pictures."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_utils.errors import raise_problems
from data_utils.images import find_image
from data_utils.layout import file_name
from data_utils.prompts import ImageInformation, Role
from data_utils.roots import DataRoots, read_annotations
from web.chats import ChatError, Limits, read_picture

PREFIX = "mmrole/"
_MOST_PICTURES = 24  # per character, on the page


@dataclass(frozen=True)
class CastPicture:
    """A picture of a character's script, with its annotation."""

    name: str
    path: Path
    information: ImageInformation

    def open(self) -> Image.Image:
        """Return the picture, upright, in RGB.

        Raises:
            ChatError: It cannot be read.
        """
        try:
            return read_picture(self.path.read_bytes(), Limits(), self.name)
        except OSError as error:
            raise ChatError(f"a picture cannot be read: {error.strerror}", self.name) from None


@dataclass(frozen=True)
class Cast:
    """The characters of a data root.

    Attributes:
        roles: The characters by name.
        pictures: The pictures of each script, from `images/annotations.json`, if their files exist.
    """

    roles: Mapping[str, Role]
    pictures: Mapping[str, list[CastPicture]]

    def role(self, name: str) -> Role:
        """Return the character of this name.

        Raises:
            ChatError: There is none.
        """
        if name not in self.roles:
            what = f"there is no character {name!r}" if self.roles else "there are no characters: give a data root"
            raise ChatError(what, "model", status=404, code="model_not_found")
        return self.roles[name]

    def pictures_of(self, name: str) -> list[CastPicture]:
        """Return the pictures of a character's script, those with the character alone first."""
        if name not in self.roles:
            return []
        found = self.pictures.get(self.roles[name].script, [])
        texts = [picture.information.role for picture in found]
        order = sorted(range(len(found)), key=lambda i: len(texts[i]) if name in texts[i] else sys.maxsize)
        return [found[i] for i in order[:_MOST_PICTURES]]

    def first_picture(self, name: str) -> tuple[Image.Image, ImageInformation] | None:
        """Return the first of a character's pictures that can be read, and what is known about it."""
        for picture in self.pictures_of(name):
            with suppress(ChatError):
                return picture.open(), picture.information
        return None


def read_cast(data_root: Path | None) -> Cast:
    """Return the characters of a data root; none without one.

    Raises:
        ProblemsError: The root's files of characters are missing or wrong.
    """
    if data_root is None:
        return Cast({}, {})
    characters = DataRoots([data_root]).characters
    roles = {name: characters.role(name) for name in characters.scripts if name in characters.profiles}
    folders = {file_name(script): script for script in characters.scripts.values()}
    pictures: dict[str, list[CastPicture]] = {}
    rows, problems = read_annotations(data_root)
    raise_problems(problems)
    for row in rows:
        name = row["image"]
        script = folders.get(name.partition("/")[0])
        path = None if script is None else find_image(data_root / "images", name)
        if script is not None and path is not None:
            pictures.setdefault(script, []).append(CastPicture(name, path, ImageInformation.of(row)))
    return Cast(dict(sorted(roles.items())), pictures)
