"""How the benchmark of training sets its model up."""

import pytest

from tests.conftest import ROOT
from tests.qwen_vl.conftest import small_model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_recomputation_can_be_left_out(monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark
    import benchmark_training

    words = ["train", "--data_root", "x", *(["--lora"] if lora else [])]
    for flag, expected in (([], True), (["--no_gradient_checkpointing"], False)):
        options = benchmark.parse_arguments([*words, *flag])
        model = small_model()
        benchmark_training.prepare(model, options)
        assert model.is_gradient_checkpointing is expected
