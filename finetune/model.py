"""The model to tune: loaded, and with what trains chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import set_seed

from finetune.arguments import Options, TrainingArguments
from finetune.lora import add_adapters, four_bits
from qwen_vl import QwenVLForCausalLM


def load_model(options: Options) -> nn.Module:
    """The base with what trains marked, in training precision; adapters on it if they are asked for.

    Under ZeRO-3 it comes into being in shards: the arguments, which hold the DeepSpeed config, must exist before.
    """
    training = options.training
    base = options.model.model_name_or_path
    more = four_bits() if options.lora.q_lora else placement(training)
    model = QwenVLForCausalLM.from_pretrained(base, dtype=weight_dtype(training), weights_only=True, **more)
    model.config.use_cache = False
    if training.use_lora:
        set_seed(training.seed)  # what the adapters start from does not depend on what was drawn before
        return add_adapters(model, options.lora, base=base)
    freeze(model, training)
    return model


def freeze(model: QwenVLForCausalLM, training: TrainingArguments) -> None:
    """Marks what does not train in full tuning."""
    if training.fix_vit:
        # published: the tower is frozen, its resampler is not, and `pos_embed` trains with the resampler.
        model.transformer.visual.requires_grad_(False)
        model.transformer.visual.attn_pool.requires_grad_(True)


def placement(training: TrainingArguments) -> dict[str, Any]:
    """What lets `from_pretrained` put whole weights onto this process's GPU at once, not first into the host's memory.

    ZeRO-3 makes shards itself, and a CPU run needs nothing.
    """
    if training.device.type != "cuda" or training.zero_stage == 3:
        return {}
    return {"device_map": {"": training.device.index or 0}}


def weight_dtype(training: TrainingArguments) -> torch.dtype:
    """What the weights are held in while they train.

    DeepSpeed keeps its own float32 copy of what trains, and a LoRA base is never updated: both can have half precision.
    Otherwise the weights are the only copy and stay in float32, under autocast.
    """
    if not training.deepspeed and not training.use_lora:
        return torch.float32
    if training.bf16:
        return torch.bfloat16
    return torch.float16 if training.fp16 else torch.float32


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters that train, in the model's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Numbers of weights that train, and of all; under ZeRO-3 of the whole, not of this process's share."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
