"""Writes the files that train and test: `python -m data_utils.build DATA_ROOT`.

    python -m data_utils.build DATA_ROOT                     data/train/train_85k.json
    python -m data_utils.build DATA_ROOT --test --out DIR    DIR/{in,out-of}-distribution/<kind>_test.json
    python -m data_utils.build DATA_ROOT --reviews FOLDER    RM_data/{train/RM-train_23k,test/RM-test_320}.json

Training samples come from the in-distribution dialogues, without those that a test sample of data/test was drawn from.
--test builds the samples that data/test names; without its six files, one turn of each out-of-distribution dialogue,
drawn.
--reviews takes the reviews of any judge, as eval/RM_review.sh writes them (<split>-test_reviews/<agent>/*.json).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_utils.build.dialogues import build_tests, build_training
from data_utils.build.reviews import PUBLISHED_VALIDATION, build_reviews, named_function
from data_utils.errors import MMRoleError, run_main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_root", type=Path, metavar="DATA_ROOT", help="the folder that holds dialogues/, profiles/")
    parser.add_argument("--out", type=Path, help="another file than data/train/…; a folder with --test or --reviews")
    parser.add_argument("--extra_root", type=Path, action="append", default=[], help="a further root; repeatable")
    parser.add_argument("--link_images", action="store_true", help="link the further roots' images below DATA_ROOT")
    parser.add_argument(
        "--sane_partner", action="store_true", help="the partner is always the dialogue's other speaker"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--test", action="store_true", help="write test samples")
    what.add_argument("--reviews", type=Path, metavar="FOLDER", help="write reward-model samples from these reviews")
    parser.add_argument("--validation", type=int, default=PUBLISHED_VALIDATION, help="reviews held out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws (%(default)s)")
    parser.add_argument(
        "--review_prompts",
        metavar="MODULE:FUNCTION",
        default="eval.review_prompt:review_prompts",
        help="the function that makes the judge's prompts (%(default)s)",
    )
    options = parser.parse_args(arguments)
    roots = [options.data_root, *options.extra_root]
    if options.reviews:
        prompts = named_function(options.review_prompts)
        out = options.out or options.data_root
        build_reviews(options.reviews, out, prompts, validation=options.validation, seed=options.seed)
    elif options.test:
        if options.out is None:
            fix = "give one; data/test is never overwritten"
            raise MMRoleError("--test needs a folder to write to", None, "--out", fix)
        build_tests(roots, options.out, sane_partner=options.sane_partner, seed=options.seed)
    else:
        build_training(roots, options.out, sane_partner=options.sane_partner, link_images=options.link_images)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
