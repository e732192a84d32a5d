"""Settings that would give wrong answers are refused at the start, with what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import needs_vllm

pytestmark = needs_vllm


def configure(folder: Path, **settings: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    fixed = {"tokenizer_mode": "qwen_vl", "dtype": "float32", "enforce_eager": True}
    return EngineArgs(str(folder), **{**fixed, **settings}).create_engine_config()


def test_settings_of_a_checkpoint(own_checkpoint: Path) -> None:
    config = configure(own_checkpoint)
    assert config.model_config.max_model_len == 8192
    assert config.model_config.hf_config.trained_length == 2048
    assert not config.use_v2_model_runner


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"tokenizer_mode": "auto"}, "--tokenizer-mode qwen_vl"),
        ({"skip_tokenizer_init": True}, "no tokenizer"),
        ({"enable_prompt_embeds": True}, "cannot be told from embeddings"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "between engines"),
        ({"quantization": "fp8"}, "quantized"),
        ({"kv_cache_dtype": "fp8"}, "so few bits"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_refused(settings: dict[str, Any], advice: str, own_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=advice):
        configure(own_checkpoint, **settings)


def test_an_incomplete_checkpoint_is_refused(own_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "qwen.tiktoken"):
        (tmp_path / name).write_bytes((own_checkpoint / name).read_bytes())
    with pytest.raises(ValueError, match=r"not complete, it lacks: the weights"):
        configure(tmp_path)


@pytest.mark.parametrize("name", ["VLLM_USE_V2_MODEL_RUNNER", "VLLM_USE_RUST_FRONTEND"])
def test_variables_that_are_refused(name: str, own_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"vllm.envs.{name}", True, raising=False)
    with pytest.raises(ValueError, match=f"unset {name}"):
        configure(own_checkpoint)


def test_another_version_is_refused(own_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    from qwen_vl.vllm_plugin import compatibility, register
    from qwen_vl.vllm_plugin.configuration import QwenVLServingConfig

    register()
    assert compatibility.incompatibilities() == []
    monkeypatch.setattr(compatibility, "installed_version", lambda: "0.40.1")
    register()
    try:
        with pytest.raises(RuntimeError, match=r"(?s)vLLM 0\.40\.1 is installed.*>=0\.32,<0\.33"):
            AutoConfig.from_pretrained(own_checkpoint)
    finally:
        AutoConfig.register("qwen", QwenVLServingConfig, exist_ok=True)


def test_a_changed_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.core import EngineCore

    from qwen_vl.vllm_plugin.compatibility import incompatibilities

    def changed(self: EngineCore, request: object, wave: int) -> None: ...

    monkeypatch.setattr(EngineCore, "preprocess_add_request", changed)
    monkeypatch.delitem(SamplingParams.__annotations__, "stop_token_ids")
    problems = incompatibilities()
    assert len(problems) == 2
    assert "preprocess_add_request takes" in problems[0]
    assert "has no stop_token_ids" in problems[1]


def test_a_missing_weight_is_named(own_checkpoint: Path, start: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in own_checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(own_checkpoint / "model.safetensors")
    del weights["transformer.h.1.mlp.w2.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights: decoder\.h\.1\.mlp\.gate"):
        start(tmp_path, max_model_len=2048)


def test_tokens_as_strings(own_checkpoint: Path) -> None:
    from qwen_vl.vllm_plugin.tokenizer import ServingTokenizer

    tokenizer = ServingTokenizer.from_pretrained(own_checkpoint)
    ids = list(range(len(tokenizer)))
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.get_vocab() == dict(zip(tokens, ids, strict=True))
    assert tokenizer.convert_tokens_to_ids(tokens) == ids
    text = "Grüße, 一幅画 <ref>x</ref> <|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
