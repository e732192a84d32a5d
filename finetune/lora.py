"""Adapters on the decoder, and the base in four bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from data_utils.errors import MMRoleError
from finetune.arguments import LoraArguments, TrainingArguments
from qwen_vl.checkpoint import read_json_file

# Kept as they are in a base of four bits: the tower and its resampler, and the head. From the start of a module's name.
NOT_QUANTIZED = ["transformer.visual", "lm_head"]


def is_chat_model(base: str | Path) -> bool:
    """Whether a base has learned ChatML already; the released trainer went by "chat" in the path alone.

    Args:
        base: Checkpoint folder.
    """
    settings = Path(base) / "generation_config.json"
    chatml = settings.is_file() and read_json_file(settings).get("chat_format") == "chatml"
    return chatml or "chat" in str(base).lower()


def add_adapters(model: PreTrainedModel, options: LoraArguments, *, base: str | Path) -> torch.nn.Module:
    """The model with LoRA adapters, which alone train.

    published: r 64, alpha 16, dropout 0.05 on the decoder's c_attn, attn.c_proj, w1 and w2; embedding and head are
    trained and saved too, unless the base is a chat model or has four bits.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if options.q_lora:
        # Checkpointing is turned on by the trainer, in the same way as for every other model.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    whole = options.q_lora or is_chat_model(base)
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_target_modules,
        bias=options.lora_bias,
        task_type="CAUSAL_LM",
        modules_to_save=None if whole else ["wte", "lm_head"],
    )
    adapted = get_peft_model(model, config)
    # Where the base is, from wherever the adapter will be loaded.
    adapted.peft_config["default"].base_model_name_or_path = str(Path(base).resolve())
    return adapted


def matched_modules(model: torch.nn.Module, target: str) -> list[str]:
    """Names of the modules that a LoRA target matches: the name itself, or its end after a dot."""
    return [name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")]


def target_problems(model: torch.nn.Module, targets: Sequence[str]) -> list[MMRoleError]:
    """LoRA targets that match no module, or one that an adapter cannot be put on.

    Args:
        model: The base; its weights are not needed.
        targets: See `matched_modules`.
    """
    matched = {target: matched_modules(model, target) for target in targets}
    missing = [target for target, names in matched.items() if not names]
    other = {
        target: name for target, names in matched.items() for name in names if not _takes_adapter(model, name)
    }  # one of each is enough to tell
    fix = "name modules of the decoder: c_attn, attn.c_proj, w1, w2, mlp.c_proj"
    problems = []
    if missing:
        problems.append(MMRoleError("a LoRA target matches no module", missing, "--lora_target_modules", fix))
    if other:
        told = [f"{target}: {name} is a {_kind(model, name)}" for target, name in other.items()]
        problems.append(MMRoleError("a LoRA target is no layer of weights", told, "--lora_target_modules", fix))
    return problems


def adapter_weights(model: torch.nn.Module, options: LoraArguments) -> int:
    """Weights of the adapters that would be put on a model, biases left out.

    Args:
        model: The base; its weights are not needed.
        options: Their rank and targets.
    """
    names = {name for target in options.lora_target_modules for name in matched_modules(model, target)}
    modules = [model.get_submodule(name) for name in names]
    return sum(options.lora_r * sum(module.weight.shape[:2]) for module in modules if hasattr(module, "weight"))


def _takes_adapter(model: torch.nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), torch.nn.Linear | torch.nn.Embedding | torch.nn.Conv2d)


def _kind(model: torch.nn.Module, name: str) -> str:
    return type(model.get_submodule(name)).__name__


def four_bits() -> dict[str, Any]:
    """What `from_pretrained` needs to load a base in NF4."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def q_lora_problems(options: LoraArguments, training: TrainingArguments) -> list[MMRoleError]:
    """Why four bits cannot be had here; empty if they can, or are not asked for."""
    if not options.q_lora:
        return []
    problems = []
    if not training.use_lora:
        problems.append(_problem("four bits cannot be tuned, only adapters on them", "add --use_lora"))
    if not torch.cuda.is_available():
        problems.append(_problem("a base in four bits needs a GPU, and there is none", "leave --q_lora away"))
    if importlib.util.find_spec("bitsandbytes") is None:
        problems.append(_problem("bitsandbytes is not installed", "pip install bitsandbytes, or leave --q_lora away"))
    if training.zero_stage == 3:
        problems.append(_problem("ZeRO-3 saves empty adapters of a base in four bits", "use ds_config_zero2.json"))
    return problems


def _problem(what: str, fix: str) -> MMRoleError:
    return MMRoleError(what, "--q_lora", "the command line", fix)
