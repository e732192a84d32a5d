"""The ids of grown dialogues: none that a dialogue of the same data has already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_utils.grow.files import dialogues_there, id_head, images_there, sort_of
from data_utils.layout import SPLITS


class Ids:
    """The ids of new dialogues: numbered on from the highest that a character has in any of the data roots."""

    def __init__(self, root: Path, source: Path, split: str, kinds: Sequence[str], again: Mapping[str, str]) -> None:
        self._split, self._again = split, again
        own = dialogues_there(root, split, kinds)
        places = [(folder, part) for folder in dict.fromkeys((root.resolve(), source.resolve())) for part in SPLITS]
        places.remove((root.resolve(), split))
        others = [row for folder, part in places for _, row in dialogues_there(folder, part, kinds)]
        self._images = images_there(own)
        self._taken = {row["id"]: row["image"] for _, row in own} | {row["id"]: None for row in others}
        self._highest: dict[str, int] = {}
        for name in (*self._taken, *again.values()):
            head, number = _parted_id(name)
            self._highest[head] = max(self._highest.get(head, -1), number)

    def of(self, kind: str, name: str, image: str) -> str | None:
        """The id of a dialogue, or None where it is there already."""
        old = self._again.get(dialogue_key(self._split, kind, name, image))
        if old is not None and self._taken.get(old, image) == image:
            return old
        if old is None and image in self._images.get((kind, name), ()):
            return None
        head = id_head(name, kind)
        self._highest[head] = self._highest.get(head, -1) + 1
        return f"{head}{sort_of(image)}_{self._highest[head]}"


def _parted_id(dialogue_id: str) -> tuple[str, int]:
    """What an id begins with, without the sort of its image, and its number."""
    head, _, number = dialogue_id.rpartition("_")
    return head.rpartition("_")[0] + "_", int(number) if number.isdecimal() else -1


def dialogue_key(split: str, kind: str, name: str, image: str) -> str:
    """What identifies a dialogue: there is one of each kind for a character and an image."""
    return f"{split}/{kind}/{name}/{image}"
