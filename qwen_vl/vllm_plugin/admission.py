"""How the engine takes a request: in the prefix cache of its rotary class only, and ending where the model ends.

The engine's own function is wrapped, because every front end, online or not, comes by it.
"""

import functools
from collections.abc import Sequence

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor

from qwen_vl.vllm_plugin.configuration import QwenVLServingConfig
from qwen_vl.vllm_plugin.positions import class_alpha, rotary_class


def wrap_engine() -> None:
    """Lets the engine prepare each request of this model before it takes it, and its front end refuse what it must."""
    take = EngineCore.preprocess_add_request

    @functools.wraps(take)
    def prepare_and_take(self: EngineCore, request: EngineCoreRequest) -> object:
        config = self.vllm_config.model_config.hf_config
        if isinstance(config, QwenVLServingConfig):
            prepare(request, config)
        return take(self, request)

    EngineCore.preprocess_add_request = prepare_and_take
    process = InputProcessor.process_inputs

    @functools.wraps(process)
    def process_and_check(
        self: InputProcessor, request_id: str, prompt: object, params: object, *more: object, **named: object
    ) -> EngineCoreRequest:
        # What only the engine refused would be waited for without an end. A client gets status 400 with this error.
        config = self.model_config.hf_config
        if not isinstance(config, QwenVLServingConfig):
            return process(self, request_id, prompt, params, *more, **named)
        if getattr(params, "structured_outputs", None):
            raise VLLMValidationError("Qwen-VL takes no response_format and no structured_outputs: leave them away.")
        request = process(self, request_id, prompt, params, *more, **named)
        check_request(request, config)
        return request

    InputProcessor.process_inputs = process_and_check


def prepare(request: EngineCoreRequest, config: QwenVLServingConfig) -> None:
    """Sets the request's cache salt and stop tokens.

    Raises:
        VLLMValidationError: The request could only be answered wrongly.
    """
    check_request(request, config)
    number = rotary_class(len(request.prompt_token_ids), config.trained_length, dynamic_ntk=config.use_dynamic_ntk)
    # It enters the hash of the first block, and the later ones chain: a prefix is shared within its class alone.
    request.cache_salt = f"alpha={class_alpha(number)} {request.cache_salt or ''}"
    params = request.sampling_params
    params.stop_token_ids = sorted({*(params.stop_token_ids or ()), *config.stop_tokens})
    # These are what `min_tokens` keeps from coming out.
    params._all_stop_token_ids = {*params._all_stop_token_ids, *config.stop_tokens}


def check_request(request: EngineCoreRequest, config: QwenVLServingConfig) -> None:
    """Checks that a request asks for an answer to a whole prompt.

    Raises:
        VLLMValidationError: It does not.
    """
    if request.sampling_params is None or request.prompt_token_ids is None or request.resumable:
        raise VLLMValidationError(
            "Qwen-VL answers whole prompts of tokens; it gives no embeddings and takes no streamed prompts."
        )
    check_prompt(request.prompt_token_ids, len(request.mm_features or ()), config)


def check_prompt(ids: Sequence[int], pictures: int, config: QwenVLServingConfig) -> None:
    """Checks that a prompt ends where an answer begins, and has a span of ids for each picture.

    Raises:
        VLLMValidationError: It does not. Where an answer was begun already, dynamic NTK cannot tell it from the prompt.
    """
    ending = config.prompt_ending
    if list(ids[-len(ending) :]) != ending:
        raise VLLMValidationError(
            "a prompt of Qwen-VL must end with <|im_start|>assistant and a newline. Use /v1/chat/completions, or the "
            "ids of qwen_vl.chat.make_context; an answer that was begun cannot be continued."
        )
    if (spans := list(ids).count(config.image_start_id)) != pictures:
        raise VLLMValidationError(
            f"the prompt shows {spans} pictures and {pictures} were given. Use /v1/chat/completions."
        )
