"""What trains and where it is loaded; what adapters are put on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from finetune.arguments import LoraArguments
from finetune.model import adapter_weights, add_adapters, freeze, placement, target_problems, trainable_names
from qwen_vl import QwenVLConfig, QwenVLForCausalLM
from qwen_vl.loading import NOT_QUANTIZED
from tests.golden_checkpoint import GOLDEN
from tests.qwen_vl.conftest import small_config


@pytest.mark.parametrize(
    ("device", "stage", "expected"),
    [
        ("cpu", 0, {}),
        ("cpu", 2, {}),
        ("cuda:1", 3, {}),  # ZeRO-3 makes shards, and transformers refuses both
        ("cuda:1", 2, {"device_map": {"": 1}}),
        ("cuda", 0, {"device_map": {"": 0}}),
    ],
)
def test_weights_go_to_the_own_gpu_at_once(device: str, stage: int, expected: dict) -> None:
    assert placement(SimpleNamespace(device=torch.device(device), zero_stage=stage)) == expected


@pytest.fixture(scope="module")
def bare() -> QwenVLForCausalLM:
    """A model without weights."""
    with torch.device("meta"):
        return QwenVLForCausalLM(small_config())


def test_what_trains_is_the_published_set(tmp_path: Path) -> None:
    expected = json.loads((GOLDEN / "trainable.json").read_text())
    (tmp_path / "generation_config.json").write_text('{"chat_format": "chatml"}')
    config = QwenVLConfig.from_dict(json.loads((GOLDEN / "tiny_a.json").read_text())["config"])
    with torch.device("meta"):
        full, base = QwenVLForCausalLM(config), QwenVLForCausalLM(config)
        freeze(full, SimpleNamespace(fix_vit=True))
        adapted = add_adapters(base, LoraArguments(), base=tmp_path)
    assert trainable_names(full) == expected["full"]
    assert trainable_names(adapted) == expected["lora"]


def test_four_bits_are_for_the_decoder_alone(bare: QwenVLForCausalLM) -> None:
    linear = [name for name, module in bare.named_modules() if isinstance(module, torch.nn.Linear)]
    quantized = {name for name in linear if should_convert_module(name, NOT_QUANTIZED)}
    assert quantized == {name for name in linear if name.startswith("transformer.h.")}
    assert any(name.startswith("transformer.visual.") for name in linear)


def test_targets(bare: QwenVLForCausalLM) -> None:
    assert target_problems(bare, LoraArguments().lora_target_modules) == []
    result = "\n".join(map(str, target_problems(bare, ["c_attn", "q_proj", "ln_1", "mlp"])))
    for part in ("matches no module", "q_proj", "no layer of weights", "ln_1: transformer.", "mlp: transformer."):
        assert part in result


def test_adapter_weights(bare: QwenVLForCausalLM) -> None:
    options = LoraArguments(lora_r=2, lora_target_modules=["c_attn", "w1"])
    width, inner = 128, 128
    assert adapter_weights(bare, options) == 2 * 2 * ((width + 3 * width) + (width + inner))


def test_what_stays_whole_in_four_bits_keeps_its_precision() -> None:
    model = QwenVLForCausalLM(small_config()).bfloat16()
    adapted = add_adapters(model, LoraArguments(q_lora=True), base="Some-Base")
    kinds = {name: parameter.dtype for name, parameter in adapted.named_parameters() if "lora_" not in name}
    assert set(kinds.values()) == {torch.bfloat16}
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {torch.float32}
    assert all("lora_" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)
