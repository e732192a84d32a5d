"""Training samples as bytes: loader workers share them, instead of each slowly getting a copy of all."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from data_utils.schema import Row


class CompactRows(Sequence[Row]):
    """Rows that are kept as JSON text and parsed when they are asked for.

    A forked worker shares the parent's memory until a page is written; merely reading a Python object writes its
    reference count, so that lists of dicts end up as one copy per worker. Two arrays have two reference counts.

    Args:
        rows: Rows of a data file.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        texts = [json.dumps(row, ensure_ascii=False).encode("utf-8") for row in rows]
        self._ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._text = np.frombuffer(b"".join(texts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        return json.loads(self._text[start : int(self._ends[index])].tobytes())
