"""The lengths of prompts and answers, in tokens or characters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from data_utils.errors import MMRoleError
from data_utils.prompts import SYSTEM_MESSAGE

if TYPE_CHECKING:
    from qwen_vl import QwenVLTokenizer

_NEXT_LINE = re.compile(r"(?<=\n)(?=\S)")


def read_tokenizer(checkpoint: Path) -> QwenVLTokenizer:
    """Return the tokenizer of a checkpoint.

    Raises:
        MMRoleError: There is none.
    """
    from qwen_vl import QwenVLTokenizer

    try:
        return QwenVLTokenizer.from_pretrained(checkpoint)
    except (FileNotFoundError, ValueError) as error:
        raise MMRoleError("no tokenizer there", str(error), "--tokenizer", "choose a checkpoint's folder") from error


class LengthCounter:
    """Counts a sample's prompt and answer: tokens as the model reads them, or characters without a tokenizer.

    The tokenizer never joins the texts before and after a line's end, so lines can be counted one by one, and repeated
    ones only once.
    """

    def __init__(self, tokenizer: QwenVLTokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._counts: dict[str, int] = {}  # of lines
        self._frame = 0
        if tokenizer is not None:
            from qwen_vl.chat import make_context

            ids = make_context(tokenizer, [{"image": "x"}, {"text": "T"}], system=SYSTEM_MESSAGE)[1]
            self._frame = len(ids) - self.count("T")

    def count(self, text: str) -> int:
        """Return the tokens of a plain text, or its characters."""
        if self._tokenizer is None:
            return len(text)
        return sum(map(self._line, _NEXT_LINE.split(text)))

    def prompt(self, text: str) -> int:
        """Return the tokens of the whole prompt with system message and picture, or the characters of the text."""
        return self._frame + self.count(text)

    def _line(self, line: str) -> int:
        if line not in self._counts:
            assert self._tokenizer is not None
            self._counts[line] = len(self._tokenizer.encode(line, allowed_special=()))
        return self._counts[line]
