"""Compares two judges: the reward model with GPT-4, with people, or with itself.

    python eval/agreement.py reward-model gpt-4         two judges below EVAL_DIR: the released one, and judges/gpt-4
    python eval/agreement.py reward-model other/eval    a folder laid out like EVAL_DIR
    python eval/agreement.py reward-model people.csv    id, agent, metric, score_agent, score_reference

Writes <report_dir>/agreement-<first>-<second>.{md,csv,json,png}. Exit status: 0, or 2 if nothing could be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data_utils.console import ignore_lost_output
from data_utils.errors import MMRoleError, run_main
from data_utils.files import make_folder, write_bytes
from data_utils.layout import RELEASED_JUDGE
from eval.results.judges import (
    PAPER_AGREEMENT,
    Agreement,
    agreement,
    among_people,
    are_people,
    common,
    read_judge,
    read_people,
)
from eval.results.tables import Table, agreement_csv, agreement_tables, markdown_table

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="a judge's name, a folder with a slash in its path, or a CSV of people's scores")
    parser.add_argument("second", help="the other judge")
    parser.add_argument("--eval_dir", type=Path, default=ROOT / "eval", help="the evaluation folder (%(default)s)")
    parser.add_argument("--report_dir", type=Path, help="where the results go (default: EVAL_DIR/report)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Raises:
        MMRoleError: If a judge cannot be read, the two have no review in common, or a file cannot be written.
    """
    options = build_parser().parse_args(arguments)
    (first, one), (second, other) = (read_judge(name, options.eval_dir) for name in (options.first, options.second))
    pairs = common(one, other)
    if not pairs.names:
        raise MMRoleError(
            "the two judges have no review in common",
            f"{len(one)} and {len(other)} reviews",
            f"{options.first}, {options.second}",
            "reviews are matched by agent (its folder's name), row id and metric",
        )
    found = agreement(pairs)
    counts = {"agents": len(pairs.names), "rows": len(pairs.agents), "only_first": pairs.alone[0]}
    counts["only_second"] = pairs.alone[1]
    people = {
        name: among_people(read_people(Path(source)))
        for name, source in ((first, options.first), (second, options.second))
        if are_people(source)
    }
    text = _markdown(first, second, counts, people, agreement_tables(found))
    print(text)
    from eval.results.figures import agreement_png

    folder = options.report_dir or options.eval_dir / "report"
    name = f"agreement-{_plain(first)}-{_plain(second)}"
    make_folder(folder, "the reviews are unchanged")
    write_bytes(folder / f"{name}.md", text.encode("utf-8", errors="backslashreplace"))
    write_bytes(folder / f"{name}.csv", agreement_csv(found).encode())
    write_bytes(folder / f"{name}.json", _json(first, second, counts, people, found).encode())
    write_bytes(folder / f"{name}.png", agreement_png(pairs, first, second))
    print(f"report: {folder}/{name}.md, .csv, .json, .png")
    return 0


def _markdown(
    first: str, second: str, counts: dict[str, int], people: dict[str, tuple[int, float]], tables: Sequence[Table]
) -> str:
    lines = [
        f"# {first} and {second}\n",
        f"{counts['rows']} answers of {counts['agents']} agents were read from both; {counts['only_first']} single "
        f"reviews only by the first, {counts['only_second']} only by the second. The bias is the first "
        "minus the second.\n",
        *(_people_line(name, *found) for name, found in people.items()),
        *([PAPER_AGREEMENT, ""] if RELEASED_JUDGE in (first, second) else []),
    ]
    for table in tables:
        lines += [f"## {table.title}\n", f"{table.note}\n", markdown_table(table)]
    return "\n".join(lines)


def _people_line(name: str, reviews: int, alpha: float) -> str:
    if not reviews:
        return f"{name} has one person's scores for each review, so how far people agree is unknown.\n"
    value = "does not exist: all ratios are the same" if math.isnan(alpha) else f"is {alpha:.3f}"
    return f"{name} has several people's scores for {reviews} reviews: Krippendorff's alpha of their ratios {value}.\n"


def _json(
    first: str,
    second: str,
    counts: dict[str, int],
    people: dict[str, tuple[int, float]],
    found: Sequence[Agreement],
) -> str:
    values = [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in one._asdict().items()}
        for one in found
    ]
    among = {
        name: {"reviews": reviews, "krippendorff_alpha": None if math.isnan(alpha) else alpha}
        for name, (reviews, alpha) in people.items()
    }
    content = {"first": first, "second": second, **counts, "among_people": among, "agreement": values}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


if __name__ == "__main__":
    ignore_lost_output()
    sys.exit(run_main(main))
