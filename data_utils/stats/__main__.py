"""Writes the data card of a data root, Markdown with tables and plots: `python -m data_utils.stats DATA_ROOT`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_utils.errors import run_main
from data_utils.lengths import read_tokenizer
from data_utils.stats.card import summary
from data_utils.stats.measure import collect, write_card

WEIGHTS = Path(__file__).resolve().parents[2] / "model_weights"
CHECKPOINTS = ("Qwen-VL-Chat", "MMRole-Agent", "MMRole-Eval_RM")


def default_tokenizer() -> Path | None:
    """Return a released checkpoint that has been downloaded, or None; they all have the same tokenizer."""
    folders = [WEIGHTS / name for name in CHECKPOINTS]
    return next((folder for folder in folders if (folder / "qwen.tiktoken").is_file()), None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_utils.stats", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data_root", type=Path, help="the folder that holds dialogues/, profiles/, data/, images/")
    parser.add_argument("--out", type=Path, help="the folder to write to (default: DATA_ROOT/data/card)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="CHECKPOINT",
        help="folder with qwen.tiktoken, to count tokens (default: one of model_weights, if it is there)",
    )
    options = parser.parse_args(arguments)
    checkpoint = options.tokenizer or default_tokenizer()
    tokenizer = read_tokenizer(checkpoint) if checkpoint else None
    if tokenizer is None:
        print(
            f"no tokenizer in {WEIGHTS}, so lengths are in characters; --tokenizer CHECKPOINT gives them in tokens, "
            "or bash scripts/download_weights.sh qwen-vl-chat first"
        )
    card = collect(options.data_root, tokenizer)
    path = write_card(card, options.data_root, options.out or options.data_root / "data" / "card")
    print(summary(card))
    print(f"written to {path.resolve()}")


if __name__ == "__main__":
    sys.exit(run_main(main))
