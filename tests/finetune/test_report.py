import json
from pathlib import Path

import pytest
from PIL import Image

from finetune import report
from finetune.report import Throughput, model_flops, versions, write_report
from tests.qwen_vl.conftest import small_config


def test_report_and_curves(tmp_path: Path) -> None:
    history = [{"step": i, "loss": 10 / i, "learning_rate": 1e-3, "grad_norm": 1.0} for i in range(1, 6)]
    history.append({"step": 5, "train_runtime": 1.0})
    other = tmp_path / "other"
    other.mkdir()
    write_report([tmp_path, other], {"state": "finished"}, history)
    for folder in (tmp_path, other):
        result = json.loads((folder / "training.json").read_text())
        assert result["state"] == "finished"
        assert [entry["step"] for entry in result["log"]] == [1, 2, 3, 4, 5]
        with Image.open(folder / "loss.png") as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 3
    assert not list(tmp_path.glob(".*"))


def test_a_curve_that_cannot_be_drawn_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ImportError("no matplotlib here")

    monkeypatch.setattr(report, "draw_curves", broken)
    with pytest.warns(UserWarning, match=r"loss\.png could not be drawn: no matplotlib here"):
        write_report([tmp_path], {"state": "finished"}, [{"step": 1, "loss": 1.0}])
    assert json.loads((tmp_path / "training.json").read_text())["state"] == "finished"


def test_no_curve_without_a_step(tmp_path: Path) -> None:
    write_report([tmp_path], {}, [])
    assert not (tmp_path / "loss.png").exists()


def test_throughput() -> None:
    result = Throughput(steps=2, seconds=4, waiting=1, samples=8, tokens=300, positions=400, supervised=40).summary()
    assert result["samples_per_second"] == 2
    assert result["tokens_per_second"] == 75
    assert result["supervised_tokens_per_second"] == 10
    assert result["padding_share"] == 0.25
    assert result["waiting_for_data_share"] == 0.25
    assert Throughput().summary()["samples_per_second"] == 0


def test_versions_name_what_is_not_there() -> None:
    found = versions()
    assert found["torch"]
    assert found["python"]
    assert set(found) >= {"transformers", "deepspeed", "peft", "bitsandbytes"}


def test_utilisation_counts_the_models_own_work() -> None:
    """Of a decoder without attention to speak of: six operations a weight and token."""
    config = small_config()
    weights = 2 * (4 * 128**2 + 3 * 128 * 128)
    flops = model_flops(config, tokens=10, squares=0, supervised=0, images=0, lora=False)
    assert flops == 6 * weights * 10
    assert model_flops(config, tokens=10, squares=0, supervised=0, images=0, lora=True) == 4 * weights * 10
    half = Throughput(seconds=2, flops=989e12)
    assert half.utilisation("NVIDIA H100 80GB HBM3", 1) == 0.5
    assert half.utilisation("NVIDIA H100 80GB HBM3", 2) == 0.25
    assert half.utilisation(None, 1) is None
    assert half.since(Throughput(seconds=1, flops=1e12)) == Throughput(seconds=1, flops=988e12)
