"""Qwen-VL, native and exact: the model and nothing about MMRole.

torch and transformers, which take seconds to import, come with the first of these names that is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_vl.configuration import QwenVLConfig
    from qwen_vl.images import QwenVLImageProcessor
    from qwen_vl.loading import load
    from qwen_vl.modeling import QwenVLForCausalLM
    from qwen_vl.tokenization import QwenVLTokenizer

__all__ = ["QwenVLConfig", "QwenVLForCausalLM", "QwenVLImageProcessor", "QwenVLTokenizer", "load"]
_MODULES = {
    "QwenVLConfig": "configuration",
    "QwenVLForCausalLM": "modeling",
    "QwenVLImageProcessor": "images",
    "QwenVLTokenizer": "tokenization",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
