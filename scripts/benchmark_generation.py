"""The engine against the released way, on the real prompts of the test sets."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_machine import bandwidth, describe, matrix_rate, reset_peak, timed
from PIL import Image
from tqdm import tqdm
from transformers import TopPLogitsWarper

import qwen_vl
from data_utils.errors import MMRoleError
from data_utils.files import read_json
from eval.judging.prompt import is_reviewable, review_prompts
from finetune.report import peak_bytes
from qwen_vl.chat import build_context
from qwen_vl.generation import BatchGenerator, Request

FILES = [
    f"{split}-test_{{kind}}/{{agent}}/{name}_test.json"
    for split in ("in", "out")
    for name in ("comment", "human-role", "inter-role")
]
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 2 * 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "kv_channels": 64,
}
SAMPLING = {"do_sample": True, "top_p": 0.3, "top_k": 0}  # published: Qwen-VL-Chat's generation_config.json
# Standard deviation of the random logits when sampling. At 8 the likeliest token has a probability of 0.58 on average,
# and of more than 0.3 in five draws of six; other random weights would give all ids nearly the same.
SHARPNESS = 8
SMALL_VISION = {"heads": 8, "layers": 6, "width": 256, "output_dim": 512, "mlp_ratio": 4.0}


@dataclass(frozen=True)
class _Text:
    """A request for both ways, and the number of tokens to generate."""

    request: Request
    tokens: int


def run_generation(options: argparse.Namespace) -> dict[str, Any]:
    """Time both ways, print the table and return the figures."""
    model, tokenizer = load_or_draw(options)
    if options.sample and not options.checkpoint:  # the head reads states whose mean square is 1
        model.lm_head.weight.data *= SHARPNESS / (model.config.initializer_range * model.config.hidden_size**0.5)
    print(f"machine: {describe(model.device, model.dtype)}")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {options.checkpoint or options.size + ', random weights'}, {parameters / 1e6:,.0f} M parameters")
    with tempfile.TemporaryDirectory() as folder:
        texts = list(published_texts(options, tokenizer, Path(folder)))
        print(f"requests: {len(texts)}, {sum(t.tokens for t in texts):,} tokens to write")
        released = _time_released(model, tokenizer, texts[:: max(len(texts) // options.released_requests, 1)])
        ours = time_ours(model, tokenizer, texts, options)
    figures = {"ours": ours, "released": released, "machine": describe(model.device, model.dtype)}
    # What the released way would take for all requests: those that it is timed on may be longer or shorter on average.
    whole = ours["prompt tokens"] * released["seconds per prompt token"]
    whole += ours["written tokens"] * released["seconds per written token"]
    figures["released way, seconds for all requests"] = whole
    figures["times the released way"] = whole / ours["seconds"]
    figures["floor"] = _floor(model, ours)
    _print(figures)
    return figures


def load_or_draw(options: argparse.Namespace) -> tuple[qwen_vl.QwenVLForCausalLM, qwen_vl.QwenVLTokenizer]:
    """Return a checkpoint, or a model of the given size with random weights, drawn on its device."""
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if options.checkpoint:
        return qwen_vl.load(options.checkpoint, dtype=options.dtype, device=device)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if str(device).startswith("cuda") else "float32"
    tokenizer = qwen_vl.QwenVLTokenizer.from_pretrained(options.tokenizer)
    config = qwen_vl.QwenVLConfig()
    if options.size == "small":
        config = qwen_vl.QwenVLConfig(**SMALL, visual={**config.visual, **SMALL_VISION})
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(getattr(torch, dtype))
        model = qwen_vl.QwenVLForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model, tokenizer


def published_texts(options: argparse.Namespace, tokenizer: qwen_vl.QwenVLTokenizer, folder: Path) -> Iterator[_Text]:
    """Return the requests, each with the length of its published text; `folder` is for substitute pictures."""
    published = options.published or options.data_root / "published"
    kind = "reviews" if options.task == "review" else "answers"
    files = [published / name.format(kind=kind, agent=options.agent) for name in FILES]
    rows = [row for file in files if file.is_file() for row in read_json(file)]
    if not rows:
        fix = "give the folder with --published, and an agent that is in it with --agent"
        raise MMRoleError("no published texts to take prompts and lengths from", published, "--published", fix)
    rows = [row for row in rows if is_reviewable(row)]
    for row in rows[:: max(len(rows) // options.rows, 1)][: options.rows] if options.rows else rows:
        image = options.data_root / "images" / row["image"]
        image = image if image.is_file() else _stand_in(folder, row["image"])
        if options.task == "answer":
            prompt, text = row["conversations"][0]["value"], row["conversations"][1]["answer"]
            yield _forced(row["id"], image, row["system"], prompt, text, tokenizer, options.sample)
            continue
        for metric, (system, prompt) in review_prompts(row).items():
            text = row["rm_review"][metric]["review"]
            yield _forced(f"{row['id']} {metric}", image, system, prompt, text, tokenizer, options.sample)


def _forced(name: str, image: Path, system: str, prompt: str, text: str, tokenizer: Any, sample: bool) -> _Text:
    tokens = len(tokenizer.encode_plain(text)) + 1  # and the end
    query = [{"image": image}, {"text": prompt}]
    chosen = SAMPLING if sample else {"do_sample": False}
    return _Text(Request(name, query, system, max_new_tokens=tokens, stop_ids=(), **chosen), tokens)


def _stand_in(folder: Path, name: str) -> Path:
    """Return a noise picture for a missing one: one file for each, because each is encoded once."""
    file = folder / (name.replace("/", "_").rpartition(".")[0] + ".png")
    if not file.is_file():
        noise = np.random.default_rng(len(name)).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(file)
    return file


def rates(requests: int, seconds: float, prompt_tokens: int, written_tokens: int) -> dict[str, float]:
    """Return the figures that every side of a comparison has."""
    return {
        "requests": requests,
        "seconds": seconds,
        "prompt tokens": prompt_tokens,
        "written tokens": written_tokens,
        "requests per second": requests / seconds,
        "prompt tokens per second": prompt_tokens / seconds,
        "written tokens per second": written_tokens / seconds,
    }


def time_ours(model: Any, tokenizer: Any, texts: list[_Text], options: argparse.Namespace) -> dict[str, float]:
    """Time the engine with empty caches."""
    limits = {name: getattr(options, name) for name in ("max_batch_tokens", "max_rows", "prefill_tokens")}
    engine = BatchGenerator(model, tokenizer, **limits)
    list(engine.run([text.request for text in texts[:1]]))  # warm-up: kernels are chosen at their first call
    engine = BatchGenerator(model, tokenizer, **limits)
    reset_peak(model.device)

    def work() -> list[Any]:
        return list(tqdm(engine.run(t.request for t in texts), total=len(texts), desc="ours", disable=None))

    seconds, results = timed(work, model.device)
    errors = [result.error for result in results if result.error]
    if errors:
        raise MMRoleError("some requests failed, so their time means nothing", errors[0], "benchmark")
    stats = engine.statistics
    prompt, written = sum(r.prompt_tokens for r in results), sum(len(r.token_ids) for r in results)
    return {
        **rates(len(results), seconds, prompt, written),
        "prefill saved": stats.prefill_saved,
        "rows per step": stats.mean_rows,
        "images encoded": stats.images,
        "peak memory GiB": peak_bytes(model.device) / 2**30,
        "prefilled tokens": stats.prefilled_tokens,
        "steps": stats.steps,
        "tokens read": stats.read_tokens,
        "peak cache tokens": stats.peak_cache_tokens,
    }


@torch.inference_mode()
def _time_released(model: Any, tokenizer: Any, texts: list[_Text]) -> dict[str, float]:
    """Time one request at a time: full prefill, logits at every position, a cache that is copied to grow."""
    _answer_released(model, tokenizer, _Text(texts[0].request, 2))
    reset_peak(model.device)
    prefill = decode = 0.0
    prompt = written = 0
    for text in tqdm(texts, desc="released way", disable=None):
        first, rest, length = _answer_released(model, tokenizer, text)
        prefill, decode, prompt, written = prefill + first, decode + rest, prompt + length, written + text.tokens
    seconds = prefill + decode
    return {
        **rates(len(texts), seconds, prompt, written),
        "prefill saved": 0.0,
        "rows per step": 1.0,
        "images encoded": len(texts),
        "peak memory GiB": peak_bytes(model.device) / 2**30,
        "seconds per prompt token": prefill / prompt,
        "seconds per written token": decode / written,
    }


def _answer_released(model: Any, tokenizer: Any, text: _Text) -> tuple[float, float, int]:
    """Return the seconds of prefill and of decoding, and the prompt's length."""
    request = text.request
    context = build_context(tokenizer, request.query, [], request.system)
    ids = torch.tensor([context.ids], device=model.device)

    def prefill() -> Any:
        pixels = qwen_vl.QwenVLImageProcessor().load_all(context.images).to(model.device)
        return model(ids, pixel_values=pixels, use_cache=True)  # logits at all positions

    def decode() -> None:
        logits, cache = out.logits, out.past_key_values
        for _ in range(text.tokens - 1):
            token = _next_released(logits[:, -1], request)
            token.item()  # the released loop looks at every token
            logits = model(token, past_key_values=cache, use_cache=True).logits

    first, out = timed(prefill, model.device)
    return first, timed(decode, model.device)[0], len(context.ids)


def _next_released(logits: torch.Tensor, request: Request) -> torch.Tensor:
    """Return the next token (1, 1) of logits (1, V) as `generate()` chooses it."""
    if not request.do_sample:
        return logits.argmax(-1, keepdim=True)
    kept = TopPLogitsWarper(top_p=request.top_p)(None, logits.float())
    return torch.multinomial(kept.softmax(-1), 1)


def _floor(model: Any, ours: dict[str, float]) -> dict[str, float]:
    """Return the least seconds on this machine: prefill at its matrix rate, decoding at its bandwidth."""
    rate, speed = matrix_rate(model.device, model.dtype), bandwidth(model.device)
    layers = sum(p.numel() for p in model.transformer.h.parameters())
    vision = sum(p.numel() for p in model.transformer.visual.transformer.parameters())
    patches = (model.config.visual["image_size"] // model.config.visual["patch_size"]) ** 2
    prefill = 2 * (layers * ours["prefilled tokens"] + vision * patches * ours["images encoded"]) / rate
    weights = (layers + model.lm_head.weight.numel()) * model.dtype.itemsize
    config = model.config
    token = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize  # its keys and values
    matrices = 2 * (layers + model.lm_head.weight.numel()) * ours["written tokens"] / rate
    decode = max((weights * ours["steps"] + token * ours["tokens read"]) / speed, matrices)
    return {
        "matrix TFLOP/s": rate / 1e12,
        "bandwidth GB/s": speed / 1e9,
        "prefill seconds": prefill,
        "decode seconds": decode,
        "share of the floor": (prefill + decode) / ours["seconds"],
    }


def _print(figures: dict[str, Any]) -> None:
    names = ["requests", "seconds", "prompt tokens", "written tokens", "requests per second"]
    names += ["prompt tokens per second", "written tokens per second"]
    names += ["prefill saved", "rows per step", "images encoded", "peak memory GiB"]
    print(f"\n{'':28}{'released way':>14}{'ours':>14}")
    for name in names:
        print(f"{name:28}{figures['released'][name]:>14,.2f}{figures['ours'][name]:>14,.2f}")
    first, rest = (1000 * figures["released"][f"seconds per {name} token"] for name in ("prompt", "written"))
    whole, times = figures["released way, seconds for all requests"], figures["times the released way"]
    print(
        f"\nreleased way: {first:.2f} ms a prompt token, {rest:.1f} ms a written one; {whole:,.0f} s for all requests"
    )
    print(f"ours: {times:.1f} times the released way's requests per second")
    floor = figures["floor"]
    print(
        f"floor: {floor['prefill seconds']:.2f} s prefill at {floor['matrix TFLOP/s']:.2f} TFLOP/s and "
        f"{floor['decode seconds']:.2f} s decoding at {floor['bandwidth GB/s']:.0f} GB/s, "
        f"{floor['share of the floor']:.0%} of our time"
    )
