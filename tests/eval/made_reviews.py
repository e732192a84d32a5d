"""Small review files for the tests of results and reports."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.judging.metrics import METRIC_NAMES
from eval.results.reviews import FILES

CLEAN = (8.0, 10.0)


def record(pair: Sequence[float]) -> dict[str, Any]:
    a, b = pair
    return {"review": f"Fine. [Scores]: ({a}, {b})", "score": [a, b]}


def made_row(
    number: int = 0,
    pair: Sequence[float] = CLEAN,
    *,
    answer: str = "An answer.",
    records: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a reviewed row (without reviews if the answer is empty); `records` replaces single metrics' records."""
    row: dict[str, Any] = {
        "id": f"row_{number}",
        "image": "a.jpg",
        "conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "truth", "answer": answer}],
        "role": "Ada",
        "script": "The Engine",
        "other_role": "a curious human",
    }
    if answer:
        row["rm_review"] = {metric: (records or {}).get(metric, record(pair)) for metric in METRIC_NAMES}
    return row


def write_rows(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return path


def review_path(eval_dir: Path, agent: str, split: str, kind: str) -> Path:
    return eval_dir / f"{split}-test_reviews" / agent / f"{kind}_test.json"


def write_agent(
    eval_dir: Path, agent: str, rows: Sequence[Mapping[str, Any]], *, skip: Sequence[tuple[str, str]] = ()
) -> None:
    """The same rows in each of an agent's six files, but for those to skip."""
    for split, kind in FILES:
        if (split, kind) not in skip:
            write_rows(review_path(eval_dir, agent, split, kind), rows)


def link_published(shared: Path, eval_dir: Path) -> Path:
    """An evaluation folder whose reviews are the published ones; results go elsewhere than the read-only snapshot."""
    eval_dir.mkdir(parents=True, exist_ok=True)
    for split in ("in", "out"):
        name = f"{split}-test_reviews"
        (eval_dir / name).symlink_to(shared / "mmrole_data" / "published" / name)
    return eval_dir
