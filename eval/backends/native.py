"""Qwen-VL in this process: all requests through the batching engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_utils.errors import MMRoleError
from eval.backends.backend import Request, Result

if TYPE_CHECKING:
    from qwen_vl import QwenVLForCausalLM, QwenVLTokenizer, generation


class NativeBackend:
    """Answers with a checkpoint that `qwen_vl.load` reads; it is loaded when the first request comes.

    Args:
        model_path: A checkpoint folder, or a LoRA adapter's.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "auto", "float32", "bfloat16" or "float16".
        max_batch_tokens: Tokens held in flight; None for what memory has room for.
        batch_size: Requests decoded at once; 1 asks `chat()` one by one, whose kernels see the released shapes.
        local_rank: Which of several processes of this machine this is; with device "auto" or "cuda" it takes that GPU.
        local_size: How many they are; on a CPU they divide the memory.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_tokens: int | None = None,
        batch_size: int | None = None,
        local_rank: int | None = None,
        local_size: int = 1,
    ) -> None:
        self.model_path = Path(model_path)
        self.device = device
        self.dtype = dtype
        self.max_batch_tokens = max_batch_tokens
        self.batch_size = batch_size
        self.local_rank = local_rank
        self.local_size = local_size
        self._engine: Any = None

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Yields one result per request, as they finish.

        A picture that cannot be read or a prompt that is too long becomes a result with an error.

        Raises:
            MMRoleError: If the checkpoint cannot be loaded.
        """
        engine = self._load()
        for result in engine.run(_engine_request(request) for request in requests):
            yield Result(result.id, result.text, result.error)

    def _load(self) -> generation.BatchGenerator | OneByOne:
        if self._engine is None:
            import qwen_vl  # torch and transformers take seconds to import: only when there is work for them
            from qwen_vl.generation import BatchGenerator

            device = self._own_device()
            if self.local_rank:  # a bar from one process of a machine is enough
                from transformers.utils.logging import disable_progress_bar

                disable_progress_bar()
            try:
                model, tokenizer = qwen_vl.load(self.model_path, dtype=self.dtype, device=device)
                if self.batch_size == 1:
                    self._engine = OneByOne(model, tokenizer)
                    return self._engine
                self._engine = BatchGenerator(
                    model, tokenizer, max_batch_tokens=self.max_batch_tokens, max_rows=self.batch_size
                )
            except Exception as error:
                raise self._unloadable(error, device) from error
            if model.device.type == "cpu" and self.max_batch_tokens is None:
                # What the engine found free is free only once, for all processes of this machine.
                self._engine.max_batch_tokens = max(self._engine.max_batch_tokens // self.local_size, 1)
        return self._engine

    def _unloadable(self, error: Exception, device: str) -> MMRoleError:
        known = isinstance(error, ValueError | OSError | RuntimeError)  # these tell by themselves what is wrong
        told = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
        return MMRoleError(
            f"the checkpoint cannot be loaded: {told}",
            f"device {device}, dtype {self.dtype}",
            self.model_path,
            "fetch the folder again (README: where weights come from), or check --device and --dtype",
        )

    def _own_device(self) -> str:
        import torch

        if self.device not in ("auto", "cuda") or self.local_rank is None or not torch.cuda.is_available():
            return self.device
        if self.local_rank >= torch.cuda.device_count():
            raise MMRoleError(
                "there are more processes than GPUs",
                f"{self.local_size} processes, {torch.cuda.device_count()} GPU(s)",
                "PROCESSES",
                "set PROCESSES to the number of GPUs, or run on the CPU with --device cpu",
            )
        return f"cuda:{self.local_rank}"


class OneByOne:
    """Requests by `chat()`, each alone: slow, and in bfloat16 without what a batch's shapes do to the rounding.

    Args:
        model: In eval mode.
        tokenizer: The checkpoint's.
    """

    def __init__(self, model: QwenVLForCausalLM, tokenizer: QwenVLTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def run(self, requests: Iterable[generation.Request]) -> Iterator[generation.Result]:
        """Yields one result per request, in their order."""
        from qwen_vl.generation import Result as EngineResult

        for request in requests:
            settings = {"do_sample": request.do_sample, "max_new_tokens": request.max_new_tokens}
            settings = {name: value for name, value in settings.items() if value is not None}
            try:
                text, _ = self.model.chat(
                    self.tokenizer, request.query, system=request.system, seed=request.seed, **settings
                )
                yield EngineResult(request.id, text)
            except (ValueError, TypeError, OSError, RuntimeError) as error:  # one request's boundary
                yield EngineResult(request.id, "", f"{type(error).__name__}: {error}")


def _engine_request(request: Request) -> generation.Request:
    from qwen_vl.generation import Request as EngineRequest

    image = [] if request.image is None else [{"image": request.image}]
    return EngineRequest(
        id=request.id,
        query=[*image, {"text": request.text}],
        system=[{"text": request.system}],  # as an element, because in a str system message tags would be read
        seed=request.seed,
        do_sample=request.do_sample,
        max_new_tokens=request.max_new_tokens,
    )
