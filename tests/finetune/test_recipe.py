"""The released scripts' training recipe, to the letter, through the scripts themselves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

import qwen_vl
from data_utils.errors import MMRoleError
from finetune.arguments import parse_arguments
from finetune.data import SupervisedDataset
from finetune.finetune import main
from finetune.preflight import deepspeed_problems
from finetune.trainer import WarmupRate
from tests.conftest import ROOT
from tests.finetune.conftest import SECONDS, Data, losses, report
from tests.golden_checkpoint import GOLDEN
from tests.processes import run_group

Flags = Callable[..., list[str]]
SAME = {"rel": 1e-5}


def published_schedule() -> dict[str, Any]:
    return json.loads((GOLDEN / "published_schedule.json").read_text())


def script(name: str, base: Path, data: Data, out: Path, *flags: str, **settings: str) -> str:
    """Runs a training script on the CPU in float32; gives what it printed."""
    environ = {**os.environ, "MODEL_PATH": str(base), "DATA_ROOT": str(data.root), "DATA_PATH": str(data.file)}
    environ |= {"OUTPUT_DIR": str(out), "GLOBAL_BATCH": "16", **settings}
    command = ["bash", ROOT / "finetune" / f"{name}.sh", "--disable_tqdm", "True", "--bf16", "False"]
    done = run_group([*command, *flags], SECONDS, env=environ, stderr=subprocess.STDOUT, cwd="/")
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def group_mean(base: Path, data: Data, group: int) -> float:
    """The loss of all samples in the order of the file, as its definition says."""
    model, tokenizer = qwen_vl.load(base, dtype=torch.float32, device="cpu")
    dataset = SupervisedDataset(data.rows, tokenizer, data_root=data.root)
    sums, counts = [], []
    model.train()
    for sample in map(dataset.__getitem__, range(len(dataset))):
        labels = torch.tensor([sample["labels"]])
        with torch.no_grad():
            out = model(torch.tensor([sample["input_ids"]]), pixel_values=sample["pixel_values"], labels=labels)
        counts.append((labels[:, 1:] != -100).sum().item())
        sums.append(out.loss.item() * counts[-1])
    groups = range(0, len(sums), group)
    return sum(sum(sums[i : i + group]) / sum(counts[i : i + group]) for i in groups) / len(groups)


@pytest.mark.parametrize("kind", ["agent", "reward_model", "small"])
def test_the_schedule_is_the_published_one(kind: str) -> None:
    expected = published_schedule()[kind]
    rate = WarmupRate(expected["warmup_updates"])
    found = [expected["peak"] * rate(update) for update in range(expected["updates"])]
    used = expected.get("used") or expected["used_first_40"]
    assert found[: len(used)] == pytest.approx(used, rel=1e-12)
    assert set(found[expected.get("constant_from_update", len(used)) :]) <= {expected["peak"]}


@pytest.mark.parametrize(("recipe", "updates"), [("agent", 1002), ("reward_model", 900)])
def test_the_warm_up_is_a_hundredth_of_the_updates(flags: Flags, recipe: str, updates: int) -> None:
    training = parse_arguments(flags(recipe=recipe, global_batch_size=8))[0].training
    assert training.get_warmup_steps(updates) == published_schedule()[recipe]["warmup_updates"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe", "group", "processes", "epochs", "length"),
    [("finetune_ds", "agent", 8, 1, 3, 3072), ("finetune_RM_ds", "reward_model", 4, 2, 10, 4096)],
)
def test_a_script_trains_by_the_recipe(
    base: Path, data: Data, tmp_path: Path, name: str, recipe: str, group: int, processes: int, epochs: int, length: int
) -> None:
    out = tmp_path / "out"
    per_epoch = {"agent": 64, "reward_model": 32}[recipe] // 16  # the sixteen samples, filled up
    updates = epochs * per_epoch
    printed = script(name, base, data, out, "--sequential", PROCESSES=str(processes), MICRO_BATCH="2")
    filled = 16 * per_epoch
    assert f"{updates} steps over 16 samples, each epoch filled up to {filled}; the loss" in printed
    result = report(out)
    assert result["recipe"] == {"name": recipe, "changed": {"global_batch_size": 16}}
    log = result["log"]
    assert [entry["step"] for entry in log] == list(range(1, updates + 1))
    assert log[0]["loss"] == pytest.approx(group_mean(base, data, group), **SAME)
    warmup = max(2, math.ceil(updates / 100))
    rates = [1e-5 * (math.log(n) / math.log(warmup) if n <= warmup else 1) for n in range(1, updates + 1)]
    assert [entry["learning_rate"] for entry in log] == pytest.approx(rates)  # after each update, as published
    assert [entry["epoch"] for entry in log] == pytest.approx([n / per_epoch for n in range(1, updates + 1)], abs=0.01)
    options = result["options"]
    wanted = {"learning_rate": 1e-5, "weight_decay": 0.05, "adam_beta1": 0.9, "adam_beta2": 0.95, "fix_vit": True}
    wanted |= {"num_train_epochs": float(epochs), "model_max_length": length, "max_grad_norm": 1.0, "fill_to": filled}
    wanted |= {"gradient_checkpointing": True, "use_lora": False, "decay_all": True, "adam_epsilon": 1e-8}
    assert {key: options[key] for key in wanted} == wanted
    assert result["identity"]["ZeRO stage"] == 3
    saved = sorted(int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*"))
    assert saved == [per_epoch * epoch for epoch in range(1, epochs + 1)]
    for step in saved:
        qwen_vl.load(out / f"checkpoint-{step}", device="cpu")
        assert bool(list(out.glob(f"checkpoint-{step}/**/*optim_states.pt"))) == (step == saved[-1])
    qwen_vl.load(out, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_sharding_changes_nothing(flags: Flags, base: Path, data: Data, tmp_path: Path, zero: str) -> None:
    main(flags(recipe="agent", global_batch_size=16, max_steps=3, output_dir=tmp_path / "plain"))
    config = str(ROOT / "finetune" / f"ds_config_{zero}.json")
    more = ("--deepspeed", config, "--max_steps", "3", "--learning_rate", "1e-3", "--save_strategy", "no")
    script("finetune_ds", base, data, tmp_path / "two", *more, PROCESSES="2", MICRO_BATCH="4")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "plain"), **SAME)


def gradient(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """After one step of plain descent at rate 1 the weights have moved by it."""
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    return {name: before[name] - after[name] for name in before}


@pytest.fixture
def uneven(data: Data) -> Path:
    """Samples whose answers differ much in length, so that different means differ too."""
    rows = []
    for number, row in enumerate(data.rows):
        question, answer = row["conversations"]
        answer = {**answer, "value": "".join(chr(97 + (number + i) % 26) for i in range(2 + 60 * (number % 3)))}
        rows.append({**row, "conversations": [question, answer]})
    return data.with_rows(rows, "uneven.json")


def one_step(flags: Flags, **changes: object) -> list[str]:
    """The agent's recipe with an optimizer that shows the gradient."""
    plain = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0, "max_grad_norm": 0, "max_steps": 1}
    return flags(recipe="agent", global_batch_size=16, **plain, **changes)


def assert_same(folders: list[Path], base: Path) -> None:
    first = gradient(folders[0], base)
    assert sum(bool(value.abs().max()) for value in first.values()) > 20
    for folder in folders[1:]:
        assert losses(folder) == pytest.approx(losses(folders[0]), **SAME)
        for name, value in gradient(folder, base).items():
            torch.testing.assert_close(value, first[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


EACH_IN_TURN = """
import json, sys
from finetune.finetune import main
from finetune.preflight import deepspeed_problems
for words in json.loads(sys.argv[1]):
    main(words)
"""


@pytest.mark.slow
def test_loss_and_gradients_do_not_depend_on_the_micro_batch(
    flags: Flags, base: Path, uneven: Path, tmp_path: Path
) -> None:
    runs = {str(size): one_step(flags, data_path=uneven, per_device_train_batch_size=size) for size in (1, 2, 4, 8)}
    runs["padded"] = one_step(flags, data_path=uneven, per_device_train_batch_size=2, packing=False)
    runs["micro"] = one_step(flags, data_path=uneven, per_device_train_batch_size=2, loss_group="micro")
    for name, words in runs.items():
        main([*words, "--output_dir", str(tmp_path / name)])
    assert_same([tmp_path / name for name in runs if name != "micro"], base)
    # The mean over micro-batches, as transformers takes it, is another loss.
    gap = abs(losses(tmp_path / "micro")[0] - losses(tmp_path / "2")[0])
    assert gap > 100 * 1e-5 * losses(tmp_path / "2")[0]


@pytest.mark.slow
def test_loss_and_gradients_do_not_depend_on_the_number_of_processes(
    flags: Flags, base: Path, uneven: Path, tmp_path: Path
) -> None:
    sizes = (1, 2, 4, 8)
    words = {n: one_step(flags, data_path=uneven, per_device_train_batch_size=n) for n in sizes}
    runs = [[*words[n], "--output_dir", str(tmp_path / str(n))] for n in sizes]
    main([*one_step(flags, data_path=uneven, per_device_train_batch_size=4), "--output_dir", str(tmp_path / "one")])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", "2"]
    program = tmp_path / "each.py"
    program.write_text(EACH_IN_TURN)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = run_group([sys.executable, *launcher, program, json.dumps(runs)], SECONDS, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same([tmp_path / "one", *(tmp_path / str(n) for n in sizes)], base)


def test_lora_takes_the_same_loss(flags: Flags, tmp_path: Path) -> None:
    for size in (1, 4):
        more = {"use_lora": True, "lora_dropout": 0.0, "max_steps": 2, "per_device_train_batch_size": size}
        main(flags(recipe="agent", global_batch_size=16, output_dir=tmp_path / str(size), **more))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), **SAME)


def test_all_tokens_of_a_step_can_be_one_group(flags: Flags, base: Path, data: Data, tmp_path: Path) -> None:
    main(flags(sequential=True, gradient_accumulation_steps=8, max_steps=1, loss_group="step"))
    assert losses(tmp_path / "out")[0] == pytest.approx(group_mean(base, data, 16), **SAME)


def test_every_weight_decays(flags: Flags, tmp_path: Path, base: Path) -> None:
    """Without a gradient's part what is left of a step is the decay."""
    names = {}
    for decay_all in (True, False):
        more = {"optim": "adamw_torch", "adam_epsilon": 1e12, "weight_decay": 1.0, "learning_rate": 0.5, "max_steps": 1}
        main(flags(recipe="agent", global_batch_size=16, decay_all=decay_all, overwrite_output_dir=True, **more))
        before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
        names[decay_all] = {n for n in before if before[n].any() and torch.allclose(after[n], before[n] / 2)}
        zero = {n for n in before if not before[n].any()}
    trainable = set(report(tmp_path / "out")["trainable"])
    assert names[True] | (zero & trainable) == trainable
    assert "transformer.h.0.ln_1.weight" in names[True]
    assert not any(name.endswith("bias") for name in names[False])


@pytest.mark.slow
def test_what_is_kept_to_resume_from(flags: Flags, tmp_path: Path) -> None:
    """One checkpoint to resume from, and all epochs' weights; the stream goes on, also in other micro-batches."""
    out = tmp_path / "out"
    more = {"recipe": "agent", "global_batch_size": 16, "max_steps": 6, "resume_save_steps": 3}
    more["save_strategy"] = "epoch"
    main(flags(**more))
    six, weights = losses(out), load_file(out / "model.safetensors")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    main(flags(**{**more, "max_steps": 5}, overwrite_output_dir=True))
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    assert not list(out.glob("checkpoint-4/optimizer.pt"))
    main(flags(**more, resume_from_checkpoint="auto", per_device_train_batch_size=4))
    assert losses(out) == pytest.approx(six, **SAME)
    found = load_file(out / "model.safetensors")
    assert all(torch.allclose(weights[name], found[name], atol=1e-4) for name in weights)


def test_an_older_resume_checkpoint_goes_when_there_is_a_newer_one(flags: Flags, tmp_path: Path) -> None:
    main(flags(save_strategy="epoch", resume_save_steps=1, max_steps=3))
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"global_batch_size": 20}, "global batch of 16 or 24"),
        ({"global_batch_size": 128}, "global batch of 64 or a smaller multiple of 8"),
        ({"global_batch_size": 12, "per_device_train_batch_size": 3}, "global batch of 24, or"),
        ({"global_batch_size": 72, "per_device_train_batch_size": 3}, "global batch of 48 or a smaller multiple of 24"),
        ({"global_batch_size": 80, "per_device_train_batch_size": 80}, "a smaller micro-batch"),
        ({"lr_scheduler_type": "WarmupLR"}, "use one of warmup_lr"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr cannot be made"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"cycles": 2}'}, "cycles"),
        ({"loss_group": "00"}, "a number from 1"),
        ({"loss_group": "all"}, "a number from 1"),
    ],
)
def test_what_the_recipe_cannot_be(flags: Flags, more: dict[str, object], expected: str) -> None:
    with pytest.raises(MMRoleError) as caught:
        main(flags(**{"recipe": "agent", "global_batch_size": 16, **more}))
    assert expected in str(caught.value)


def test_deepspeed_blocks_that_override_flags_are_refused(flags: Flags, tmp_path: Path) -> None:
    config = json.loads((ROOT / "finetune" / "ds_config_zero3.json").read_text())
    config |= {"scheduler": {"type": "WarmupLR"}, "optimizer": {"type": "AdamW"}}
    file = tmp_path / "own.json"
    file.write_text(json.dumps(config))
    with pytest.raises(MMRoleError) as caught:
        parse_arguments(flags(deepspeed=file))
    for part in ("a scheduler block", "a optimizer block", "--lr_scheduler_type", "--weight_decay", "WarmupLR"):
        assert part in str(caught.value)


def test_a_deepspeed_config_that_contradicts_a_flag_is_refused(flags: Flags, tmp_path: Path) -> None:
    training = parse_arguments(flags(per_device_train_batch_size=2, max_grad_norm=1.0))[0].training
    assert deepspeed_problems(training) == []
    training.deepspeed = str(tmp_path / "own.json")
    training.hf_deepspeed_config = HfTrainerDeepSpeedConfig({"gradient_clipping": 0.5, "train_batch_size": "auto"})
    training.hf_deepspeed_config.trainer_config_process(training)
    [problem] = deepspeed_problems(training)
    assert "gradient_clipping=0.5 vs hf max_grad_norm=1.0" in str(problem)


def test_a_schedule_of_transformers_remains_a_choice(flags: Flags, tmp_path: Path) -> None:
    main(flags(recipe="agent", global_batch_size=16, max_steps=4, lr_scheduler_type="cosine", warmup_steps=0))
    rates = [entry["learning_rate"] for entry in report(tmp_path / "out")["log"]]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(1, 5)])
    assert report(tmp_path / "out")["recipe"]["changed"]["lr_scheduler_type"] == "cosine"


def test_user_flags_come_after_the_recipe(flags: Flags) -> None:
    training = parse_arguments(flags(recipe="reward_model", global_batch_size=16, loss_group=2))[0].training
    assert (training.group_size, training.fill_to, training.num_train_epochs) == (2, 32, 10.0)
