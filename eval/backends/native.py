"""Qwen-VL in this process: all prompts through the batching engine."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from data_utils.errors import MMRoleError, four_parts
from data_utils.files import read_json
from data_utils.flag_types import positive
from eval.backends.backend import Completion, Decoding, Prompt
from qwen_vl.checkpoint import (
    GENERATION_CONFIG,
    CheckpointError,
    adapter_base,
    checkpoint_fingerprint,
    checkpoint_problems,
    is_adapter,
    weight_problems,
)
from qwen_vl.sampling_params import SamplingSettings, check_limit, unknown_settings

if TYPE_CHECKING:
    from qwen_vl import QwenVLForCausalLM, QwenVLTokenizer, generation

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors names them


class Backend:
    """Completes prompts with a checkpoint that `qwen_vl.load` reads, which is loaded for the first prompt.

    Args:
        options: The flags. Several workers on one machine get a `device` each and their number as `workers`, by which
            they divide the memory of a CPU.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.model_path = Path(options.model_path)
        self._workers = getattr(options, "workers", 1)
        self._engine: Any = None

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Add the flags of this backend; the released ones keep their names."""
        flag = parser.add_argument
        flag("--use_lora", action="store_true", help="the checkpoint must be a LoRA adapter (default: detected)")
        flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (%(default)s)")
        flag(
            "--device_map",
            choices=["auto"],
            help="auto: spread a model that fits on no GPU over GPUs, memory and disk; with one process and one text "
            "at a time",
        )
        flag("--quantization", choices=["4bit", "8bit"], help="weights in bitsandbytes' 4 or 8 bits (as stored)")
        flag("--dtype", default="auto", choices=["auto", *_DTYPES.values()], help="(%(default)s: as stored)")
        flag(
            "--batch_size",
            type=positive,
            help="texts written at once by each process (512 on a GPU, 256 on a CPU). Does not change them in float32; "
            "in bfloat16 batches round differently, and 1, which is slow, gives exactly the texts of chat()",
        )
        flag("--max_batch_tokens", type=positive, help="tokens held at once by each process (default: as fits)")

    def problems(self) -> list[MMRoleError]:
        """Return the problems of device and checkpoint that show without using or loading them."""
        problems = [*device_problems(self._options.device), *self._flag_problems()]
        incomplete = four_parts(checkpoint_problems(self.model_path, use_lora=self._options.use_lora))
        if incomplete:
            return [*problems, *incomplete]
        try:
            damaged = four_parts(weight_problems(self.model_path))
            problems += damaged
            problems += generation_problems(
                self.model_path,
                Decoding.of(self._options),
                retried=bool(getattr(self._options, "retries", 0)),
                batched=not self._one_by_one,
            )
            if not damaged:
                self.identity()
        except (MMRoleError, CheckpointError) as error:
            problems += four_parts([error])
        return problems

    def identity(self) -> dict[str, Any]:
        """Return the checkpoint's fingerprint and the other choices that change texts."""
        choices = {"batch_size": self._options.batch_size, "quantization": self._options.quantization}
        chosen = {name: value for name, value in choices.items() if value}
        return {"model": self._fingerprint, "dtype": self._dtype, **chosen}

    def describe(self) -> dict[str, Any]:
        """Return the checkpoint, its fingerprint, dtype and base."""
        base = {"base model": str(adapter_base(self.model_path))} if is_adapter(self.model_path) else {}
        place = {"model at": str(self.model_path.resolve()), "model fingerprint": self._fingerprint}
        return {**place, "dtype of the texts": self._dtype, **base}

    def devices(self, processes: int | None) -> list[str]:
        """Return a GPU for each worker, or the CPU for all."""
        import torch

        device = self._options.device
        if self._options.device_map:
            if (processes or 1) > 1:
                fix = "leave out PROCESSES, or --device_map where a GPU holds the model"
                raise MMRoleError("--device_map means one process", f"{processes} processes", "PROCESSES", fix)
            return [device]
        gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
        if not gpus:
            return [device] * (processes or 1)
        if (processes or 1) > gpus:
            fix = "set PROCESSES to the number of GPUs, or run on the CPU with --device cpu"
            what = "there are more processes than GPUs"
            raise MMRoleError(what, f"{processes} processes, {gpus} GPU(s)", "PROCESSES", fix)
        return [device] if (processes or gpus) == 1 else [f"cuda:{number}" for number in range(processes or gpus)]

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Completion]:
        """Yield one completion per prompt, as they finish.

        An unreadable picture or a prompt that is too long becomes a completion with an error.

        Raises:
            MMRoleError: If the checkpoint cannot be loaded.
        """
        engine = self._load()
        for result in engine.run(_request(prompt) for prompt in prompts):
            yield Completion(result.id, result.text, result.error)

    def summary(self) -> str:
        """Return device, dtype and sizes of the engine."""
        if self._engine is None:
            return ""
        model = self._engine.model
        dtype = str(model.dtype).removeprefix("torch.")
        if isinstance(self._engine, OneByOne):
            places = sorted({str(place) for place in getattr(model, "hf_device_map", {"": model.device}).values()})
            return f"{' and '.join(places)}, {dtype}, one text at a time"
        engine = self._engine
        return f"{model.device}, {dtype}, up to {engine.max_rows} texts and {engine.max_batch_tokens:,} tokens at once"

    @property
    def _one_by_one(self) -> bool:
        return self._options.batch_size == 1 or self._options.device_map is not None

    def _flag_problems(self) -> list[MMRoleError]:
        """Return contradictory flags, and flags that need a package which is not installed."""
        options, problems = self._options, []
        for name, package in (("device_map", "accelerate"), ("quantization", "bitsandbytes")):
            if getattr(options, name) and not find_spec(package):
                what, fix = (
                    f"--{name} needs a package that is not installed",
                    f"pip install {package}, or leave it out",
                )
                problems.append(MMRoleError(what, package, f"--{name}", fix))
        if options.device_map and (options.batch_size or 1) > 1:
            fix = "leave out --batch_size: a model over several devices writes one text at a time"
            what = "the batching engine needs the whole model on one device"
            problems.append(MMRoleError(what, options.batch_size, "--batch_size", fix))
        if options.device_map and options.device != "auto":
            fix = "leave out one of them"
            problems.append(MMRoleError("--device_map chooses the devices", options.device, "--device", fix))
        return problems

    @cached_property
    def _fingerprint(self) -> str:
        return checkpoint_fingerprint(self.model_path)

    @cached_property
    def _dtype(self) -> str:
        return stored_dtype(self.model_path) if self._options.dtype == "auto" else self._options.dtype

    def _load(self) -> generation.BatchGenerator | OneByOne:
        if self._engine is None:
            import qwen_vl  # torch and transformers take seconds to import, so only when they are needed
            from qwen_vl.generation import BatchGenerator

            options = self._options
            if self._workers > 1:  # the parent shows a bar
                from transformers.utils.logging import disable_progress_bar

                disable_progress_bar()
            try:
                model, tokenizer = qwen_vl.load(
                    self.model_path,
                    dtype=options.dtype,
                    device=options.device,
                    device_map=options.device_map,
                    quantization=options.quantization,
                )
                if self._one_by_one:
                    self._engine = OneByOne(model, tokenizer)
                    return self._engine
                self._engine = BatchGenerator(
                    model, tokenizer, max_batch_tokens=options.max_batch_tokens, max_rows=options.batch_size
                )
            except Exception as error:
                raise self._unloadable(error) from error
            if model.device.type == "cpu" and options.max_batch_tokens is None:
                # The workers of a machine share its free memory.
                self._engine.max_batch_tokens = max(self._engine.max_batch_tokens // self._workers, 1)
        return self._engine

    def _unloadable(self, error: Exception) -> MMRoleError:
        clear = isinstance(error, ValueError | OSError | RuntimeError)  # their messages explain the problem
        text = str(error) if clear and str(error) else f"{type(error).__name__}: {error}"
        return MMRoleError(
            f"the checkpoint cannot be loaded: {text}",
            f"device {self._options.device}, dtype {self._options.dtype}",
            self.model_path,
            "fetch the folder again (see model_weights/README.md), or check --device and --dtype",
        )


class OneByOne:
    """Completes requests one by one with `chat()`: slow, and in bfloat16 without the different rounding of batches.

    Args:
        model: In eval mode.
        tokenizer: The checkpoint's.
    """

    def __init__(self, model: QwenVLForCausalLM, tokenizer: QwenVLTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def run(self, requests: Iterable[generation.Request]) -> Iterator[generation.Result]:
        """Yield one result per request, in their order."""
        from qwen_vl.generation import Result

        for request in requests:
            names = ("do_sample", "temperature", "top_p", "max_new_tokens")
            settings = {name: value for name in names if (value := getattr(request, name)) is not None}
            try:
                text, _ = self.model.chat(
                    self.tokenizer, request.query, system=request.system, seed=request.seed, **settings
                )
                yield Result(request.id, text)
            except (ValueError, TypeError, OSError, RuntimeError) as error:  # per-sample boundary
                yield Result(request.id, "", f"{type(error).__name__}: {error}")


def _request(prompt: Prompt) -> generation.Request:
    from qwen_vl.generation import Request

    image = [] if prompt.image is None else [{"image": prompt.image}]
    decoding = prompt.decoding
    return Request(
        id=prompt.id,
        query=[*image, {"text": prompt.text}],
        system=[{"text": prompt.system}],  # as an element, because tags in a str system message would be read
        seed=prompt.seed,
        do_sample=decoding.do_sample,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        max_new_tokens=decoding.max_new_tokens,
    )


def device_problems(device: str) -> list[MMRoleError]:
    """Return the problems of a device that show without using it.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", ...
    """
    if device in ("auto", "cpu"):
        return []
    import torch  # takes seconds, and is not needed if everything is finished

    try:
        asked = torch.device(device)
    except (RuntimeError, ValueError):
        return [_no_device("there is no such device", device)]
    if asked.type == "cpu":
        return []
    if asked.type != "cuda":  # "meta" and the like
        return [_no_device("only CPUs and NVIDIA GPUs are supported", device)]
    count = torch.cuda.device_count()
    if not count:
        return [_no_device("PyTorch finds no GPU here", device)]
    if (asked.index or 0) >= count:
        return [_no_device(f"there is no such GPU: the last one here is cuda:{count - 1}", device)]
    return []


def _no_device(what: str, device: str) -> MMRoleError:
    return MMRoleError(what, device, "--device", "give --device cpu, or cuda:N of a GPU that nvidia-smi lists")


def generation_problems(folder: Path, decoding: Decoding, *, retried: bool, batched: bool) -> list[MMRoleError]:
    """Return the generation settings of a checkpoint that make generating impossible.

    Args:
        folder: A complete checkpoint, or an adapter's folder, whose base then counts.
        decoding: What the flags ask for.
        retried: Texts may be requested again, by sampling.
        batched: The engine generates, which does not support every setting.

    Raises:
        MMRoleError: The file is not JSON.
    """
    path = (adapter_base(folder) if is_adapter(folder) else folder) / GENERATION_CONFIG
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        return [MMRoleError("the file is not a JSON object", settings, path, "fetch it again")]
    problems = []
    given = {name: settings[name] for name in ("temperature", "top_k", "top_p") if settings.get(name) is not None}
    flags = {name: value for name in ("temperature", "top_p") if (value := getattr(decoding, name)) is not None}
    samples = bool(settings.get("do_sample")) and decoding.do_sample is not False
    try:
        SamplingSettings(do_sample=samples or retried, **(given | flags))
        if decoding.max_new_tokens is None and settings.get("max_new_tokens") is not None:
            check_limit(settings["max_new_tokens"])
    except (ValueError, TypeError) as error:
        problems.append(MMRoleError("a generation setting cannot be used", str(error), path, "correct it there"))
    if flags and decoding.do_sample is None and not samples and not retried:
        what, fix = "sampling flags have no effect: the checkpoint decodes greedily", "leave them out"
        problems.append(MMRoleError(what, sorted(flags), path, fix))
    if batched and (unknown := unknown_settings(settings)):
        lines = [f"{name}: {value}" for name, value in unknown.items()]
        fix = "remove them there, or generate one by one, which is slow: --batch_size 1"
        problems.append(MMRoleError("the batching engine does not support these generation settings", lines, path, fix))
    return problems


def stored_dtype(folder: Path) -> str:
    """Return the dtype for `--dtype auto`: the checkpoint's config's, or else that of its weights.

    Args:
        folder: A complete checkpoint, or an adapter's folder, whose base then counts.
    """
    folder = adapter_base(folder) if is_adapter(folder) else folder
    config = read_json(folder / "config.json")
    if isinstance(config, Mapping) and isinstance(name := config.get("dtype") or config.get("torch_dtype"), str):
        return name.removeprefix("torch.")
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            kinds = {_DTYPES.get(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118 - no dict
        if found := sorted(kinds - {None}):
            return found[0]
    return "as stored"
