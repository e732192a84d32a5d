"""Qwen-VL, native and exact: the model and nothing about MMRole.

Importing it makes the model known to transformers' auto classes: `import qwen_vl`, then
`AutoModelForCausalLM.from_pretrained(path)`, with no remote code. torch and transformers, which take seconds to import,
are imported when one of the names below is first used, or when the user imports transformers.
"""

import sys
import threading
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_vl.configuration import QwenVLConfig
    from qwen_vl.images import QwenVLImageProcessor
    from qwen_vl.loading import load
    from qwen_vl.modeling import QwenVLForCausalLM
    from qwen_vl.processing import QwenVLProcessor
    from qwen_vl.tokenization import QwenVLTokenizer

__all__ = ["QwenVLConfig", "QwenVLForCausalLM", "QwenVLImageProcessor", "QwenVLProcessor", "QwenVLTokenizer", "load"]
_MODULES = {
    "QwenVLConfig": "configuration",
    "QwenVLForCausalLM": "modeling",
    "QwenVLImageProcessor": "images",
    "QwenVLProcessor": "processing",
    "QwenVLTokenizer": "tokenization",
    "load": "loading",
}
# Each of our modules registers its class on import, once this module of transformers has been imported.
_REGISTERED_WITH = {
    "transformers.models.auto.configuration_auto": "configuration",
    "transformers.models.auto.image_processing_auto": "images",
    "transformers.models.auto.modeling_auto": "modeling",
    "transformers.models.auto.processing_auto": "processing",
    "transformers.models.auto.tokenization_auto": "tokenization",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Registration(MetaPathFinder):
    """Imports our modules once those of transformers that they register with have been imported.

    This happens after the outermost import has ended: during it, our modules or theirs may be incomplete.
    """

    def __init__(self) -> None:
        self.pending: list[str] = []
        self.thread = threading.local()

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in _REGISTERED_WITH and not fullname.startswith(f"{__name__}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self.thread.depth = getattr(self.thread, "depth", 0) + 1
            try:
                execute(module)
            finally:
                self.thread.depth -= 1
            if fullname in _REGISTERED_WITH:
                self.pending.append(_REGISTERED_WITH[fullname])
            while self.thread.depth == 0 and self.pending:
                import_module(f"{__name__}.{self.pending.pop()}")

        spec.loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    sys.meta_path.insert(0, _Registration())
    for name, module in _REGISTERED_WITH.items():
        if name in sys.modules:
            import_module(f"{__name__}.{module}")


_register()
