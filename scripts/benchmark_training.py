"""Fine-tuning against the released way, on the same real samples: padded to the maximum with all logits, or packed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_generation import load_or_draw
from benchmark_machine import describe, matrix_rate, peak_bytes, reset_peak, synchronize
from torch.utils.data import DataLoader, Sampler

from data_utils.errors import MMRoleError
from data_utils.files import read_json, write_json
from data_utils.roots import DataRoots
from data_utils.samples import training_samples
from finetune.data import PackedCollator, PaddedCollator, SupervisedDataset
from finetune.report import DENSE_BFLOAT16, model_flops

WAYS = ("released", "ours")
LORA_TARGETS = ["c_attn", "attn.c_proj", "w1", "w2"]
SPREAD = 37  # every so many samples of the data are taken, so that all lengths and kinds occur


def run_training(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs each way in a process of its own, so that their peaks of memory are apart; prints and gives the figures."""
    if options.way:
        return _train(options)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        write_json(rows, list(islice(_samples(options), options.samples)))
        figures = {way: _child(way, rows, folder, arguments) for way in WAYS}
    _print(figures)
    return figures


def _samples(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Real training samples whose image is there, spread over the data."""
    there = (
        row
        for row in training_samples(DataRoots([options.data_root]))
        if (options.data_root / "images" / row["image"]).is_file()
    )
    return islice(there, 0, None, SPREAD)


def _child(way: str, rows: Path, folder: str, arguments: Sequence[str]) -> dict[str, Any]:
    out = Path(folder) / f"{way}.json"
    own = ["--way", way, "--rows_file", str(rows), "--json", str(out)]
    command = [sys.executable, str(Path(__file__).with_name("benchmark.py")), *arguments, *own]
    if subprocess.run(command, check=False).returncode:  # noqa: S603 - this very script
        raise MMRoleError(
            f"the {way} way did not come to its end (its own lines above say why)", way, "benchmark train"
        )
    return read_json(out)


class _InOrder(Sampler[list[int]]):
    """Micro-batches of the samples in their order, round and round."""

    def __init__(self, count: int, size: int, batches: int) -> None:
        self.count, self.size, self.batches = count, size, batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.batches):
            yield [(batch * self.size + i) % self.count for i in range(self.size)]

    def __len__(self) -> int:
        return self.batches


def _train(options: argparse.Namespace) -> dict[str, Any]:
    released = options.way == "released"
    model, tokenizer = load_or_draw(options)
    prepare(model, options)
    rows = read_json(options.rows_file)
    data = SupervisedDataset(rows, tokenizer, data_root=options.data_root, max_length=options.max_length)
    collate = PaddedCollator(tokenizer.pad_token_id, options.max_length) if released else PackedCollator()
    loader = DataLoader(
        data,
        batch_sampler=_InOrder(len(rows), options.micro_batch, options.steps + 1),
        collate_fn=collate,
        num_workers=0 if released else options.workers,
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, betas=(0.9, 0.95))
    loss_of = _released_loss if released else _our_loss
    waited = total = 0.0
    counts = {"samples": 0, "tokens": 0, "positions": 0, "supervised": 0, "flops": 0.0}
    batches, step, losses = iter(loader), 0, []
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        mid = time.perf_counter()
        losses.append(_step(model, optimizer, batch, loss_of))
        if step:  # the first one chooses kernels and makes the optimizer's state
            waited, total = waited + mid - start, total + time.perf_counter() - start
            _count(counts, batch, model, options)
        else:
            reset_peak(model.device)
        step += 1
    return _figures(model, options, counts, waited, total, losses)


def prepare(model: Any, options: argparse.Namespace) -> None:
    """What trains, as the released scripts say: the decoder and the resampler, or LoRA."""
    model.train()
    if options.layers:
        del model.transformer.h[options.layers :]
        model.config.num_hidden_layers = len(model.transformer.h)
    model.requires_grad_(True)
    model.transformer.visual.requires_grad_(False)
    if options.lora:
        from peft import LoraConfig, inject_adapter_in_model

        model.requires_grad_(False)
        lora = LoraConfig(r=64, lora_alpha=16, lora_dropout=0.05, target_modules=LORA_TARGETS)
        inject_adapter_in_model(lora, model)
        model.enable_input_require_grads()
    else:
        model.transformer.visual.attn_pool.requires_grad_(True)
    if not options.no_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _step(model: Any, optimizer: Any, batch: dict[str, Any], loss_of: Any) -> float:
    batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "ids"}
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronize(model.device)
    return loss.item()


def _our_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return model(**batch, loss_only=True).loss


def _released_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """All positions' logits, and cross-entropy over them."""
    labels = batch.pop("labels")
    logits = model(**batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _count(counts: dict[str, float], batch: dict[str, Any], model: Any, options: argparse.Namespace) -> None:
    lengths = batch.get("segments") or batch["attention_mask"].sum(-1).tolist()
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    counts["samples"] += len(lengths)
    counts["tokens"] += sum(lengths)
    counts["positions"] += batch["input_ids"].numel()
    counts["supervised"] += supervised
    counts["flops"] += model_flops(
        model.config,
        tokens=sum(lengths),
        squares=sum(length**2 for length in lengths),
        supervised=supervised,
        images=len(batch.get("pixel_values", ())),
        lora=options.lora,
    )


def _figures(
    model: Any, options: argparse.Namespace, counts: dict[str, float], waited: float, total: float, losses: list[float]
) -> dict[str, Any]:
    figures = {
        "machine": describe(model.device, model.dtype),
        "samples per second": counts["samples"] / total,
        "tokens per second": counts["tokens"] / total,
        "supervised tokens per second": counts["supervised"] / total,
        "padding share": 1 - counts["tokens"] / counts["positions"],
        "share of time waiting for data": waited / total,
        "peak memory GiB": peak_bytes(model.device) / 2**30,
        "model TFLOP/s": counts["flops"] / total / 1e12,
        "share of the measured matrix rate": counts["flops"] / total / matrix_rate(model.device, model.dtype),
        "losses": losses,
    }
    if model.device.type == "cuda":
        name = torch.cuda.get_device_name(model.device)
        peak = next((rate for card, rate in DENSE_BFLOAT16.items() if card in name), None)
        if peak:
            figures["MFU (datasheet)"] = counts["flops"] / total / peak
    return figures


def _print(figures: dict[str, dict[str, Any]]) -> None:
    print(f"machine: {figures['ours']['machine']}")
    print(f"\n{'':36}{'released way':>14}{'ours':>14}")
    for name, value in figures["ours"].items():
        if isinstance(value, float):
            print(f"{name:36}{figures['released'][name]:>14,.3f}{value:>14,.3f}")
    speed, memory = (figures["ours"][n] / figures["released"][n] for n in ("samples per second", "peak memory GiB"))
    print(f"\nours: {speed:.2f} times the released way's samples per second, {memory:.0%} of its peak memory")
    gap = max(abs(a - b) for a, b in zip(figures["ours"]["losses"], figures["released"]["losses"], strict=True))
    print(f"losses of the steps: the largest difference is {gap:.1e}")
    print(json.dumps({way: [round(x, 4) for x in figures[way]["losses"]] for way in WAYS}))
