"""Whole runs: what is trained, what is saved, and what stops one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

import qwen_vl
from data_utils.errors import MMRoleError
from finetune.data import SupervisedDataset
from finetune.finetune import main
from finetune.model import is_chat_model
from finetune.trainer import SupervisedTrainer
from qwen_vl import QwenVLProcessor
from qwen_vl.vision import VisionAttention
from scripts import merge_lora
from tests.conftest import ROOT
from tests.finetune.conftest import Data, losses, report, run

Flags = Callable[..., list[str]]
SAME = {"rel": 1e-5}


def logits(folder: Path, data: Data, **more: object) -> torch.Tensor:
    """What a saved model makes of a prompt with an image."""
    model, tokenizer = qwen_vl.load(folder, dtype=torch.float32, device="cpu")
    ids = tokenizer("<img>0.png</img>What is this?", return_tensors="pt").input_ids
    processor = qwen_vl.QwenVLImageProcessor()
    with torch.no_grad():
        return model(ids, pixel_values=processor.load(data.root / "images" / "0.png")[None], **more).logits


def raw_base(base: Path, tmp_path: Path) -> Path:
    """The base as a model that has not learned ChatML."""
    raw = shutil.copytree(base, tmp_path / "Raw")
    settings = json.loads((raw / "generation_config.json").read_text()) | {"chat_format": "raw"}
    (raw / "generation_config.json").write_text(json.dumps(settings))
    return raw


def test_full_tuning(flags: Flags, base: Path, data: Data, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(flags(max_steps=4))
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    tower = {name for name in before if name.startswith("transformer.visual.") and ".attn_pool." not in name}
    # published: the tower is frozen, all of its resampler trains, `pos_embed` too.
    assert changed == before.keys() - tower
    assert "transformer.visual.attn_pool.pos_embed" in changed
    result = report(out)
    assert set(result["trainable"]) == changed
    assert result["state"] == "finished"
    assert (result["global_batch"], result["data"]["samples"], result["throughput"]["samples"]) == (4, 16, 16)
    assert result["throughput"]["padding_share"] == 0
    assert len(result["base"]["fingerprint"]) == 16
    assert len(losses(out)) == 4
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4
    for name in ("loss.png", "generation_config.json", "qwen.tiktoken", "modeling_qwen.py"):
        assert (out / name).is_file(), name
    assert not (out / ".saving").exists()
    assert not torch.equal(logits(out, data), logits(base, data))


def test_the_tower_trains_when_asked(flags: Flags, tmp_path: Path) -> None:
    main(flags(fix_vit=False, max_steps=1))
    assert "transformer.visual.conv1.weight" in report(tmp_path / "out")["trainable"]


def test_the_tower_is_recomputed_too_when_it_trains(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = [], VisionAttention.forward
    monkeypatch.setattr(VisionAttention, "forward", lambda block, x: calls.append(1) or forward(block, x))
    for name, recomputed in (("kept", False), ("recomputed", True)):
        calls.clear()
        more = {"fix_vit": False, "sequential": True, "max_steps": 1, "gradient_checkpointing": recomputed}
        main(flags(output_dir=tmp_path / name, **more))
        assert len(calls) == 2 * (1 + recomputed)  # two micro-batches
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "recomputed"), **SAME)


def test_whole_copies_train_in_float32(flags: Flags, base: Path, tmp_path: Path) -> None:
    """In bfloat16 a step of 1e-5 would round to nothing."""
    raw = raw_base(base, tmp_path)
    more = {"use_lora": True, "lora_bias": "all", "bf16": True, "learning_rate": 1e-5, "lr_scheduler_type": "constant"}
    main(flags(model_name_or_path=raw, **more))
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    before = load_file(base / "model.safetensors")
    moved = saved["base_model.model.lm_head.weight"] != before["lm_head.weight"].bfloat16().float()
    assert moved.float().mean() > 0.9
    assert any(name.endswith(("c_attn.base_layer.bias", "c_attn.bias")) for name in saved)


@pytest.mark.parametrize("more", [{"packing": False}, {"gradient_checkpointing": True}, {"dataloader_num_workers": 1}])
def test_how_it_is_computed_changes_nothing(flags: Flags, tmp_path: Path, more: dict[str, object]) -> None:
    main(flags(sequential=True, output_dir=tmp_path / "one"))
    main(flags(sequential=True, output_dir=tmp_path / "two", **more))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), **SAME)
    if "packing" in more:
        assert report(tmp_path / "two")["throughput"]["padding_share"] > 0


@pytest.mark.slow
def test_samples_are_shuffled_by_the_seed(flags: Flags, tmp_path: Path) -> None:
    runs = {"sequential": {"sequential": True}, "a": {"seed": 1}, "again": {"seed": 1}, "b": {"seed": 2}}
    for name, more in runs.items():
        main(flags(output_dir=tmp_path / name, max_steps=1, **more))
    found = {name: losses(tmp_path / name) for name in runs}
    assert found["a"] == found["again"]
    assert len({tuple(found[name]) for name in ("sequential", "a", "b")}) == 3


def test_lora_saves_an_adapter_that_loads_and_merges(
    flags: Flags, base: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    main(flags(use_lora=True, max_steps=3, gradient_checkpointing=True))
    assert "LoRA on 8 modules" in capsys.readouterr().out
    names = report(out)["trainable"]
    assert len(names) == 16
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in names)
    assert not any("visual" in name for name in names)
    config = json.loads((out / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == base.resolve()
    assert (out / "qwen.tiktoken").is_file()
    assert not (out / "model.safetensors").exists()
    assert type(AutoProcessor.from_pretrained(out)) is QwenVLProcessor
    adapted = logits(out, data)
    assert not torch.allclose(adapted, logits(base, data), atol=1e-4)
    assert merge_lora.main([str(out), str(whole)]) == 0
    torch.testing.assert_close(logits(whole, data), adapted, atol=1e-4, rtol=1e-4)
    with pytest.raises(MMRoleError, match="already exists"):
        merge_lora.main([str(out), str(whole)])


def test_embedding_and_head_train_unless_the_base_is_a_chat_model(
    flags: Flags, base: Path, data: Data, tmp_path: Path
) -> None:
    raw = raw_base(base, tmp_path)
    assert is_chat_model(base)
    assert not is_chat_model(raw)
    assert is_chat_model(tmp_path / "Some-Chat")  # published: the name alone decided
    main(flags(model_name_or_path=raw, use_lora=True))
    names = report(tmp_path / "out")["trainable"]
    assert [name for name in names if "lora" not in name] == [
        "base_model.model.transformer.wte.modules_to_save.default.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
    ]
    adapted = logits(tmp_path / "out", data)
    merge_lora.main([str(tmp_path / "out"), str(tmp_path / "whole")])
    torch.testing.assert_close(logits(tmp_path / "whole", data), adapted, atol=1e-4, rtol=1e-4)


def test_a_target_that_matches_nothing(flags: Flags) -> None:
    with pytest.raises(MMRoleError, match="matches no module") as caught:
        main([*flags(use_lora=True), "--lora_target_modules", "c_attn", "q_proj"])
    assert "q_proj" in str(caught.value)


def test_merging_refuses_what_cannot_be_merged(base: Path, tmp_path: Path) -> None:
    with pytest.raises(MMRoleError, match="holds no adapter"):
        merge_lora.main([str(base), str(tmp_path / "out")])
    quantized = shutil.copytree(base, tmp_path / "Int4")
    config = json.loads((quantized / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    (quantized / "config.json").write_text(json.dumps(config))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(quantized)}))
    with pytest.raises(MMRoleError, match="quantized weights") as caught:
        merge_lora.main([str(adapter), str(tmp_path / "out")])
    assert "--base_model" in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_run(flags: Flags, data: Data, tmp_path: Path) -> None:
    with pytest.raises(MMRoleError, match="loss is not finite") as caught:
        main(flags(sequential=True, learning_rate=1e30, max_steps=3, save_strategy="steps", save_steps=1))
    assert "at step 2" in str(caught.value)
    assert caught.value.value == ["sample_4", "sample_5"]
    assert not (tmp_path / "out" / "checkpoint-2").exists()
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SupervisedTrainer, "_get_grad_norm", lambda *_, **__: float("nan"))
    with pytest.raises(MMRoleError, match="gradient norm is not finite") as caught:
        main(flags(sequential=True))
    assert caught.value.value == [f"sample_{i}" for i in range(4)]


def test_a_loss_scale_that_is_too_large_is_no_reason_to_stop(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = iter([float("inf"), float("nan"), 1.0, float("inf")])
    monkeypatch.setattr(SupervisedTrainer, "_get_grad_norm", lambda *_, **__: next(norms))
    monkeypatch.setattr(SupervisedTrainer, "step_was_skipped", lambda _: True)  # float16 needs a GPU
    main(flags(max_steps=4))
    log = report(tmp_path / "out")["log"]
    assert [entry.get("grad_norm") for entry in log] == [None, None, 1.0, None]
    assert "Infinity" not in (tmp_path / "out" / "training.json").read_text()


def test_only_so_many_skipped_steps_in_a_row(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.trainer.MOST_OVERFLOWS", 2)
    monkeypatch.setattr(SupervisedTrainer, "_get_grad_norm", lambda *_, **__: float("inf"))
    monkeypatch.setattr(SupervisedTrainer, "step_was_skipped", lambda _: True)
    with pytest.raises(MMRoleError, match="gradient norm is not finite") as caught:
        main(flags(max_steps=5))
    assert "at step 3" in str(caught.value)


def test_a_first_step_that_learns_nothing_is_refused(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    make = SupervisedDataset.__getitem__

    def unlearned(self: SupervisedDataset, index: int) -> dict:
        sample = make(self, index)
        return {**sample, "labels": [-100] * len(sample["labels"])}

    monkeypatch.setattr(SupervisedDataset, "__getitem__", unlearned)
    with pytest.raises(MMRoleError, match="no supervised token") as caught:
        main(flags(sequential=True))
    assert caught.value.value == [f"sample_{i}" for i in range(4)]


def test_throughput_leaves_evaluation_out(flags: Flags, data: Data, tmp_path: Path) -> None:
    hour, clock = 3600, [1.0]

    class Slow(SupervisedTrainer):
        def evaluation_loop(self, *args: object, **kwargs: object) -> object:
            clock[0] += hour
            return super().evaluation_loop(*args, **kwargs)

        def training_step(self, *args: object, **kwargs: object) -> object:
            clock[0] += 1
            return super().training_step(*args, **kwargs)

    held_out = data.with_rows(data.rows[:2], "held_out.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.trainer.SupervisedTrainer", Slow)
        patch.setattr("finetune.trainer.time", SimpleNamespace(perf_counter=lambda: clock[0]))
        main(flags(eval_strategy="steps", eval_steps=1, eval_data_path=held_out))
    result = report(tmp_path / "out")
    assert result["throughput"]["seconds"] == 4  # two steps of two micro-batches
    assert [entry["hours_left"] for entry in result["log"]] == [round(2 / 3600, 3), 0]
    tokens = sum(entry["tokens_per_second"] * 2 for entry in result["log"])
    assert tokens == pytest.approx(result["throughput"]["tokens"], abs=1)


def test_evaluation_is_the_mean_over_all_supervised_tokens(flags: Flags, data: Data, tmp_path: Path) -> None:
    """However the samples are batched, and although their answers differ in length."""
    held_out = data.with_rows(data.rows[:5], "held_out.json")
    found = []
    for size in (1, 2, 8):
        out = tmp_path / str(size)
        more = {"eval_strategy": "steps", "eval_steps": 1, "eval_data_path": held_out, "output_dir": out}
        main(flags(**more, per_device_eval_batch_size=size))
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2]
        found.append([entry["eval_loss"] for entry in history if "eval_loss" in entry])
    assert found[0] == pytest.approx(found[1], **SAME)
    assert found[0] == pytest.approx(found[2], **SAME)
    assert all(loss > 0 for loss in found[0])


def test_the_best_model_is_kept_and_training_ends_early(flags: Flags, data: Data, tmp_path: Path) -> None:
    """At a learning rate that is far too high after the first update (which the warm-up runs at zero)."""
    out = tmp_path / "out"
    more = {"eval_split": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    more |= {"load_best_model_at_end": True, "early_stopping_patience": 2, "save_total_limit": 1, "max_steps": 9}
    more |= {"learning_rate": 1.0, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1}
    main(flags(**more))
    result = report(out)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    best = evaluated.index(min(evaluated)) + 1
    assert result["best_step"] == best
    assert len(evaluated) == best + 2  # patience
    assert result["stopped_early"]
    assert result["data"]["samples"] == len(data.rows) - 4
    kept = out / f"checkpoint-{best}" / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == kept.read_bytes()
    assert main(flags(**more, resume_from_checkpoint="auto")) == 0  # finished
    assert report(out) == result


def test_an_evaluation_set_drawn_from_the_training_data(flags: Flags, data: Data, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        main(flags(eval_split=0.25, eval_strategy="steps", max_steps=1, seed=seed, output_dir=tmp_path / name))
    states = {name: json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("a", "again", "b")}
    found = {name: [e["eval_loss"] for e in state["log_history"] if "eval_loss" in e] for name, state in states.items()}
    assert found["a"] == found["again"] != found["b"]
    assert report(tmp_path / "a")["data"]["samples"] == 12
    for wrong in (
        {"eval_split": 16, "eval_strategy": "epoch"},
        {"eval_split": 2, "eval_data_path": data.file},
        {"early_stopping_patience": 1},
    ):
        with pytest.raises(MMRoleError, match=r"nothing would be left|two sources|no best model"):
            main(flags(**wrong, output_dir=tmp_path / "wrong"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lose", "told"),
    [(signal.pause, "timed out"), (lambda: os.kill(os.getpid(), signal.SIGKILL), "DataLoader worker (pid")],
    ids=["hangs", "killed"],
)
def test_a_batch_that_a_worker_has_lost_is_an_error(
    flags: Flags, monkeypatch: pytest.MonkeyPatch, lose: Callable[[], object], told: str
) -> None:
    if told == "timed out":
        monkeypatch.setattr("finetune.trainer.SECONDS_FOR_A_BATCH", 1)
    monkeypatch.setattr(SupervisedDataset, "__getitem__", lambda *_: lose())
    with pytest.raises(MMRoleError, match="have lost a batch") as caught:
        main(flags(dataloader_num_workers=1))
    assert told in str(caught.value)
    assert "--dataloader_num_workers 0" in str(caught.value)


def test_the_samples_own_system_message(flags: Flags, data: Data, tmp_path: Path) -> None:
    rows = [{**row, "system": "You are somebody else altogether."} for row in data.rows]
    file = data.with_rows(rows, "system.json")
    for name, asked in (("published", False), ("own", True)):
        main(flags(data_path=file, use_sample_system=asked, output_dir=tmp_path / name, max_steps=1))
    assert losses(tmp_path / "published") != losses(tmp_path / "own")


def test_bfloat16_without_deepspeed(flags: Flags, tmp_path: Path) -> None:
    main(flags(bf16=True, sequential=True, output_dir=tmp_path / "half"))
    main(flags(sequential=True, output_dir=tmp_path / "whole"))
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "whole"), rel=0.05)
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_user_errors_have_no_traceback(flags: Flags) -> None:
    done = run(flags(learning_rat=1))
    assert done.returncode == 2
    assert "did you mean --learning_rate?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_several_processes_tell_a_problem_once(flags: Flags, base: Path, data: Data, tmp_path: Path) -> None:
    questions = [f"<img>images/gone_{number}.png</img>" for number in range(3)]
    rows = [{"id": q, "conversations": [{"from": "user", "value": q}]} for q in questions]
    file = data.with_rows(rows, "gone.json")
    spoiled = shutil.copytree(base, tmp_path / "Spoiled-Chat")
    (spoiled / "generation_config.json").write_text("[]")
    (spoiled / "model.safetensors").write_bytes(b"")
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    for words, count in ((flags(data_path=file, **small), 3), (flags(model_name_or_path=spoiled, max_steps=1), 2)):
        done = run(words, processes=2, seconds=200)
        assert done.returncode != 0
        assert done.stderr.count("error\nproblem:") + done.stderr.count(f"error\n{count} problems:") == 1
        assert "]: Traceback" not in done.stderr  # of a rank; the launcher has one of its own
        if count == 3:
            assert all(done.stderr.count(f"an image is missing\nvalue:   images/gone_{n}.png") == 1 for n in range(3))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "lora"), [("zero2", True), ("zero3", True), ("zero3_offload", False)])
def test_deepspeed(flags: Flags, base: Path, data: Data, tmp_path: Path, config: str, lora: bool) -> None:
    file = str(ROOT / "finetune" / f"ds_config_{config}.json")
    more = {"use_lora": lora, **({"lora_dropout": 0.0} if lora else {}), "sequential": True}
    main(flags(output_dir=tmp_path / "plain", **more))
    done = run(flags(deepspeed=file, **more))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "plain"), **SAME)
    # Adam's first steps are as large where a gradient is almost zero, and there float32's rounding decides.
    expected = logits(tmp_path / "plain", data)
    torch.testing.assert_close(logits(tmp_path / "out", data), expected, atol=5e-3, rtol=0)
    assert (expected - logits(base, data)).abs().max() > 0.05


@pytest.mark.slow
def test_two_processes_one_without_images_do_not_hang(flags: Flags, data: Data, tmp_path: Path) -> None:
    with_image = [row for row in data.rows if "<img>" in row["conversations"][0]["value"]]
    without = [row for row in data.rows if "<img>" not in row["conversations"][0]["value"]]
    file = data.with_rows([row for pair in zip(with_image, without, strict=False) for row in pair], "alternating.json")
    more = {"data_path": file, "sequential": True, "per_device_train_batch_size": 1}
    main(flags(output_dir=tmp_path / "plain", gradient_accumulation_steps=2, **more))
    config = str(ROOT / "finetune" / "ds_config_zero3.json")
    done = run(flags(gradient_accumulation_steps=1, deepspeed=config, **more), processes=2, seconds=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "plain"), **SAME)
