"""Writes a small made-up data set in the formats and layout of MMRole-Data: `python -m data_utils.demo OUT_DIR`.

Six characters with profiles, simple pictures with annotations, dialogues of the three kinds, the six test files, a
training file and, given the judge's prompts, a reward-model training file. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_utils.build.reviews import named_function
from data_utils.demo.world import draw_world, write_world
from data_utils.errors import run_main


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_utils.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the data root to write; new or empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--review_prompts",
        metavar="MODULE:FUNCTION",
        help="also write the reward-model file, with this function's prompts: eval.review_prompt:review_prompts",
    )
    options = parser.parse_args(arguments)
    review_prompts = named_function(options.review_prompts) if options.review_prompts else None
    counts = write_world(draw_world(options.seed), options.out_dir, review_prompts)
    print(f"demo world (seed {options.seed}): {', '.join(f'{count} {name}' for name, count in counts.items())}")
    print(f"written to {options.out_dir.resolve()}")


if __name__ == "__main__":
    sys.exit(run_main(main))
