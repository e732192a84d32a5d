"""Downloads the data set, its MS-COCO images, or weights: `python -m data_utils.download data|weights --help`.

A file appears under its name only when it is complete. A second run checks the files and fetches only missing or broken
ones. Nothing else in this project downloads anything. `HF_ENDPOINT` names a mirror of the Hugging Face Hub, `COCO_URL`
one of MS-COCO's train2017 folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from data_utils.download.run import WEIGHTS, download_data, download_weights
from data_utils.errors import MMRoleError, run_main


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.download", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(required=True, metavar="data|weights")
    data = commands.add_parser("data", help="the data set and the MS-COCO images it refers to")
    data.add_argument("data_root", type=Path, help="the data root to fill")
    parts = data.add_mutually_exclusive_group()
    parts.add_argument("--no_coco", action="store_true", help="leave out the MS-COCO images")
    parts.add_argument("--only_coco", action="store_true", help="only the MS-COCO images that the data root refers to")
    data.set_defaults(run=download_data, workers=8)
    weights = commands.add_parser("weights", help="checkpoints")
    weights.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(WEIGHTS)} (default: all)")
    weights.add_argument("--out_dir", type=Path, required=True, help="the folder of checkpoint folders")
    weights.set_defaults(run=download_weights, workers=4)
    for command in (data, weights):
        command.add_argument("--revision", default="main", help="a branch, tag or commit of the hub repositories")
        command.add_argument("--workers", type=int, help="files fetched at once (%(default)s)")
        command.add_argument("--attempts", type=int, default=5, help="how often a file is tried (%(default)s)")
    options = parser.parse_args(arguments)
    unknown = [name for name in getattr(options, "names", ()) if name not in WEIGHTS]
    if unknown:
        raise MMRoleError("no such weights", unknown, "the command line", f"choose from {', '.join(WEIGHTS)}")
    if min(options.workers, options.attempts) < 1:
        raise MMRoleError("a number must be at least 1", None, "--workers, --attempts", "give a larger number")
    return options.run(options)


def end_at_once(*_: object) -> None:
    """End the process on Ctrl-C. An exception would wait for threads to finish their files, which can take hours."""
    os.write(2, b"\ninterrupted; finished files are kept, run the same command again to go on\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, end_at_once)
    sys.exit(run_main(main))
