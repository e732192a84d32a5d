"""A model small enough for every test: byte vocabulary, width 128, training length 32, so NTK shows early."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from qwen_vl import QwenVLConfig, QwenVLForCausalLM
from tests.conftest import RANKS

SEQ_LENGTH = 32


def small_config(**changes: object) -> QwenVLConfig:
    visual = {"heads": 2, "image_size": 448, "image_start_id": RANKS + 214, "layers": 1, "mlp_ratio": 2.0}
    visual |= {"output_dim": 128, "patch_size": 14, "width": 32}
    fields = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "kv_channels": 32, "seq_length": SEQ_LENGTH, "visual": visual}
    return QwenVLConfig(**(fields | changes))


def small_model(**changes: object) -> QwenVLForCausalLM:
    """Random weights, drawn wide enough that the logits, and so the greedy tokens, are far apart."""
    torch.manual_seed(0)
    model = QwenVLForCausalLM(small_config(initializer_range=0.15, **changes)).eval()
    model.generation_config.update(do_sample=False, max_new_tokens=8, pad_token_id=RANKS, eos_token_id=RANKS)
    return model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Work this small is slower on several threads, by far where other processes want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model() -> QwenVLForCausalLM:
    return small_model()


@pytest.fixture(scope="session")
def sampler() -> QwenVLForCausalLM:
    """A model whose own settings sample; its training length lies between the requests' lengths."""
    model = small_model(seq_length=200)
    model.generation_config.update(do_sample=True, top_p=0.5, top_k=0, max_new_tokens=8)
    return model


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.radial_gradient("L").convert("RGB").save(file)
    return file
