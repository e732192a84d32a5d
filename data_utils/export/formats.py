"""The formats of other trainers; a new one is a further entry of `FORMATS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data_utils.errors import MMRoleError
from data_utils.files import Row
from data_utils.prompts import TRAINING_SYSTEM, picture_line

SYSTEMS = ("published", "role-play")
IMAGE = "<image>"  # LLaMA-Factory's and ms-swift's placeholder for the picture
# Replaced or counted by these trainers wherever they occur in a text.
_PLACEHOLDERS = (IMAGE, "<video>", "<audio>", "<bbox>", "<ref-object>", "<point>")


@dataclass(frozen=True)
class Format:
    """A format of a trainer.

    Attributes:
        row: Makes a row from the sample's id, system message, picture path, prompt and answer.
        dataset_info: Whether LLaMA-Factory's list of data sets is also written.
        placeholders: Texts that no sample may contain.
    """

    row: Callable[[str, str, str, str, str], Row]
    dataset_info: bool = False
    placeholders: tuple[str, ...] = _PLACEHOLDERS


def _with_placeholder(name: str, system: str, image: str, prompt: str, answer: str) -> Row:
    return {
        "id": name,
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": IMAGE + prompt},
            {"role": "assistant", "content": answer},
        ],
        "images": [image],
    }


def _with_parts(name: str, system: str, image: str, prompt: str, answer: str) -> Row:
    # The picture's path stands under "path" and not "image": `datasets` gives each part the keys of all others, with
    # null as value, and chat templates take any part with a key "image" for a picture.
    return {
        "id": name,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "images": [image],
    }


FORMATS = {
    "llamafactory": Format(_with_placeholder, dataset_info=True),
    "ms-swift": Format(_with_placeholder),
    "messages": Format(_with_parts, placeholders=()),
}


def dataset_info(files: Mapping[str, str]) -> dict[str, Any]:
    """Return LLaMA-Factory's description of data sets, given their file names by name."""
    return {
        name: {
            "file_name": file,
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        }
        for name, file in files.items()
    }


def exported(sample: Row, form: Format, *, system: str, image: str) -> Row:
    """Return a sample in a trainer's format.

    Args:
        sample: A training, test or reward-model sample: one user turn and one assistant turn.
        form: The format.
        system: "published" is the one message that the released trainer uses, "role-play" the sample's own.
        image: The path of its picture.

    Raises:
        MMRoleError: A text contains a placeholder, which the trainer would take for a picture.
    """
    user, assistant = (turn["value"] for turn in sample["conversations"])
    prompt = user.removeprefix(picture_line(sample["image"]))
    for text in (prompt, assistant):
        placeholder = next((word for word in form.placeholders if word in text), None)
        if placeholder:
            what = "a text holds a placeholder, which the trainer would replace"
            raise MMRoleError(what, placeholder, f"sample {sample['id']}", "reword it, or export as messages")
    message = TRAINING_SYSTEM if system == "published" else sample["system"]
    return form.row(sample["id"], message, image, prompt, assistant)
