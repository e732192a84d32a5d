"""Where weights are loaded to."""

from types import SimpleNamespace

import pytest
import torch

from finetune.model import placement


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
