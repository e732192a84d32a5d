"""Made-up texts for the engine's tests."""

import random
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def words() -> Callable[[int, int], str]:
    """(length, seed) -> words."""
    vocabulary = ["lamp", "speaks", "softly", "of", "rivers", "and", "stones", "while", "evening", "falls", "quiet"]

    def words(length: int, seed: int) -> str:
        return " ".join(random.Random(seed).choices(vocabulary, k=length))

    return words
