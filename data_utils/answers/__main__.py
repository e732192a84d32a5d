"""Writes finished answers of another tool as the published files, so that they can be reviewed.

    python -m data_utils.answers DATA_ROOT --answers FILE.jsonl --agent NAME

Each line of the file is {"id": ..., "answer": ...}, with the id of a test sample. If ids are missing, repeated or
unknown, they are listed and nothing is written; --partial leaves out the samples without an answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_utils.answers.files import write_answers
from data_utils.errors import run_main

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("data_root", type=Path, help="holds data/test/")
    flag("--answers", type=Path, required=True, help="JSON lines with id and answer")
    flag("--agent", required=True, help="folder name of the answers")
    flag("--eval_dir", type=Path, default=ROOT / "eval", help="folder of the answers (%(default)s)")
    flag("--partial", action="store_true", help="leave out samples without an answer")
    flag("--overwrite", action="store_true", help="replace answers that exist")
    options = parser.parse_args(argv)
    written = write_answers(
        options.data_root,
        options.answers,
        options.agent,
        options.eval_dir,
        partial=options.partial,
        overwrite=options.overwrite,
    )
    for path, count in written.items():
        print(f"{path}: {count} answers")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
