"""The released trainer's losses, learning rates, names and norms, through the real command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.conftest import ROOT
from tests.finetune.conftest import report, run

ZERO3 = str(ROOT / "finetune" / "ds_config_zero3.json")


def golden(shared: Path, mode: str) -> dict[str, Any]:
    return json.loads((shared / "golden" / "train" / f"loop_{mode}.json").read_text(encoding="utf-8"))


def train(shared: Path, base: Path, tmp_path: Path, *more: str, processes: int = 1, accumulation: int = 2) -> Path:
    """The golden run, with the released scripts' spelling of the flags, from the golden folder."""
    rows = json.loads((shared / "golden" / "train" / "train.json").read_text(encoding="utf-8"))[:24]
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    out = tmp_path / "out"
    words = ["--model_name_or_path", str(base), "--data_path", str(tmp_path / "train.json"), "--output_dir", str(out)]
    words += ["--num_train_epochs", "2", "--per_device_train_batch_size", "2", "--fix_vit", "True", "--bf16", "False"]
    words += ["--gradient_accumulation_steps", str(accumulation), "--evaluation_strategy", "no"]
    words += ["--save_strategy", "no", "--learning_rate", "1e-3", "--weight_decay", "0.05", "--adam_beta2", "0.95"]
    words += ["--warmup_ratio", "0.1", "--lr_scheduler_type", "cosine", "--logging_steps", "1", "--report_to", "none"]
    words += ["--model_max_length", "1280", "--lazy_preprocess", "True", "--sequential", "--disable_tqdm", "True"]
    done = run([*words, *more], processes=processes, seconds=580, cwd=shared / "golden")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("old spellings") == 1
    return out


def compare_log(out: Path, expected: dict[str, Any]) -> None:
    log = report(out)["log"]
    assert [entry["step"] for entry in log] == [entry["step"] for entry in expected["log"]]
    assert [entry["learning_rate"] for entry in log] == [entry["learning_rate"] for entry in expected["log"]]
    assert [entry["loss"] for entry in log] == pytest.approx([entry["loss"] for entry in expected["log"]], abs=2e-3)
    assert report(out)["trainable"] == expected["trainable"]


def compare_norms(out: Path, expected: dict[str, Any]) -> None:
    norms = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            norms |= {name: weights.get_tensor(name).double().norm().item() for name in weights.keys()}  # noqa: SIM118
    wanted = {name: norm for name, (_, norm) in expected["final_sum_and_norm"].items()}
    assert norms == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
def test_lora_loop(shared: Path, tiny_a: Path, tmp_path: Path) -> None:
    out = train(shared, tiny_a, tmp_path, "--use_lora", "True", "--max_steps", "2")
    compare_log(out, golden(shared, "lora"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (1, []),
        (1, ["--packing", "False", "--gradient_checkpointing", "True"]),
        (2, ["--deepspeed", ZERO3]),
    ],
    ids=["plain", "padded-recomputed", "2-zero3"],
)
def test_full_loop(shared: Path, tiny_a: Path, tmp_path: Path, processes: int, more: list[str]) -> None:
    out = train(shared, tiny_a, tmp_path, *more, processes=processes, accumulation=2 // processes)
    compare_log(out, golden(shared, "full"))
    compare_norms(out, golden(shared, "full"))
