"""Any model behind OpenAI-compatible endpoints: hosted APIs, vLLM, SGLang, llama.cpp, Ollama and others."""

from __future__ import annotations

import argparse
import base64
import io
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from data_utils.endpoint import KEY, BudgetSpentError, ChatReply, ChatRequest, Endpoint
from data_utils.errors import MMRoleError
from data_utils.flag_types import above_zero, positive
from data_utils.images import upright_rgb
from eval.backends.backend import Completion, Prompt, StoppedError, another_model

logger = logging.getLogger(__name__)

QUESTION = "What does the picture show?"  # asked once before the prompts, to see whether the model takes pictures
_SEEDS = 2**31  # some servers take no larger seed
_FORMATS = {".jpg": "jpeg", ".png": "png", ".webp": "webp"}
_IMAGE_SIZE = 448  # of Qwen-VL's vision tower
_PICTURES_KEPT = 64  # prompts of one row have the same picture


class Backend:
    """Completes prompts through endpoints, many at once; the prompts of one row all go to the same endpoint.

    Args:
        options: The flags.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._servers: dict[str, int] = {}  # by row
        self._served = ""
        self._checked = False  # whether the model takes pictures

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Add the flags of this backend."""
        flag = parser.add_argument
        flag("--endpoint", nargs="+", metavar="URL", help="use a served model at these base URLs (with /v1)")
        flag("--model", help="the served model's name")
        flag("--api_key_env", default=KEY, metavar="VARIABLE", help="environment variable with the key (%(default)s)")
        flag("--budget_tokens", type=positive, help="stop before more tokens than these are used; a later run resumes")
        flag("--timeout", type=above_zero, default=600.0, help="seconds for one complete request (%(default)s)")
        flag(
            "--as_qwen_vl",
            action="store_true",
            help="the model is a first-generation Qwen-VL (scripts/serve_vllm.sh): send its 448x448 picture, and cut "
            "the answer as chat() does; needs qwen.tiktoken at --model_path",
        )

    def problems(self) -> list[MMRoleError]:
        """Return what is wrong with the flags, the key or the proxy settings; nothing is sent."""
        problems = []
        options = self._options
        if not options.model:
            fix = "give the name that the endpoint lists at /models with --model"
            problems.append(MMRoleError("the served model has no name", None, "--model", fix))
        if options.processes not in (None, 1):
            fix = "leave out PROCESSES: the number of concurrent requests adapts by itself"
            problems.append(MMRoleError("endpoints are used by one process", options.processes, "PROCESSES", fix))
        if options.model_path and not options.as_qwen_vl:
            fix = "leave out MODEL_PATH or --endpoint, or give --as_qwen_vl, which reads the vocabulary there"
            what = "no checkpoint is loaded where an endpoint is used"
            problems.append(MMRoleError(what, options.model_path, "--model_path", fix))
        if options.as_qwen_vl and not (vocabulary := options.model_path / "qwen.tiktoken").is_file():
            fix = "give a folder that holds it with --model_path; the weights are not needed there"
            problems.append(MMRoleError("--as_qwen_vl needs the model's vocabulary", None, vocabulary, fix))
        try:
            _ = self._endpoint
        except MMRoleError as error:
            problems.append(error)
        return problems

    def identity(self) -> dict[str, Any]:
        """Return the model's name and the form of its pictures; completions have the name that the server reports."""
        return {"backend": "endpoint", "model": self._options.model, "picture": self._picture_form}

    def describe(self) -> dict[str, Any]:
        """Return the model and where it is served."""
        return {"model at": f"{self._options.model} at {', '.join(self._options.endpoint)}"}

    def devices(self, processes: int | None) -> list[str]:
        """Return one device: requests are concurrent within one process."""
        return ["endpoint"]

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Completion]:
        """Yield one completion per prompt, as they finish.

        Raises:
            MMRoleError: The endpoint accepts no request, or none with a picture, or the served model changes.
            StoppedError: The budget is spent.
        """
        endpoint, waiting, spent = self._endpoint, deque(prompts), ""
        if not self._checked and any(prompt.image for prompt in waiting):
            self._check_pictures()
        asked: dict[Future[ChatReply], Prompt] = {}
        try:
            while waiting or asked:
                while waiting and len(asked) < endpoint.limit:
                    prompt = waiting.popleft()
                    try:
                        request = self._request(prompt)
                    except (OSError, ValueError) as error:  # per-sample boundary
                        yield Completion(prompt.id, "", f"not a readable image: {error}")
                        continue
                    asked[endpoint.submit(request)] = prompt
                for future in wait(asked, return_when=FIRST_COMPLETED).done:
                    prompt = asked.pop(future)
                    try:
                        yield self._completion(prompt, future.result())
                    except BudgetSpentError as error:
                        spent = str(error)
                        waiting.clear()
            if spent:
                raise StoppedError(spent)
        finally:
            for future in asked:
                future.cancel()

    def summary(self) -> str:
        """Return the requests, refused parameters and the name of the served model."""
        served = [f"served model {self._served}"] if self._served else []
        return ", ".join([*served, self._endpoint.summary()])

    def _check_pictures(self) -> None:
        """Asks a question with a picture and without: a model that takes none may answer all the same, from the text.

        Raises:
            MMRoleError: Only the question without a picture is answered.
            StoppedError: The budget is spent.
        """
        from PIL import Image

        self._checked = True
        content = io.BytesIO()
        Image.linear_gradient("L").convert("RGB").save(content, "PNG")
        image = _data_url(content.getvalue(), "png")
        requests = [ChatRequest(QUESTION, image=image, seed=0, max_tokens=16) for image in (image, None)]
        try:
            seen, unseen = [self._endpoint.submit(request).result() for request in requests]
        except BudgetSpentError as error:
            raise StoppedError(str(error)) from None
        place = self.describe()["model at"]
        if seen.error and not unseen.error:
            fix = "ask a model that sees, or check how it is served"
            raise MMRoleError("the model takes no pictures", seen.error, place, fix)
        if 0 < seen.prompt_tokens <= unseen.prompt_tokens:
            text = "%s: a question has %d tokens with a picture and %d without: it may be dropped; look at the answers"
            logger.warning(text, place, seen.prompt_tokens, unseen.prompt_tokens)

    @cached_property
    def _endpoint(self) -> Endpoint:
        options = self._options
        return Endpoint(
            options.endpoint,
            options.model or "",
            key_env=options.api_key_env,
            timeout=options.timeout,
            max_tokens_total=options.budget_tokens,
        )

    @property
    def _picture_form(self) -> str:
        return f"{_IMAGE_SIZE}x{_IMAGE_SIZE} RGB" if self._options.as_qwen_vl else "upright RGB"

    @cached_property
    def _tokenizer(self) -> Any:
        from qwen_vl import QwenVLTokenizer

        return QwenVLTokenizer.from_pretrained(self._options.model_path)

    def _request(self, prompt: Prompt) -> ChatRequest:
        decoding, greedy = prompt.decoding, prompt.decoding.do_sample is False
        picture = _qwen_vl_picture if self._options.as_qwen_vl else _picture
        return ChatRequest(
            user=prompt.text,
            system=prompt.system,
            image=picture(prompt.image) if prompt.image else None,
            temperature=0.0 if greedy else decoding.temperature,
            top_p=None if greedy else decoding.top_p,
            seed=prompt.seed % _SEEDS,
            max_tokens=decoding.max_new_tokens,
            server=self._servers.setdefault(prompt.row, len(self._servers)),
            extra={"return_token_ids": True} if self._options.as_qwen_vl else {},
        )

    def _completion(self, prompt: Prompt, reply: ChatReply) -> Completion:
        if reply.model and self._served and reply.model != self._served:
            raise another_model(self._served, reply.model, ", ".join(self._options.endpoint))
        self._served = reply.model or self._served
        text, error = reply.text, reply.error
        if self._options.as_qwen_vl and error is None and reply.refusal is None:
            if reply.token_ids is None:
                error = "the endpoint gives no token ids; serve the model with scripts/serve_vllm.sh"
            else:
                from qwen_vl.chat import cut_answer

                text = cut_answer(self._tokenizer, reply.token_ids)
        text = "" if error else text
        completion = Completion(prompt.id, text, error, reply.refusal, reply.cut, tokens=reply.tokens)
        return replace(completion, served=reply.model, without=", ".join(self._endpoint.learned))


@lru_cache(maxsize=_PICTURES_KEPT)
def _picture(path: Path) -> str:
    """Return a picture as people see it (upright), as a data URL."""
    content, suffix = upright_rgb(path.read_bytes())
    return _data_url(content, _FORMATS[suffix])


@lru_cache(maxsize=_PICTURES_KEPT)
def _qwen_vl_picture(path: Path) -> str:
    """Return a picture as Qwen-VL sees it; vLLM would fill transparency with white and apply EXIF orientation."""
    from PIL import Image

    content = io.BytesIO()
    with Image.open(path) as image:
        # published: RGB, then straight to the square by bicubic resampling.
        image.convert("RGB").resize((_IMAGE_SIZE, _IMAGE_SIZE), Image.Resampling.BICUBIC).save(content, "PNG")
    return _data_url(content.getvalue(), "png")


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
