"""Checks a data root and reports everything that is wrong with it: `python -m data_utils.check DATA_ROOT`.

It checks characters, annotations, dialogues, images, and test, training and reward-model files; missing parts are named
and not checked. Exit status:

    0  nothing is wrong, or warnings and notes only (quirks of the published data are warnings)
    1  errors: what stops training or evaluation, or makes their results wrong
    2  the check could not run: no data root, or a wrong option
    3  no errors, but MS-COCO images are missing, which scripts/download_data.sh fetches
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_utils.check.roots import as_json, as_text, check_roots, exit_status
from data_utils.check.samples import LengthMeter
from data_utils.console import ignore_lost_output
from data_utils.errors import run_main
from data_utils.files import write_text
from data_utils.flag_types import natural, positive
from data_utils.lengths import read_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_root", type=Path, metavar="DATA_ROOT", help="the folder that holds data/, dialogues/, …")
    parser.add_argument("--extra_root", type=Path, action="append", default=[], help="a further root; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there, as JSON")
    parser.add_argument("--decode", action="store_true", help="decode every image that is referred to")
    parser.add_argument("--tokenizer", type=Path, metavar="CHECKPOINT", help="measure training samples in its tokens")
    parser.add_argument("--max_length", type=positive, default=3072, help="tokens the trainer keeps (%(default)s)")
    parser.add_argument("--examples", type=natural, default=5, help="how many to show of each finding (%(default)s)")
    options = parser.parse_args(arguments)
    meter = LengthMeter(read_tokenizer(options.tokenizer), options.max_length) if options.tokenizer else None
    reports = check_roots(
        options.data_root, options.extra_root, decode=options.decode, meter=meter, examples=options.examples
    )
    if options.json:
        write_text(options.json, as_json(reports))
    print(as_text(reports), flush=True)
    return exit_status(reports)


if __name__ == "__main__":
    ignore_lost_output()  # after `| head` the status still counts
    sys.exit(run_main(main))
