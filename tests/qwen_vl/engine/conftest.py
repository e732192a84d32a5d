"""A model that samples, for the engine's tests."""

import random
from collections.abc import Callable

import pytest

from qwen_vl import QwenVLForCausalLM
from tests.qwen_vl.conftest import small_model


@pytest.fixture(scope="session")
def sampler() -> QwenVLForCausalLM:
    """A model whose own settings sample; its training length lies between the requests' lengths."""
    model = small_model(seq_length=200)
    model.generation_config.update(do_sample=True, top_p=0.5, top_k=0, max_new_tokens=8)
    return model


@pytest.fixture(scope="session")
def words() -> Callable[[int, int], str]:
    """(length, seed) -> words."""
    vocabulary = ["lamp", "speaks", "softly", "of", "rivers", "and", "stones", "while", "evening", "falls", "quiet"]

    def words(length: int, seed: int) -> str:
        return " ".join(random.Random(seed).choices(vocabulary, k=length))

    return words
