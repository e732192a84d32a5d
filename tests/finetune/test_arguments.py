"""The command line: what it understands, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_utils.errors import MMRoleError
from finetune.arguments import RETIRED, accumulation_steps, modern_spelling, parse_arguments
from tests.conftest import ROOT

Flags = Callable[..., list[str]]


def test_old_spellings_are_mapped_with_a_line_each() -> None:
    words = ["--evaluation_strategy", "no", "--lazy_preprocess", "True", "--warmup_ratio=0.01", "--bf16", "True"]
    modern, notices = modern_spelling(words)
    assert modern == ["--eval_strategy", "no", "--warmup_steps=0.01", "--bf16", "True"]
    assert len(notices) == 3
    assert modern_spelling(["--lazy_preprocess", "--bf16"])[0] == ["--bf16"]


def test_the_released_command_line_is_understood(flags: Flags, tmp_path: Path) -> None:
    words = flags(per_device_eval_batch_size=1, evaluation_strategy="no", save_steps=1000, save_total_limit=10)
    words += ["--warmup_ratio", "0.01", "--adam_beta2", "0.95", "--lr_scheduler_type", "cosine", "--use_lora", "False"]
    words += ["--fix_vit", "True", "--report_to", "none", "--gradient_checkpointing", "True", "--q_lora", "False"]
    words += [word for name in RETIRED for word in (name, "x")]
    options, notices = parse_arguments(words)
    training = options.training
    assert training.get_warmup_steps(1000) == 10
    assert training.gradient_checkpointing is True
    assert training.report_to == []
    assert str(training.output_dir) == str(tmp_path / "out")
    assert options.lora.lora_target_modules == ["c_attn", "attn.c_proj", "w1", "w2"]
    assert (options.lora.lora_r, options.lora.lora_alpha, options.lora.lora_dropout) == (64, 16, 0.05)
    assert len(notices) == len(RETIRED) + 2


def test_defaults_are_ours(flags: Flags) -> None:
    training = parse_arguments(flags())[0].training
    assert training.use_cpu is True
    assert training.model_max_length == 3072
    assert training.fix_vit is True
    assert training.packing is True
    assert training.remove_unused_columns is False
    assert training.zero_stage == 0
    assert training.samples_per_step == 4


def test_the_global_batch_decides_the_accumulation(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_arguments(flags(global_batch_size=16))[0].training.gradient_accumulation_steps == 8
    with pytest.raises(MMRoleError, match="does not divide"):
        parse_arguments(flags(global_batch_size=15))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(MMRoleError, match=r"3 process\(es\)"):
        parse_arguments(flags(global_batch_size=16))


def test_all_that_is_wrong_is_reported_at_once(flags: Flags) -> None:
    words = flags(fp16=True, deepspeed="nowhere.json", push_to_hub=True, model_max_length=0)
    with pytest.raises(MMRoleError) as caught:
        parse_arguments([*words, "--learning_rat", "1"])
    result = str(caught.value)
    parts = ("did you mean --learning_rate?", "nowhere.json", "float16 overflows", "--push_to_hub")
    for part in (*parts, "--model_max_length 0"):
        assert part in result


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("lora_r", 0, "from 1"),
        ("lora_dropout", 1.0, "from 0 to below 1"),
        ("learning_rate", "nan", "from 0"),
        ("learning_rate", "inf", "from 0"),
        ("weight_decay", -1.0, "from 0"),
        ("adam_beta2", 1.5, "below 1"),
        ("num_train_epochs", 0.0, "above 0"),
        ("per_device_train_batch_size", 0, "from 1"),
        ("gradient_accumulation_steps", 0, "from 1"),
        ("global_batch_size", -4, "from 1"),
        ("dataloader_num_workers", -1, "from 0"),
        ("save_strategy", "best", "steps, epoch or no"),
        ("save_on_each_node", True, "not supported here"),
        ("seed", -1, "from 0 to below"),
        ("data_seed", 2**32, "from 0 to below"),
    ],
)
def test_values_that_would_fail_late(flags: Flags, flag: str, value: object, expected: str) -> None:
    with pytest.raises(MMRoleError) as caught:
        parse_arguments(flags(**{flag: value}))
    assert f"--{flag} {value}" in str(caught.value)
    assert expected in str(caught.value)


def test_values_that_can_be(flags: Flags) -> None:
    more = {"learning_rate": 0, "max_grad_norm": 0, "save_total_limit": 1, "save_steps": 0.5, "warmup_steps": 0}
    assert parse_arguments(flags(**more))[0].training.learning_rate == 0


def test_a_run_that_goes_on_keeps_its_optimizer_state(flags: Flags) -> None:
    parse_arguments(flags(save_only_model=True, resume_from_checkpoint="False"))
    with pytest.raises(MMRoleError, match="resumable again"):
        parse_arguments(flags(save_only_model=True, resume_from_checkpoint="auto"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eval_split": 0.5}, "no evaluation"),
        ({"eval_data_path": "x.json"}, "no evaluation"),
        ({"metric_for_best_model": "accuracy"}, "lowest loss"),
        ({"greater_is_better": True}, "lowest loss"),
        ({"lora_r": 8}, "--lora_r"),
        ({"use_lora": True, "fix_vit": False}, "--fix_vit False"),
        ({"save_only_model": True, "resume_save_steps": 2}, "--resume_save_steps 0"),
        ({"lr_scheduler_type": "warmup_lr", "lr_scheduler_kwargs": '{"a": 1}'}, "--lr_scheduler_kwargs"),
    ],
    ids=str,
)
def test_flags_that_have_no_effect_together(flags: Flags, changes: dict[str, object], expected: str) -> None:
    with pytest.raises(MMRoleError) as caught:
        parse_arguments(flags(**changes))
    assert expected in str(caught.value)


def test_a_value_that_cannot_be(flags: Flags) -> None:
    with pytest.raises(MMRoleError, match="max_steps"):
        parse_arguments(flags(max_steps="many"))
    with pytest.raises(MMRoleError, match="required"):
        parse_arguments(["--output_dir", "x"])


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_configs_need_no_compiler(name: str) -> None:
    text = (ROOT / "finetune" / f"ds_config_{name}.json").read_text()
    assert json.loads(text)["data_types"] == {"grad_accum_dtype": "fp32"}  # otherwise the model's: bfloat16
    assert '"optimizer"' not in text
    assert '"scheduler"' not in text
    if "offload" in name:
        assert '"zero_force_ds_cpu_optimizer": false' in text
    if "zero3" in name:
        assert '"stage3_gather_16bit_weights_on_model_save": true' in text


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "processes", "steps"), [(256, 2, 8, 16), (256, 1, 1, 256), (4, 2, 2, 1)]
)
def test_accumulation(global_batch: int, micro_batch: int, processes: int, steps: int) -> None:
    assert accumulation_steps(global_batch, micro_batch, processes) == steps


def test_what_cannot_divide_lists_what_can() -> None:
    with pytest.raises(MMRoleError) as caught:
        accumulation_steps(256, 3, 8)
    result = str(caught.value)
    assert "global batch 256, micro-batch 3, 8 process(es)" in result
    assert "micro-batch 1, 2, 4, 8, 16, 32 with these 8 process(es)" in result
    assert "global batch 240 or 264" in result
    with pytest.raises(MMRoleError, match="does not divide") as caught:
        accumulation_steps(256, 2, 6)
    assert "1, 2, 4, 8, 16, 32, 64, 128 process(es) with this micro-batch" in str(caught.value)
    assert "with these 6 process(es)" not in str(caught.value)
    with pytest.raises(MMRoleError, match="global batch 240 or 264"):  # 252 would be refused next
        accumulation_steps(256, 2, 6, 8)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (8, 0, 1), (-8, 2, 1)])
def test_numbers_must_be_positive(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(MMRoleError, match="does not divide"):
        accumulation_steps(*numbers)


@pytest.mark.parametrize(
    "words",
    [
        ["--label_smoothing_factor", "0.9"],
        ["--use_liger_kernel", "True"],
        ["--train_sampling_strategy", "group_by_length"],
        ["--enable_jit_checkpoint", "True"],
        ["--ignore_data_skip", "True"],
        ["--dataloader_drop_last", "True"],
        ["--bf16_full_eval", "True"],
        ["--group_by_length", "True"],
        ["--use_cache", "True"],
        ["--dataloader_in_order", "False"],
        ["--average_tokens_across_devices", "False"],
        ["--eval_do_concat_batches", "False"],
        ["--accelerator_config", '{"split_batches": true}'],
    ],
    ids=lambda words: words[0],
)
def test_what_would_have_no_effect_is_refused(flags: Flags, words: list[str]) -> None:
    with pytest.raises(MMRoleError, match="not supported here") as caught:
        parse_arguments([*flags(), *words])
    assert "remove it" in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_flags_that_no_longer_do_anything_are_named(flags: Flags) -> None:
    _, notices = parse_arguments([*flags(), "--do_train", "True"])
    assert "--do_train has no effect" in notices[0]
