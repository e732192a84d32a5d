"""What is checked before the weights load."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_utils.errors import MMRoleError
from finetune.arguments import parse_arguments
from finetune.checkpoints import CHECKPOINT, STAGING, lock
from finetune.data import SupervisedDataset
from finetune.distributed import end_with_the_first, grouped
from finetune.finetune import main
from finetune.model import adapter_weights
from finetune.preflight import (
    answer_positions,
    check,
    check_command_line,
    check_samples,
    disk_space,
    empty_model,
)
from qwen_vl import QwenVLForCausalLM, QwenVLTokenizer
from tests.conftest import ROOT
from tests.finetune.conftest import SECONDS, Data, report, run
from tests.processes import run_group


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that seem to be installed."""
    packages = {"accelerate", "peft", "deepspeed", "wandb", "tensorboard"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in packages else None)
    return packages


def test_no_settings_are_fine(installed: set[str]) -> None:
    installed.clear()
    installed.add("accelerate")
    check_command_line([])
    check_command_line(["--report_to", "none"])


@pytest.mark.parametrize(("flag", "package"), [("--deepspeed=x", "deepspeed"), ("--use_lora", "peft")])
def test_a_package_that_is_missing(installed: set[str], flag: str, package: str) -> None:
    check_command_line([flag])
    installed.remove(package)
    with pytest.raises(MMRoleError, match=r"scripts/setup\.sh") as caught:
        check_command_line([flag])
    assert package in str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "package"),
    [
        ("adamw_bnb_8bit", "bitsandbytes"),
        ("paged_lion_32bit", "bitsandbytes"),
        ("galore_adamw_8bit", "galore-torch"),
        ("adamw_torch_8bit", "torchao"),
        ("adalomo", "lomo-optim"),
        ("adamw_torch_fused", None),
        ("adafactor", None),
        ("rmsprop", None),
    ],
)
def test_the_package_of_an_optimizer(installed: set[str], optimizer: str, package: str | None) -> None:
    words = [f"--optim={optimizer}", "--bf16", "True"]
    if package is None:
        check_command_line(words)
        return
    with pytest.raises(MMRoleError, match=f"pip install {package},") as caught:
        check_command_line(words)
    assert f"--optim {optimizer}" in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "key", "asks"), [("online", None, True), ("online", "k", False), ("offline", None, False)]
)
def test_wandb_is_asked_for_its_key(
    installed: set[str], monkeypatch: pytest.MonkeyPatch, mode: str, key: str | None, asks: bool
) -> None:
    settings = SimpleNamespace(mode=mode, base_url="https://wandb.example.org")
    wandb = SimpleNamespace(setup=lambda: SimpleNamespace(settings=settings), api=SimpleNamespace(api_key=key))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    if not asks:
        check_command_line(["--report_to", "wandb"])
        return
    with pytest.raises(MMRoleError, match=r"no key for https://wandb\.example\.org"):
        check_command_line(["--report_to", "wandb"])
    monkeypatch.setenv("RANK", "1")  # only the first process reports it
    check_command_line(["--report_to", "wandb"])


def test_nothing_heavy_is_imported_before_the_command_line_is_checked() -> None:
    heavy = ("torch", "transformers", "numpy", "pydantic", "deepspeed")
    program = f"import sys, finetune.finetune; print([name for name in {heavy} if name in sys.modules])"
    done = run_group([sys.executable, "-c", program], SECONDS, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == "[]", done.stderr


def test_who_loses_the_first_process_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    for rank, text, expected in (
        ("0", "Connection closed by peer", RuntimeError),
        ("1", "Connection closed by peer [127.0.0.1]", SystemExit),
        ("1", "shapes do not fit", RuntimeError),
    ):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(expected), end_with_the_first():
            raise RuntimeError(text)


def test_reporters_that_cannot_be(installed: set[str]) -> None:
    installed -= {"tensorboard"}
    with pytest.raises(MMRoleError) as caught:
        check_command_line(["--report_to", "tensorboard", "mlflow"])
    assert "tensorboard is not installed" in str(caught.value)
    assert "no such reporter" in str(caught.value)


Flags = Callable[..., list[str]]


def sample(name: str, question: str, answer: str = "Yes.") -> dict:
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    return {"id": name, "conversations": turns}


def test_everything_wrong_is_reported_at_once_and_no_weight_is_read(
    flags: Flags, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data.root / "images" / "broken.png").write_bytes(b"no picture")
    rows = [
        sample("gone", "<img>images/gone.png</img>"),
        sample("gone_too", "<img>images/gone.png</img>"),
        sample("broken", "<img>images/broken.png</img>"),
        sample("out", "<img>../secret.png</img>"),
        sample("open", "<img>images/0.png"),
        sample("good", "<img>images/0.png</img>"),
    ]
    file = data.with_rows(rows, "wrong.json")
    monkeypatch.setattr(QwenVLForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(MMRoleError) as caught:
        main(flags(data_path=file))
    result = str(caught.value)
    assert result.startswith("4 problems")
    assert result.count("images/gone.png") == 1
    assert "sample gone and 1 more" in result
    for part in ("broken.png", "climb out", "Unclosed" if "Unclosed" in result else "unclosed"):
        assert part in result


def test_schema_problems_come_with_those_of_the_base(flags: Flags, data: Data, tmp_path: Path) -> None:
    rows = [sample("twice", "a"), sample("twice", "b"), {"id": "none", "conversations": [{"from": "bot", "value": ""}]}]
    file = data.with_rows(rows, "schema.json")
    with pytest.raises(MMRoleError) as caught:
        main(flags(data_path=file, model_name_or_path=tmp_path / "nowhere", eval_strategy="steps"))
    result = str(caught.value)
    for part in ("twice", "sample none", "no such checkpoint folder", "nothing to evaluate on"):
        assert part in result


def test_an_empty_file_and_a_missing_one(flags: Flags, data: Data) -> None:
    with pytest.raises(MMRoleError, match="no samples"):
        main(flags(data_path=data.with_rows([], "empty.json")))
    with pytest.raises(MMRoleError, match="cannot read the file"):
        main(flags(data_path=data.root / "nowhere.json"))


def test_cut_answers_are_counted(base: Path, data: Data) -> None:
    tokenizer = QwenVLTokenizer.from_pretrained(base)
    rows = [
        sample("fits", "a", "b"),
        sample("loses_some", "a" * 20, "b" * 200),
        sample("loses_all", "a" * 300, "b" * 5),
    ]
    dataset = SupervisedDataset(rows, tokenizer, data_root=data.root, max_length=200)
    facts, _, problems = check_samples(dataset, Path("train.json"))
    assert problems == []
    assert (facts.samples, facts.too_long) == (3, ["loses_some", "loses_all"])
    assert (facts.answer_cut, facts.answer_lost) == (["loses_some"], ["loses_all"])
    assert "2 are longer than 200 tokens and are cut: 1 lose a part of their answer, 1 all of it" in facts.summary(200)
    ids, labels = dataset.tokens(0)
    assert [ids[i] for i in answer_positions(labels, tokenizer)] == tokenizer.encode("b")


def test_nothing_to_learn_is_an_error(flags: Flags, data: Data) -> None:
    with pytest.raises(MMRoleError, match="no answer token is left in the whole file") as caught:
        main(flags(model_max_length=5, eval_strategy="steps", eval_data_path=data.with_rows(data.rows[:2], "two.json")))
    assert len(caught.value.problems) == 2
    silent = data.with_rows([sample("a", "Hello?", ""), sample("b", "Hello?", "")], "silent.json")
    with pytest.raises(MMRoleError, match="no answer token"):
        main(flags(data_path=silent, gradient_accumulation_steps=1))


def test_samples_without_an_answer_are_counted(base: Path, data: Data) -> None:
    tokenizer = QwenVLTokenizer.from_pretrained(base)
    rows = [sample("fits", "a", "b"), sample("empty", "a", ""), sample("lost", "a" * 300, "b")]
    facts, *_ = check_samples(SupervisedDataset(rows, tokenizer, data_root=data.root, max_length=200), Path("x.json"))
    assert (facts.no_answer, facts.answer_lost, facts.answered) == (["empty"], ["lost"], 1)
    assert "1 have no answer to learn from (empty)" in facts.summary(200)
    assert facts.counts()["no_answer"] == 1


def test_equal_problems_are_reported_as_one(flags: Flags, data: Data) -> None:
    rows = [sample(f"s_{n}", f"<img>images/gone_{n}.png</img>") for n in range(300)]
    rows.append(sample("open", "<img>images/0.png"))
    with pytest.raises(MMRoleError) as caught:
        main(flags(data_path=data.with_rows(rows, "gone.json")))
    result = str(caught.value)
    assert result.startswith("2 problems")
    assert "an image is missing (300 times)" in result
    assert "images/gone_9.png" in result
    assert "sample s_9)" in result
    assert "images/gone_10.png" not in result
    assert "… and 290 more" in result
    assert "--data_root" in result
    assert result.count("\n") < 25


def test_few_equal_problems_stay_apart() -> None:
    three = [MMRoleError("w", str(n), n, "f") for n in range(3)]
    assert grouped(three) == three
    (one,) = grouped([*three, MMRoleError("w", "3", 3, "f")])
    assert one.value == ["0 (0)", "1 (1)", "2 (2)", "3 (3)"]


def test_shares_of_several_processes_add_up(base: Path, data: Data) -> None:
    tokenizer = QwenVLTokenizer.from_pretrained(base)
    dataset = SupervisedDataset(data.rows, tokenizer, data_root=data.root, max_length=320)
    whole, *_ = check_samples(dataset, data.file)
    shares = [check_samples(dataset, data.file, first, 3)[0] for first in range(3)]
    assert sum(share.samples for share in shares) == whole.samples == len(data.rows)
    assert sum(share.tokens for share in shares) == whole.tokens
    first = shares[0]
    for share in shares[1:]:
        first.add(share)
    assert sorted(first.too_long) == sorted(whole.too_long)
    assert first.longest == whole.longest


def test_an_adapter_is_no_base(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MMRoleError, match=r"merge_lora\.py"):
        main(flags(model_name_or_path=tmp_path))


def spoiled(base: Path, tmp_path: Path, changes: dict[str, bytes | str]) -> Path:
    """A copy of the base with other files in it."""
    folder = shutil.copytree(base, tmp_path / "Spoiled-Chat")
    for name, content in changes.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_damaged_base_is_reported_whole_before_anything_loads(
    flags: Flags, base: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.model.load_model", lambda *_: pytest.fail("the model was loaded"))
    cut = (base / "model.safetensors").read_bytes()[:-10]
    changes = {"model.safetensors": cut, "qwen.tiktoken": "?", "config.json": "[]", "generation_config.json": "[]"}
    with pytest.raises(MMRoleError) as caught:
        main(flags(model_name_or_path=spoiled(base, tmp_path, changes), data_path=data.root / "nowhere.json"))
    names = [str(problem) for problem in caught.value.problems]
    assert len(names) == 5
    for name in (*changes, "nowhere.json"):
        assert any(name in text for text in names), name


@pytest.mark.parametrize("change", ["visual", "hidden_size", "layers", "vocabulary"])
def test_a_base_that_does_not_fit_together(flags: Flags, base: Path, tmp_path: Path, change: str) -> None:
    config, result = json.loads((base / "config.json").read_text()), change
    if change == "visual":
        del config["visual"]
    elif change == "hidden_size":
        config["hidden_size"] = "wide"
    elif change == "layers":
        config["num_hidden_layers"] = 3
        result = "transformer.h.2.attn.c_attn.weight: missing"
    else:
        config["visual"]["image_start_id"] -= 1
        result = "do not belong together"
    with pytest.raises(MMRoleError) as caught:
        main(flags(model_name_or_path=spoiled(base, tmp_path, {"config.json": json.dumps(config)})))
    assert result in str(caught.value)
    assert "Spoiled-Chat" in str(caught.value)


def test_lora_targets_are_checked_before_the_weights_load(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.model.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(MMRoleError) as caught:
        main([*flags(use_lora=True, eval_on_start=True), "--lora_target_modules", "q_proj", "ln_1"])
    for part in ("matches no module", "no layer of weights", "nothing to evaluate on"):
        assert part in str(caught.value)


def test_q_lora_is_refused_where_it_cannot_be(flags: Flags) -> None:
    with pytest.raises(MMRoleError) as caught:
        main(flags(q_lora=True))
    assert "only adapters" in str(caught.value)
    with pytest.raises(MMRoleError, match="needs a GPU"):
        main(flags(q_lora=True, use_lora=True))


def test_another_run_in_the_output_folder(flags: Flags, tmp_path: Path) -> None:
    there = tmp_path / "out" / "checkpoint-7"
    there.mkdir(parents=True)
    with pytest.raises(MMRoleError, match="already holds a run") as caught:
        main(flags())
    assert "checkpoint-7" in str(caught.value)
    assert CHECKPOINT.fullmatch(there.name)


def test_what_the_checks_give(flags: Flags, data: Data) -> None:
    checked = check(parse_arguments(flags(data_path=data.file))[0])
    assert len(checked.dataset) == checked.facts.samples == len(data.rows)
    assert checked.eval_dataset is None
    assert len(checked.fingerprints["data"]["sha256"]) == 64
    assert json.dumps(checked.facts.counts())


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Lets no file grow larger, as a full disk would not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def size_of(folder: Path, *patterns: str) -> int:
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))


def test_an_output_folder_that_cannot_be_written(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/nowhere/out")):
        with pytest.raises(MMRoleError, match="nothing can be written there") as caught:
            main(flags(output_dir=folder, data_path=tmp_path / "gone.json", eval_strategy="steps"))
        assert "--output_dir" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_another_run_is_seen_where_the_flag_says_no(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(MMRoleError, match="already holds a run"):
        main(flags(resume_from_checkpoint="False"))  # as the scripts say it


def test_a_disk_without_room(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.model.load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=6_000_000))
    with pytest.raises(MMRoleError, match="no room") as caught:
        main(flags(save_strategy="steps"))
    assert "6.2 MB, the finished model 2.2 MB, all together up to 8.4 MB; 6.0 MB are free" in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(pytest.fail.Exception):
        main(flags())  # without checkpoints there is room


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_estimate_is_near(flags: Flags, base: Path, tmp_path: Path, lora: bool) -> None:
    words = flags(save_strategy="steps", max_steps=1, use_lora=lora)
    main(words)
    found = disk_space(parse_arguments(words)[0], empty_model(base), 16)
    kinds = ("*.safetensors", "optimizer.pt")
    assert found.checkpoint == pytest.approx(size_of(tmp_path / "out" / "checkpoint-1", *kinds), rel=0.05)
    assert found.finished == pytest.approx(size_of(tmp_path / "out", "*.safetensors"), rel=0.05)
    assert not lora or adapter_weights(empty_model(base), parse_arguments(words)[0].lora) * 4 == found.finished


@pytest.mark.parametrize("size", [1_000_000, 3_000_000], ids=["weights", "optimizer"])
def test_a_full_disk_in_a_save(flags: Flags, tmp_path: Path, size: int) -> None:
    out = tmp_path / "out"
    main(flags(max_steps=1, save_strategy="steps"))
    kept = {path: path.read_bytes() for path in (out / "checkpoint-1").rglob("*") if path.is_file()}
    with pytest.raises(MMRoleError, match="cannot be written") as caught, files_up_to(size):
        main(flags(max_steps=2, save_strategy="steps", resume_from_checkpoint="auto"))
    assert "free some space" in str(caught.value)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert {path: path.read_bytes() for path in kept} == kept
    assert not (out / STAGING).exists()
    main(flags(max_steps=2, save_strategy="steps", resume_from_checkpoint="auto"))


@pytest.mark.slow
def test_a_full_disk_under_several_processes(flags: Flags, tmp_path: Path) -> None:
    config = ROOT / "finetune" / "ds_config_zero3.json"
    with files_up_to(1_000_000):
        done = run(flags(max_steps=1, save_strategy="steps", deepspeed=config), processes=2)
    assert done.returncode != 0
    assert done.stderr.count("the save cannot be written") == 1
    assert "Connection closed" not in done.stderr
    assert not (tmp_path / "out" / STAGING).exists()


SAVES = {
    "steps, two kept, a third staged": ({"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}, 3, 3),
    "steps, fewer than are kept": ({"save_strategy": "steps", "save_steps": 5, "save_total_limit": 9}, 2, 2),
    "recipe": ({"save_strategy": "epoch", "resume_save_steps": 3, "max_steps": -1, "num_train_epochs": 3}, 4, 2),
    "none": ({"save_strategy": "no"}, 0, 0),
}


@pytest.mark.parametrize("name", SAVES)
def test_the_most_that_saves_take(flags: Flags, base: Path, name: str) -> None:
    changes, weights, states = SAVES[name]
    found = disk_space(parse_arguments(flags(**{"max_steps": 10, **changes}))[0], empty_model(base), 16)
    one = found.finished  # in float32 the finished model is as large as a checkpoint's weights
    state = max(found.checkpoint - one, 0)
    assert found.peak == weights * one + states * state + found.finished


def test_pictures_are_counted_and_none_is_lost_silently(flags: Flags, data: Data, tmp_path: Path) -> None:
    main(flags(max_steps=1))
    assert (report(tmp_path / "out")["data"]["pictures"], report(tmp_path / "out")["data"]["with_picture"]) == (12, 12)
    rows = [{**sample(f"s{n}", "<image>\nWho is this?"), "image": f"{n}.png"} for n in range(5)]
    with pytest.raises(MMRoleError, match="would train without the picture") as caught:
        main(flags(data_path=data.with_rows(rows, "llava.json"), output_dir=tmp_path / "other"))
    assert "Picture 1: <img>images/NAME</img>" in str(caught.value)
    assert "(5 times)" in str(caught.value)


def test_a_quantized_base_is_refused(flags: Flags, base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(MMRoleError, match="quantized weights cannot be trained") as caught:
        main(flags(model_name_or_path=spoiled(base, tmp_path, {"config.json": json.dumps(config)})))
    assert "gptq" in str(caught.value)
    assert "--q_lora" in str(caught.value)


def test_shared_memory_that_is_too_small(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage
    small = lambda path: SimpleNamespace(free=64 << 20) if str(path) == "/dev/shm" else usage(path)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", small)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    words = flags(dataloader_num_workers=2, max_steps=1)
    with pytest.raises(MMRoleError, match="shared memory has no room") as caught:
        main(words)
    assert "--shm-size" in str(caught.value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    main([*words, "--dataloader_num_workers", "1"])


@pytest.mark.slow
def test_the_second_start_checks_no_sample_again(
    flags: Flags, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(data.root, tmp_path / "root")
    words = flags(data_root=root, max_steps=1)
    main(words)
    with monkeypatch.context() as patch:
        patch.setattr("finetune.preflight.check_samples", lambda *_: pytest.fail("checked again"))
        main(words)
        picture = root / "images" / "0.png"
        os.utime(picture, ns=(1, 1))
        for changed in (words, [*words, "--model_max_length", "300"], [*words, "--data_root", str(data.root)]):
            with pytest.raises(pytest.fail.Exception, match="checked again"):
                main(changed)
    picture.write_bytes(b"no picture")
    with pytest.raises(MMRoleError, match="an image is broken"):
        main(words)


def test_one_training_at_a_time_in_a_folder(flags: Flags, tmp_path: Path) -> None:
    main(flags(max_steps=1))
    with lock(tmp_path / "out"), pytest.raises(MMRoleError, match="another training runs in the output folder"):
        main(flags(max_steps=1))
    main(flags(max_steps=1))
