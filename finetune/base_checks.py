"""What can be known of the base checkpoint before its weights load: damage, and that all of it fits together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from data_utils.errors import MMRoleError, four_parts
from finetune.saving import saved_tensors
from qwen_vl import QwenVLConfig, QwenVLForCausalLM, QwenVLTokenizer
from qwen_vl.checkpoint import checkpoint_problems, is_adapter, read_json_file, weight_problems
from qwen_vl.loading import check_fit

FLAG = "--model_name_or_path"
# What reading a damaged or wrong file ends in, where the reader has no words of its own for it.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError)
_UNREADABLE = (*_UNREADABLE, StrictDataclassError, SafetensorError)
_SETTINGS = ("generation_config.json", "tokenizer_config.json")


def base_problems(base: Path) -> list[MMRoleError]:
    """Everything that keeps a checkpoint from being trained from; the headers of its weights are read, no weight is.

    Args:
        base: The checkpoint's folder.
    """
    if is_adapter(base):
        fix = "merge it first with scripts/merge_lora.py, then start from what that gives"
        return [MMRoleError("an adapter cannot be the base of another training", base, FLAG, fix)]
    found = four_parts(checkpoint_problems(base, flag=FLAG))
    if found:
        return found
    found = four_parts(weight_problems(base))
    settings = [base / name for name in _SETTINGS if (base / name).is_file()]
    found += [problem for path in settings if (problem := _tried(lambda path=path: read_json_file(path), path)[1])]
    config, wrong = _tried(lambda: _config(base), base / "config.json")
    tokenizer, no_tokenizer = _tried(lambda: QwenVLTokenizer.from_pretrained(base), base)
    found += [problem for problem in (wrong, no_tokenizer) if problem and not _told_of(problem, found)]
    if config is not None and tokenizer is not None:
        _, misfit = _tried(lambda: check_fit(tokenizer, config, base), base)
        found += [misfit] if misfit else []
    if config is not None and not found:
        wrong = _tried(lambda: _tensor_problem(base), base)
        found += [problem for problem in wrong if problem]
    return found


def outline(base: Path) -> QwenVLForCausalLM:
    """The model of a checkpoint without its weights: names, shapes and kinds of its modules, in no memory.

    Args:
        base: A checkpoint's folder without problems.
    """
    with torch.device("meta"):
        return QwenVLForCausalLM(QwenVLConfig.from_pretrained(str(base)))


def _config(base: Path) -> QwenVLConfig:
    if "visual" not in read_json_file(base / "config.json"):
        raise ValueError("config.json says nothing of the vision tower (visual): this is no Qwen-VL checkpoint")
    return QwenVLConfig.from_pretrained(str(base))


def _tensor_problem(base: Path) -> MMRoleError | None:
    """Tensors that the model has and the checkpoint has not, or in another shape; only safetensors are looked into."""
    there = {name: tuple(shape) for name, (shape, _) in saved_tensors(base).items()}
    needed = {name: tuple(parameter.shape) for name, parameter in outline(base).named_parameters()}
    if not there:
        return None  # a .bin is not opened before it is loaded
    wrong = [f"{name}: missing" for name in needed if name not in there]
    wrong += [
        f"{name}: {list(there[name])} instead of {list(shape)}"
        for name, shape in needed.items()
        if there.get(name, shape) != shape
    ]
    if not wrong:
        return None
    shown = wrong if len(wrong) <= 10 else [*wrong[:10], f"… and {len(wrong) - 10} more"]
    return _problem("the weights do not fit config.json", shown, base)


def _tried(read: Callable[[], Any], where: Path) -> tuple[Any, MMRoleError | None]:
    try:
        return read(), None
    except MMRoleError as error:
        return None, error
    except _UNREADABLE as error:
        return None, _problem("the base checkpoint cannot be read", f"{type(error).__name__}: {error}", where)


def _told_of(problem: MMRoleError, found: list[MMRoleError]) -> bool:
    """Whether the same file's damage is found already, in other words."""
    return any(one.where == problem.where or str(one.where) in str(problem.value) for one in found if one.where)


def _problem(what: str, value: object, where: Path) -> MMRoleError:
    return MMRoleError(what, value, where, f"fetch the checkpoint again, or give another folder with {FLAG}")
