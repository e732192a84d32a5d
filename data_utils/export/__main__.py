"""Writes the data for other trainers: `python -m data_utils.export DATA_ROOT --format FORMAT --output DIR`.

    --format llamafactory    LLaMA-Factory: *.jsonl (ShareGPT) and dataset_info.json; train with --dataset_dir DIR
    --format ms-swift        ms-swift: *.jsonl with "messages" and "images"; train with --dataset DIR/train.jsonl
    --format messages        *.jsonl with content parts, as transformers' chat templates, TRL and datasets take them

DIR then holds train.jsonl (the agent's training samples, made from the dialogues as data_utils.build makes them),
rm_train.jsonl and rm_test.jsonl (the reward model's, if DATA_ROOT/RM_data has them) and test.jsonl (the test prompts,
each with its ground truth). docs/other_models.md shows the next steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_utils.errors import run_main
from data_utils.export.formats import FORMATS, SYSTEMS
from data_utils.export.write import export


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_root", type=Path, metavar="DATA_ROOT", help="the folder that holds dialogues/, data/, …")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument("--extra_root", type=Path, action="append", default=[], help="a further root; repeatable")
    parser.add_argument(
        "--system",
        choices=SYSTEMS,
        default=SYSTEMS[0],
        help="system message of training samples: the one that the released trainer uses for all (%(default)s), or the "
        "sample's own, which test prompts always have",
    )
    parser.add_argument(
        "--image_dir", type=Path, help="the image folder on the machine that trains (default: DATA_ROOT/images here)"
    )
    parser.add_argument(
        "--sane_partner", action="store_true", help="the partner is always the dialogue's other speaker"
    )
    options = parser.parse_args(arguments)
    export(
        [options.data_root, *options.extra_root],
        options.output,
        FORMATS[options.format],
        system=options.system,
        image_dir=options.image_dir,
        sane_partner=options.sane_partner,
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
