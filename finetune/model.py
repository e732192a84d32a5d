"""Loads the model to tune, adds adapters, and chooses what trains."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from data_utils.errors import MMRoleError
from finetune.arguments import LoraArguments, Options, TrainingArguments
from qwen_vl import QwenVLForCausalLM
from qwen_vl.checkpoint import read_json_file
from qwen_vl.modeling import NOT_QUANTIZED


def load_model(options: Options) -> nn.Module:
    """Loads the base in training precision, marks what trains, and adds adapters if requested.

    Under ZeRO-3 it is made in shards: the arguments, which hold the DeepSpeed config, must exist before.
    """
    training = options.training
    base = options.model.model_name_or_path
    more = four_bits() if options.lora.q_lora else placement(training)
    model = QwenVLForCausalLM.from_pretrained(base, dtype=weight_dtype(training), weights_only=True, **more)
    model.config.use_cache = False
    if training.use_lora:
        set_seed(training.seed)  # the initial adapters do not depend on earlier draws
        model = add_adapters(model, options.lora, base=base)
        if not training.deepspeed:  # which keeps a float32 copy itself
            for module in model.modules():  # whole ones: a layer's weight and bias must have one dtype
                parameters = list(module.parameters(recurse=False))
                if any(parameter.requires_grad for parameter in parameters):
                    for parameter in parameters:  # in bfloat16 a small step would round to zero
                        if parameter.is_floating_point():
                            parameter.data = parameter.data.float()
        return model
    freeze(model, training)
    return model


def freeze(model: QwenVLForCausalLM, training: TrainingArguments) -> None:
    """Freezes everything that does not train in full tuning."""
    if training.fix_vit:
        # published: the tower is frozen, its resampler is not, and `pos_embed` trains with the resampler.
        model.transformer.visual.requires_grad_(False)
        model.transformer.visual.attn_pool.requires_grad_(True)


def placement(training: TrainingArguments) -> dict[str, Any]:
    """Returns the arguments with which `from_pretrained` loads onto this process's GPU, not into host memory first.

    ZeRO-3 makes shards itself, and a CPU run needs nothing.
    """
    if training.device.type != "cuda" or training.zero_stage == 3:
        return {}
    return {"device_map": {"": training.device.index or 0}}


def weight_dtype(training: TrainingArguments) -> torch.dtype:
    """Returns the dtype in which the weights are held while they train.

    DeepSpeed keeps its own float32 copy of what trains, and a LoRA base is never updated: both can have half precision.
    Otherwise the weights are the only copy and stay in float32, under autocast.
    """
    if not training.deepspeed and not training.use_lora:
        return torch.float32
    if training.bf16:
        return torch.bfloat16
    return torch.float16 if training.fp16 else torch.float32


def trainable_names(model: nn.Module) -> list[str]:
    """Returns the names of the parameters that train, in the model's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Returns the numbers of weights that train, and of all; under ZeRO-3 of the whole model, not of a shard."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def is_chat_model(base: str | Path) -> bool:
    """Returns whether a base is a chat model; the released trainer looked for "chat" in its path only.

    Args:
        base: Checkpoint folder.
    """
    settings = Path(base) / "generation_config.json"
    chatml = settings.is_file() and read_json_file(settings).get("chat_format") == "chatml"
    return chatml or "chat" in str(base).lower()


def add_adapters(model: PreTrainedModel, options: LoraArguments, *, base: str | Path) -> torch.nn.Module:
    """Returns the model with LoRA adapters, which are all that trains.

    published: r 64, alpha 16, dropout 0.05 on the decoder's c_attn, attn.c_proj, w1 and w2; embedding and head are
    trained and saved too, unless the base is a chat model or has four bits.
    """
    from peft import LoraConfig, get_peft_model

    # peft's prepare_model_for_kbit_training is left out: it would make float32 of what stays whole in four bits (the
    # tower, wte and lm_head), and the trainer turns checkpointing on.
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
    # Absolute, so that the base is found from any directory.
    adapted.peft_config["default"].base_model_name_or_path = str(Path(base).resolve())
    return adapted


def matched_modules(model: torch.nn.Module, target: str) -> list[str]:
    """Returns the names of the modules that a LoRA target matches: the name itself, or its end after a dot."""
    return [name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")]


def target_problems(model: torch.nn.Module, targets: Sequence[str]) -> list[MMRoleError]:
    """Returns problems with LoRA targets that match no module, or a module that takes no adapter.

    Args:
        model: The base; its weights are not needed.
        targets: See `matched_modules`.
    """
    matched = {target: matched_modules(model, target) for target in targets}
    missing = [target for target, names in matched.items() if not names]
    other = {
        target: name for target, names in matched.items() for name in names if not _takes_adapter(model, name)
    }  # one per target is enough
    fix = "name modules of the decoder: c_attn, attn.c_proj, w1, w2, mlp.c_proj"
    problems = []
    if missing:
        problems.append(MMRoleError("a LoRA target matches no module", missing, "--lora_target_modules", fix))
    if other:
        lines = [f"{target}: {name} is a {_kind(model, name)}" for target, name in other.items()]
        problems.append(MMRoleError("a LoRA target is no layer of weights", lines, "--lora_target_modules", fix))
    return problems


def adapter_weights(model: torch.nn.Module, options: LoraArguments) -> int:
    """Returns the number of weights of the adapters that a model would get, without biases.

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
    """Returns the arguments with which `from_pretrained` loads a base in NF4."""
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
    """Returns why a base in four bits cannot be used here, if it is requested."""
    if not options.q_lora:
        return []
    problems = []
    if not training.use_lora:
        problems.append(_problem("four bits cannot be tuned, only adapters on them", "add --use_lora"))
    if not torch.cuda.is_available():
        problems.append(_problem("a base in four bits needs a GPU, and there is none", "leave out --q_lora"))
    if importlib.util.find_spec("bitsandbytes") is None:
        problems.append(_problem("bitsandbytes is not installed", "pip install bitsandbytes, or leave out --q_lora"))
    if training.zero_stage == 3:
        problems.append(_problem("ZeRO-3 saves empty adapters of a base in four bits", "use ds_config_zero2.json"))
    return problems


def _problem(what: str, fix: str) -> MMRoleError:
    return MMRoleError(what, "--q_lora", "the command line", fix)
