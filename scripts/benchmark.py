"""Times this project against the released way: the same requests, in one run on one machine.

    python scripts/benchmark.py answer --data_root ../MMRole_dataset --tokenizer model_weights/Qwen-VL-Chat
    python scripts/benchmark.py review --data_root ../MMRole_dataset --tokenizer model_weights/Qwen-VL-Chat
    python scripts/benchmark.py schedule
    .venv-vllm/bin/python scripts/benchmark.py vllm --data_root ../MMRole_dataset --tokenizer model_weights/Qwen-VL-Chat
    python scripts/benchmark.py train --data_root ../MMRole_dataset --size full --use_lora True

`answer` and `review` take the real prompts, force every text to the length of the published one, and print a table of
both ways: requests and tokens per second, prefill saved, rows per step, peak memory, and how far that is from what the
machine's matrix rate and bandwidth allow. With --sample both ways sample, as the published settings do, else both are
greedy. Without --checkpoint the weights are random: `--size small` (8 layers, width 512, the real vocabulary) or
`--size full` (Qwen-VL-Chat's own sizes). A picture that is not there is stood in for by noise of the same cost. `vllm`
gives the same requests and lengths to our engine and to vLLM, in turn; it runs in vLLM's environment, which
`scripts/vllm_environment.sh` makes. `schedule` shows that time grows linearly with the number of requests and memory
not at all. `train` takes real training samples and runs finetune/finetune.py, with the agent's recipe and every further
flag, and beside it the released way: rows padded to the maximum, logits at every position, attention written out.
Start-up and the first step are not counted, and are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data_utils.errors import run_main
from data_utils.files import write_text

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task in ("answer", "review"):
        _add_generation_flags(tasks.add_parser(task, help=f"time the {task}s"))
    _add_vllm_flags(tasks.add_parser("vllm", help="time the engine against vLLM"))
    schedule = tasks.add_parser("schedule", help="time the engine's scheduler over 300, 3,000 and 30,000 requests")
    schedule.add_argument("--requests", type=int, nargs="+", default=[300, 3_000, 30_000])
    schedule.add_argument("--json", type=Path, help="write the figures to this file as well")
    _add_training_flags(tasks.add_parser("train", help="time fine-tuning", allow_abbrev=False))
    options, flags = parser.parse_known_args(argv)
    if flags and options.task != "train":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    options.trainer_flags = flags
    return options


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    parser.description = "Flags that are not listed here are those of finetune/finetune.py."
    flag("--data_root", type=Path, required=True, help="folder of dialogues/, images/, profiles/ and data/")
    flag("--steps", type=int, default=3, help="steps of ours that are timed, after one that is not (%(default)s)")
    flag("--released_steps", type=int, default=1, help="steps of the released way that are timed (%(default)s)")
    flag("--layers", type=int, help="keep only so many layers of the decoder, so that full tuning fits one GPU")
    _add_model_flags(parser)
    parser.set_defaults(device="auto", dtype="auto")


def _add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--texts", choices=["review", "answer"], default="review", help="the texts to generate (%(default)s)")
    flag("--rounds", type=int, default=3, help="rounds in which each of the two is timed (%(default)s)")
    flag("--eager", action="store_true", help="vLLM does not compile the model")
    flag("--vllm_memory", type=float, default=0.5, help="vLLM's share of a GPU's memory (%(default)s)")
    _add_engine_flags(parser)


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--released_requests", type=int, default=6, help="requests that the released way is timed on (%(default)s)")
    flag("--sample", action="store_true", help="sample, as the released settings do (top-p 0.3), instead of greedily")
    _add_engine_flags(parser)


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--data_root", type=Path, required=True, help="folder of data/ and images/")
    flag("--published", type=Path, help="folder of {in,out}-test_{answers,reviews} (<data_root>/published)")
    flag("--agent", default="mmrole-agent", help="the agent whose answers or lengths are used (%(default)s)")
    flag("--rows", type=int, help="rows of the test sets to take, spread over them (all)")
    flag("--max_batch_tokens", type=int)
    flag("--max_rows", type=int)
    flag("--prefill_tokens", type=int)
    flag("--device", default="auto")
    flag("--dtype", default="auto", help="of random weights: float32 on a CPU, bfloat16 on a GPU")
    _add_model_flags(parser)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--checkpoint", type=Path, help="measure this checkpoint instead of random weights")
    flag("--size", choices=["small", "full"], default="small", help="of the random weights (%(default)s)")
    flag("--tokenizer", type=Path, default=ROOT / "model_weights" / "Qwen-VL-Chat", help="folder of qwen.tiktoken")
    flag("--json", type=Path, help="write the figures to this file as well")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark of the command line; print its figures, and write them to a file if asked."""
    options = parse_arguments(argv)
    if options.task == "schedule":
        from benchmark_schedule import run_schedule

        figures = run_schedule(options.requests)
    elif options.task == "vllm":
        from benchmark_vllm import run_vllm

        figures = run_vllm(options)
    elif options.task == "train":
        from benchmark_training import run_training

        figures = run_training(options, options.trainer_flags)
    else:
        from benchmark_generation import run_generation

        figures = run_generation(options)
    if options.json:
        write_text(options.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_main(main))
