"""The product's trainer against the released way, on the same real samples, each in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_generation import load_or_draw
from benchmark_machine import describe, synchronize

from data_utils.errors import MMRoleError
from data_utils.files import read_json, write_json
from data_utils.roots import DataRoots
from data_utils.samples import training_samples
from finetune.arguments import Options, parse_arguments
from finetune.data import PaddedCollator, SupervisedDataset
from finetune.model import load_model
from finetune.report import TRAINING, Throughput, model_flops, peak_bytes
from qwen_vl import QwenVLTokenizer
from qwen_vl.loss import IGNORED

TRAINER = Path(__file__).resolve().parents[1] / "finetune" / "finetune.py"
SPREAD = 37  # step between the samples, so that all lengths and kinds occur
RATES = ("samples_per_second", "tokens_per_second", "supervised_tokens_per_second", "model_tflops_per_second")
# The paper's recipe in small steps. The released way's loss is a mean over a micro-batch; so that of both is.
DEFAULTS = {
    "recipe": "agent",
    "per_device_train_batch_size": 2,
    "global_batch_size": 8,
    "loss_group": "micro",
    "gradient_checkpointing": True,
    "bf16": torch.cuda.is_available(),
    "save_strategy": "no",
    "resume_save_steps": 0,
    "sequential": True,
    "disable_tqdm": True,
}


def run_training(options: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """Times both ways, prints a table and returns the figures.

    Args:
        options: The benchmark's flags.
        flags: The trainer's, after `DEFAULTS`.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = options.checkpoint
        if base is None or options.layers:
            base = Path(folder) / "Qwen-VL-Chat"
            _alone(_write_base, options, base)
        places = {
            "model_name_or_path": base,
            "data_path": Path(folder) / "train.json",
            "data_root": options.data_root,
            "output_dir": Path(folder) / "out",
            "max_steps": options.steps + 1,
        }
        given = [word for name, value in (DEFAULTS | places).items() for word in (f"--{name}", str(value))]
        words = [*given, *flags]
        size = parse_arguments(words)[0].training.samples_per_step
        write_json(places["data_path"], _samples(options.data_root, size))
        ours = _ours(words, places["output_dir"])
        figures = {"released": _alone(_released, words, options.released_steps), "ours": ours}
    _print(figures)
    return figures


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function returns in a process of its own, which keeps no memory and shares no peak."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            what = "a process of the benchmark was killed, probably because memory ran out"
            fix = "give --per_device_train_batch_size 1, a smaller --model_max_length, or --layers"
            raise MMRoleError(what, function.__name__.strip("_"), "benchmark train", fix) from error


def _write_base(options: argparse.Namespace, folder: Path) -> None:
    """Writes the checkpoint that both ways start from, with as many layers as asked for."""
    model, tokenizer = load_or_draw(options)
    if options.layers:
        del model.transformer.h[options.layers :]
        model.config.num_hidden_layers = len(model.transformer.h)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _samples(data_root: Path, count: int) -> list[dict[str, Any]]:
    """Returns real training samples whose picture is there, spread over the data."""
    there = (row for row in training_samples(DataRoots([data_root])) if (data_root / "images" / row["image"]).is_file())
    rows = list(islice(there, 0, count * SPREAD, SPREAD))
    if len(rows) < count:
        fix = "give a smaller --global_batch_size, or download more pictures"
        raise MMRoleError("too few samples whose picture is there", f"{len(rows)} of {count}", data_root, fix)
    return rows


def _ours(words: list[str], output: Path) -> dict[str, Any]:
    """Runs the trainer; every step trains the same samples, so that a step's tokens per second say its seconds."""
    began = time.perf_counter()
    if subprocess.run([sys.executable, str(TRAINER), *words], check=False).returncode:  # noqa: S603 - our trainer
        raise MMRoleError("the trainer failed (its own lines above say why)", None, "benchmark train")
    total = time.perf_counter() - began
    report = read_json(output / TRAINING)
    whole = report["throughput"]
    seconds = [whole["tokens"] / whole["steps"] / entry["tokens_per_second"] for entry in report["log"]]
    faster = whole["seconds"] / len(seconds) / (sum(seconds[1:]) / len(seconds[1:]))
    return {
        **{name: whole[name] * faster for name in RATES},
        "padding_share": whole["padding_share"],
        "waiting_for_data_share": whole["waiting_for_data_share"],
        "peak_memory_gib": report["peak_memory_gib"],
        "seconds_timed": sum(seconds[1:]),
        "seconds_of_first_step": seconds[0],
        "seconds_outside_steps": total - whole["seconds"],
        "first_loss": report["log"][0]["loss"],
    }


# ---- the released way


def _released(words: list[str], steps: int) -> dict[str, Any]:
    """Trains as the released code does: rows padded to the maximum, logits at every position, attention written out.

    It starts from the same model in the same precision, after a micro-batch that is not timed.
    """
    began = time.perf_counter()
    warnings.simplefilter("ignore", FutureWarning)
    options = parse_arguments(words)[0]
    training = options.training
    model = _prepared(options)
    tokenizer = QwenVLTokenizer.from_pretrained(options.model.model_name_or_path)
    length, micro = training.model_max_length, training.per_device_train_batch_size
    rows = read_json(options.data.data_path)
    data = SupervisedDataset(rows, tokenizer, data_root=options.data.data_root, max_length=length)
    collate = PaddedCollator(tokenizer.eod_id, length)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = training.adam_beta1, training.adam_beta2
    optimizer = torch.optim.AdamW(trained, training.learning_rate, betas, weight_decay=training.weight_decay)
    count, losses = Throughput(), []
    _train(model, collate([data[i] for i in range(micro)]), options)
    optimizer.zero_grad()
    synchronize(model.device)
    start = time.perf_counter()
    for _ in range(steps):
        loss = 0.0
        for first in range(0, len(rows), micro):
            fetched = time.perf_counter()
            batch = collate([data[i] for i in range(first, first + micro)])
            count.waiting += time.perf_counter() - fetched
            loss += _train(model, batch, options, micro / len(rows)) * micro / len(rows)
            _count(count, batch, model, options)
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    synchronize(model.device)
    count.steps, count.seconds = steps, time.perf_counter() - start
    whole = count.summary()
    return {
        **{name: whole[name] for name in (*RATES, "padding_share", "waiting_for_data_share")},
        "peak_memory_gib": round(peak_bytes(model.device) / 2**30, 3),
        "seconds_timed": count.seconds,
        "seconds_outside_steps": start - began,
        "first_loss": losses[0],
        "machine": describe(model.device, torch.bfloat16 if training.bf16 else model.dtype),
    }


def _prepared(options: Options) -> Any:
    """Returns the trainer's model with attention written out."""
    model = load_model(options)
    model.set_attn_implementation("eager")
    if options.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(options.training.device).train()


def _train(model: Any, batch: dict[str, Any], options: Options, share: float = 1.0) -> float:
    """Adds the gradients of a micro-batch's loss, and returns the loss."""
    device = model.device
    batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    labels = batch.pop("labels")
    with torch.autocast(device.type, torch.bfloat16, enabled=options.training.bf16):
        logits = model(**batch, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
    (loss * share).backward()
    return loss.item()


def _count(count: Throughput, batch: dict[str, Any], model: Any, options: Options) -> None:
    lengths = batch["attention_mask"].sum(-1).tolist()
    supervised = int((batch["labels"][:, 1:] != IGNORED).sum())
    count.samples += len(lengths)
    count.tokens += sum(lengths)
    count.positions += batch["input_ids"].numel()
    count.supervised += supervised
    count.flops += model_flops(
        model.config,
        tokens=sum(lengths),
        squares=sum(length**2 for length in lengths),
        supervised=supervised,
        images=len(batch.get("pixel_values", ())),
        lora=options.training.use_lora,
    )


def _print(figures: dict[str, dict[str, Any]]) -> None:
    released, ours = figures["released"], figures["ours"]
    print(f"machine: {released['machine']}")
    print(f"\n{'':32}{'released way':>14}{'ours':>14}")
    for name, value in ours.items():
        other = f"{released[name]:>14,.3f}" if name in released else f"{'':14}"
        print(f"{name.replace('_', ' '):32}{other}{value:>14,.3f}")
    speed, memory = (ours[name] / released[name] for name in ("samples_per_second", "peak_memory_gib"))
    print(f"\nours: {speed:.2f} times the released way's samples per second, {memory:.0%} of its peak memory")
    print(f"loss of the first step: the difference is {abs(ours['first_loss'] - released['first_loss']):.1e}")
