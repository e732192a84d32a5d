"""Qwen-VL in this process: all requests through the batching engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_utils.errors import MMRoleError
from eval.backends.protocol import Request, Result

if TYPE_CHECKING:
    from qwen_vl import generation


class NativeBackend:
    """Answers with a checkpoint that `qwen_vl.load` reads; it is loaded when the first request comes.

    Args:
        model_path: A checkpoint folder, or a LoRA adapter's.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "auto", "float32", "bfloat16" or "float16".
        max_batch_tokens: Tokens held in flight; None for what memory has room for.
        batch_size: Requests decoded at once; 1 is bit-faithful to the released way in bfloat16 too.
        local_rank: Which of several processes of this machine this is; with device "auto" it takes that GPU.
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

    def _load(self) -> generation.BatchGenerator:
        if self._engine is None:
            import qwen_vl  # torch and transformers take seconds to import: only when there is work for them
            from qwen_vl.generation import BatchGenerator

            device = self._own_device()
            if self.local_rank:  # a bar from one process of a machine is enough
                from transformers.utils.logging import disable_progress_bar

                disable_progress_bar()
            try:
                model, tokenizer = qwen_vl.load(self.model_path, dtype=self.dtype, device=device)
            except (ValueError, OSError, RuntimeError) as error:
                raise MMRoleError(
                    f"the checkpoint cannot be loaded: {error}",
                    f"device {device}, dtype {self.dtype}",
                    self.model_path,
                    "check the folder (README: where weights come from), --device and --dtype",
                ) from error
            self._engine = BatchGenerator(
                model,
                tokenizer,
                max_batch_tokens=self.max_batch_tokens,
                max_rows=self.batch_size,
                share_prefixes=self.batch_size != 1,
            )
            if model.device.type == "cpu" and self.max_batch_tokens is None:
                # What the engine found free is free only once, for all processes of this machine.
                self._engine.max_batch_tokens = max(self._engine.max_batch_tokens // self.local_size, 1)
        return self._engine

    def _own_device(self) -> str:
        import torch

        if self.device != "auto" or self.local_rank is None or not torch.cuda.is_available():
            return self.device
        if self.local_rank >= torch.cuda.device_count():
            raise MMRoleError(
                "there are more processes than GPUs",
                f"{self.local_size} processes, {torch.cuda.device_count()} GPU(s)",
                "PROCESSES",
                "set PROCESSES to the number of GPUs, or run on the CPU with --device cpu",
            )
        return f"cuda:{self.local_rank}"


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
