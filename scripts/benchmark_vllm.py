"""Our engine and vLLM on the same requests and output lengths, in turn, in one run."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from benchmark_generation import load_or_draw, published_texts, rates, time_ours
from benchmark_machine import describe, timed

from data_utils.errors import MMRoleError

FIGURES = ("requests per second", "prompt tokens per second", "written tokens per second", "prefill saved", "seconds")


def run_vllm(options: argparse.Namespace) -> dict[str, Any]:
    """Time both in rounds, print the table, and return the figures."""
    if find_spec("vllm") is None:
        fix = "run it with the Python that bash scripts/vllm_environment.sh prints"
        raise MMRoleError("vLLM is not installed in this environment", None, "benchmark vllm", fix)
    model, tokenizer = load_or_draw(options)
    options = argparse.Namespace(**{**vars(options), "task": options.texts, "sample": False})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = list(published_texts(options, tokenizer, folder))
        if options.checkpoint is None:
            model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
        threads = torch.get_num_threads()
        engine = _start(options.checkpoint or folder / "model", model, options)
        torch.set_num_threads(threads)  # vLLM leaves this process only one thread
        machine = f"{describe(model.device, model.dtype)}, vLLM {_version()}"
        print(f"machine: {machine}")
        print(f"requests: {len(texts)} {options.texts}s, {sum(t.tokens for t in texts):,} tokens to write")
        rounds = [
            {"ours": time_ours(model, tokenizer, texts, options), "vLLM": _time_vllm(engine, texts, model.device)}
            for _ in range(options.rounds)
        ]
    ratios = [turn["vLLM"]["seconds"] / turn["ours"]["seconds"] for turn in rounds]
    figures = {"machine": machine, "rounds": rounds, "ours times vLLM": statistics.median(ratios), "ratios": ratios}
    _print(figures)
    return figures


def _start(checkpoint: Path, model: Any, options: argparse.Namespace) -> Any:
    """Return vLLM's engine, in a separate process (its default); on a CPU with as many threads as ours."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
    settings |= {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    settings |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    return LLM(
        str(checkpoint),
        tokenizer_mode="qwen_vl",
        dtype=str(model.dtype).removeprefix("torch."),
        enforce_eager=options.eager,
        gpu_memory_utilization=options.vllm_memory,
        allowed_local_media_path="/",
        distributed_executor_backend="uni",
        seed=0,
    )


def _time_vllm(engine: Any, texts: list[Any], device: torch.device) -> dict[str, float]:
    from vllm import SamplingParams

    messages = [_messages(text.request) for text in texts]
    # No end token can be generated before the length is reached.
    lengths = [SamplingParams(temperature=0, min_tokens=t.tokens, max_tokens=t.tokens, ignore_eos=True) for t in texts]
    engine.chat(messages[:1], lengths[:1], use_tqdm=False)
    if not engine.reset_prefix_cache():
        raise MMRoleError("vLLM's prefix cache cannot be emptied between the rounds", None, "benchmark vllm")
    seconds, outputs = timed(lambda: engine.chat(messages, lengths), device)
    written = sum(len(output.outputs[0].token_ids) for output in outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    if written != (wanted := sum(text.tokens for text in texts)):
        raise MMRoleError("vLLM generated a wrong number of tokens", f"{written} of {wanted}", "benchmark vllm")
    return {
        **rates(len(outputs), seconds, prompt, written),
        "prefill saved": sum(output.num_cached_tokens for output in outputs) / prompt,
    }


def _messages(request: Any) -> list[dict[str, Any]]:
    parts = [
        {"type": "image_url", "image_url": {"url": Path(element["image"]).resolve().as_uri()}}
        if "image" in element
        else {"type": "text", "text": element["text"]}
        for element in request.query
    ]
    return [{"role": "system", "content": request.system}, {"role": "user", "content": parts}]


def _version() -> str:
    import vllm

    return vllm.__version__


def _print(figures: dict[str, Any]) -> None:
    rounds = figures["rounds"]
    print(f"{'':28}" + "".join(f"{f'ours {i}':>12}{f'vLLM {i}':>12}" for i in range(1, len(rounds) + 1)))
    for name in FIGURES:
        print(f"{name:28}" + "".join(f"{turn['ours'][name]:12,.3f}{turn['vLLM'][name]:12,.3f}" for turn in rounds))
    ratios = ", ".join(f"{ratio:.2f}" for ratio in figures["ratios"])
    print(f"ours: {figures['ours times vLLM']:.2f} times vLLM's requests per second (median of {ratios})")
