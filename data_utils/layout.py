"""Where the files of MMRole-Data lie below a data root: splits, kinds and paths."""

from __future__ import annotations

from pathlib import Path

SPLITS = ("in-distribution", "out-of-distribution")
KINDS = ("comment", "human-role", "inter-role")


def paths_of_tests(data_root: str | Path) -> list[Path]:
    """Gives the paths of the six test files of a data root, whether they are there or not."""
    return [Path(data_root) / "data" / "test" / split / f"{kind}_test.json" for split in SPLITS for kind in KINDS]
