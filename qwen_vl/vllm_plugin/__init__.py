"""Qwen-VL on vLLM, exact: dynamic NTK and log-n attention per request, the released tokens, pictures and weights.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. No module of this
folder is imported without vLLM. Serve with `--tokenizer-mode qwen_vl`; `scripts/serve_vllm.sh` does.
"""


def register() -> None:
    """Registers config, model, tokenizer and renderer with vLLM, and wraps how its engine takes a request.

    Where this vLLM is not one of the tested versions, or lacks what the plugin relies on, a Qwen-VL checkpoint is
    refused with the reason when it is opened; other models are served as ever.
    """
    from transformers import AutoConfig

    from qwen_vl.vllm_plugin.compatibility import incompatibilities, refusing_config
    from qwen_vl.vllm_plugin.configuration import TOKENIZER_MODE, QwenVLServingConfig

    if problems := incompatibilities():
        AutoConfig.register(QwenVLServingConfig.model_type, refusing_config(problems), exist_ok=True)
        return

    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from qwen_vl.configuration import RELEASED_ARCHITECTURE
    from qwen_vl.vllm_plugin.admission import wrap_engine
    from qwen_vl.vllm_plugin.settings import ServingSettings

    if MODELS_CONFIG_MAP.get(RELEASED_ARCHITECTURE) is ServingSettings:
        return  # vLLM may load a plugin more than once in a process
    AutoConfig.register(QwenVLServingConfig.model_type, QwenVLServingConfig, exist_ok=True)
    ModelRegistry.register_model(RELEASED_ARCHITECTURE, f"{__name__}.model:QwenVLForServing")
    TokenizerRegistry.register(TOKENIZER_MODE, f"{__name__}.tokenizer", "ServingTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, f"{__name__}.renderer", "QwenVLRenderer")
    MODELS_CONFIG_MAP[RELEASED_ARCHITECTURE] = ServingSettings
    wrap_engine()
