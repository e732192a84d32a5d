"""vLLM's settings: those that would give other answers than the model's own are refused, with the reason."""

import os
from pathlib import Path

from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from qwen_vl import QwenVLTokenizer
from qwen_vl.checkpoint import checkpoint_problems, weight_problems
from qwen_vl.vllm_plugin.configuration import TOKENIZER_MODE, QwenVLServingConfig

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


class ServingSettings(VerifyAndUpdateConfig):
    """What vLLM asks before it builds an engine for this architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Checks the model's settings and asks for the model runner that the tests run.

        Raises:
            ValueError: A setting would change the answers silently, or does not work with this model.
        """
        folder = Path(model_config.model)
        if problems := checkpoint_problems(folder, flag="--model") or weight_problems(folder):
            raise ValueError("\n".join(map(str, problems)))
        config = model_config.hf_config
        if not isinstance(config, QwenVLServingConfig):
            raise _refusal("the config is not the plugin's", type(config).__name__, "leave --hf-overrides away")
        if model_config.tokenizer_mode != TOKENIZER_MODE:
            fix = f"start vLLM with --tokenizer-mode {TOKENIZER_MODE}, or with bash scripts/serve_vllm.sh"
            raise _refusal("the prompt's ids must be made by the project's tokenizer", model_config.tokenizer_mode, fix)
        if model_config.skip_tokenizer_init:
            raise _refusal("there is no tokenizer", "--skip-tokenizer-init", "leave it away")
        if model_config.enable_prompt_embeds:
            raise _refusal(
                "a prompt's length cannot be told from embeddings", "--enable-prompt-embeds", "leave it away"
            )
        if model_config.quantization:
            raise _refusal(
                "quantized weights are not supported", model_config.quantization, "leave --quantization away"
            )
        if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
            fix = "unset VLLM_USE_RUST_FRONTEND"
            raise _refusal("the Rust front end does not call the project's tokenizer", "VLLM_USE_RUST_FRONTEND", fix)
        if hasattr(envs, RUNNER):  # a version that has one runner only has no such name
            if getattr(envs, RUNNER):
                raise _refusal("the tests run vLLM's V1 model runner", f"{RUNNER}=1", f"unset {RUNNER}")
            os.environ[RUNNER] = "0"
        tokenizer = QwenVLTokenizer.from_pretrained(model_config.tokenizer)
        if tokenizer.img_start_id != config.image_start_id:
            fix = "download qwen.tiktoken and config.json of the same checkpoint again"
            value = f"<img> is {tokenizer.img_start_id} in one and {config.image_start_id} in the other"
            raise _refusal("the vocabulary and config.json do not belong together", value, fix)
        config.prompt_ending = [
            tokenizer.im_start_id,
            *tokenizer.encode_plain("assistant"),
            *tokenizer.encode_plain("\n"),
        ]
        config.stop_tokens = [tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id]

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Checks the settings of the engine.

        Raises:
            ValueError: As above.
        """
        if vllm_config.speculative_config is not None:
            raise _refusal("speculative decoding was not tested", "--speculative-config", "leave it away")
        kept = vllm_config.cache_config.cache_dtype
        if kept not in ("auto", "float32", "bfloat16", "float16"):
            fix = "leave --kv-cache-dtype away"
            raise _refusal("keys and values in so few bits are not supported", kept, fix)
        if vllm_config.kv_transfer_config is not None:
            fix = "leave it away; independent servers do as well (docs/serving.md)"
            raise _refusal("caches shared between engines were not tested", "--kv-transfer-config", fix)


def _refusal(what: str, value: str, fix: str) -> ValueError:
    return ValueError(f"\nproblem: {what}\nvalue:   {value}\nwhere:   vLLM's settings for Qwen-VL\nto do:   {fix}")
