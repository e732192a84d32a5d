"""Times the engine's scheduler alone: an almost free model and very many requests."""

from __future__ import annotations

import base64
import random
import tempfile
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_machine import timed

from qwen_vl import QwenVLConfig, QwenVLForCausalLM, QwenVLTokenizer
from qwen_vl.generation import BatchGenerator, Request

RANKS = 256
REVIEWS = 8


def run_schedule(counts: Sequence[int]) -> dict[str, Any]:
    """Time every count, print the table and return the figures."""
    model, tokenizer = _tiny()
    print(f"{'requests':>10}{'seconds':>10}{'ms each':>10}{'saved':>8}{'peak cache tokens':>20}{'peak Python MiB':>18}")
    rows = []
    for count in counts:
        engine = BatchGenerator(model, tokenizer, max_rows=64, max_batch_tokens=40_000, window=512)
        tracemalloc.start()
        seconds, done = timed(lambda e=engine, n=count: sum(1 for _ in e.run(_requests(n))), model.device)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        assert done == count
        stats = engine.statistics
        cache = stats.peak_cache_tokens
        rows.append({"requests": count, "seconds": seconds, "peak cache tokens": cache, "peak Python MiB": peak})
        each = seconds / count * 1000
        print(f"{count:>10,}{seconds:>10.1f}{each:>10.2f}{stats.prefill_saved:>8.0%}{cache:>20,}{peak:>18.1f}")
    return {"schedule": rows}


def _tiny() -> tuple[QwenVLForCausalLM, QwenVLTokenizer]:
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "qwen.tiktoken"
        lines = [base64.b64encode(bytes([i])) + b" " + str(i).encode() for i in range(RANKS)]
        vocabulary.write_bytes(b"\n".join(lines) + b"\n")
        tokenizer = QwenVLTokenizer(vocabulary)
    visual = {"heads": 1, "image_size": 448, "image_start_id": RANKS + 214, "layers": 1, "mlp_ratio": 1.0}
    visual |= {"output_dim": 128, "patch_size": 14, "width": 16}
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = QwenVLConfig(**sizes, kv_channels=64, vocab_size=512, visual=visual)
    torch.manual_seed(0)
    return QwenVLForCausalLM(config).eval(), tokenizer


def _requests(count: int) -> Iterator[Request]:
    """Return rows of eight that share 200 to 400 tokens, each with 20 to 60 further ones, and 3 to 9 to generate."""
    chooser = random.Random(0)  # noqa: S311 - lengths, not secrets
    for number in range(count):
        if number % REVIEWS == 0:
            common = "".join(chooser.choices("abcdefgh ", k=chooser.randrange(200, 400)))
        own = "".join(chooser.choices("abcdefgh ", k=chooser.randrange(20, 60)))
        limit = chooser.randrange(3, 10)
        yield Request(number, [{"text": common + own}], do_sample=False, max_new_tokens=limit, stop_ids=())
