"""What is found before the weights load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_utils.errors import MMRoleError
from data_utils.supervised import SupervisedDataset
from finetune.arguments import parse_arguments
from finetune.finetune import main
from finetune.preflight import check, grouped
from finetune.sample_checks import answer_positions, check_samples
from finetune.saving import CHECKPOINT
from qwen_vl import QwenVLForCausalLM, QwenVLTokenizer
from tests.finetune.conftest import Data

Flags = Callable[..., list[str]]


def sample(name: str, question: str, answer: str = "Yes.") -> dict:
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    return {"id": name, "conversations": turns}


def test_everything_wrong_is_told_at_once_and_no_weight_is_read(
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
    told = str(caught.value)
    assert told.startswith("4 problems")
    assert told.count("images/gone.png") == 1
    assert "sample gone and 1 more" in told
    for part in ("broken.png", "climb out", "Unclosed" if "Unclosed" in told else "unclosed"):
        assert part in told


def test_schema_problems_come_with_those_of_the_base(flags: Flags, data: Data, tmp_path: Path) -> None:
    rows = [sample("twice", "a"), sample("twice", "b"), {"id": "none", "conversations": [{"from": "bot", "value": ""}]}]
    file = data.with_rows(rows, "schema.json")
    with pytest.raises(MMRoleError) as caught:
        main(flags(data_path=file, model_name_or_path=tmp_path / "nowhere", eval_strategy="steps"))
    told = str(caught.value)
    for part in ("twice", "sample none", "no such checkpoint folder", "nothing to evaluate on"):
        assert part in told


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
    facts, problems = check_samples(dataset, Path("train.json"))
    assert problems == []
    assert (facts.samples, facts.too_long) == (3, ["loses_some", "loses_all"])
    assert (facts.answer_cut, facts.answer_lost) == (["loses_some"], ["loses_all"])
    assert "2 are longer than 200 tokens and are cut: 1 lose a part of their answer, 1 all of it" in facts.told(200)
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
    facts, _ = check_samples(SupervisedDataset(rows, tokenizer, data_root=data.root, max_length=200), Path("x.json"))
    assert (facts.no_answer, facts.answer_lost, facts.answered) == (["empty"], ["lost"], 1)
    assert "1 have no answer to learn from (empty)" in facts.told(200)
    assert facts.counts()["no_answer"] == 1


def test_equal_problems_are_told_as_one(flags: Flags, data: Data) -> None:
    rows = [sample(f"s_{n}", f"<img>images/gone_{n}.png</img>") for n in range(300)]
    rows.append(sample("open", "<img>images/0.png"))
    with pytest.raises(MMRoleError) as caught:
        main(flags(data_path=data.with_rows(rows, "gone.json")))
    told = str(caught.value)
    assert told.startswith("2 problems")
    assert "an image is missing (300 times)" in told
    assert "images/gone_9.png" in told
    assert "sample s_9)" in told
    assert "images/gone_10.png" not in told
    assert "… and 290 more" in told
    assert "--data_root" in told
    assert told.count("\n") < 25


def test_few_equal_problems_stay_apart() -> None:
    three = [MMRoleError("w", str(n), n, "f") for n in range(3)]
    assert grouped(three) == three
    (one,) = grouped([*three, MMRoleError("w", "3", 3, "f")])
    assert one.value == ["0 (0)", "1 (1)", "2 (2)", "3 (3)"]


def test_shares_of_several_processes_add_up(base: Path, data: Data) -> None:
    tokenizer = QwenVLTokenizer.from_pretrained(base)
    dataset = SupervisedDataset(data.rows, tokenizer, data_root=data.root, max_length=320)
    whole, _ = check_samples(dataset, data.file)
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


def test_a_damaged_base_is_told_whole_before_anything_loads(
    flags: Flags, base: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.model.load_model", lambda *_: pytest.fail("the model was loaded"))
    cut = (base / "model.safetensors").read_bytes()[:-10]
    changes = {"model.safetensors": cut, "qwen.tiktoken": "?", "config.json": "[]", "generation_config.json": "[]"}
    with pytest.raises(MMRoleError) as caught:
        main(flags(model_name_or_path=spoiled(base, tmp_path, changes), data_path=data.root / "nowhere.json"))
    wheres = [Path(problem.where).name for problem in caught.value.problems[:4]]
    assert wheres == ["model.safetensors", "generation_config.json", "config.json", "Spoiled-Chat"]
    assert "qwen.tiktoken" in str(caught.value.problems[3])
    assert "nowhere.json" in str(caught.value)  # the data's problem beside them


@pytest.mark.parametrize("change", ["visual", "hidden_size", "layers", "vocabulary"])
def test_a_base_that_does_not_fit_together(flags: Flags, base: Path, tmp_path: Path, change: str) -> None:
    config, told = json.loads((base / "config.json").read_text()), change
    if change == "visual":
        del config["visual"]
    elif change == "hidden_size":
        config["hidden_size"] = "wide"
    elif change == "layers":
        config["num_hidden_layers"] = 3
        told = "transformer.h.2.attn.c_attn.weight: missing"
    else:
        config["visual"]["image_start_id"] -= 1
        told = "do not belong together"
    with pytest.raises(MMRoleError) as caught:
        main(flags(model_name_or_path=spoiled(base, tmp_path, {"config.json": json.dumps(config)})))
    assert told in str(caught.value)
    assert "--model_name_or_path" in str(caught.value)


def test_lora_targets_are_checked_before_the_weights_load(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.model.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(MMRoleError) as caught:
        main([*flags(use_lora=True, eval_strategy="steps"), "--lora_target_modules", "q_proj", "ln_1"])
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
    with pytest.raises(MMRoleError, match="has a run in it already") as caught:
        main(flags())
    assert "checkpoint-7" in str(caught.value)
    assert CHECKPOINT.fullmatch(there.name)


def test_what_the_checks_give(flags: Flags, data: Data) -> None:
    checked = check(parse_arguments(flags(data_path=data.file))[0])
    assert len(checked.dataset) == checked.facts.samples == len(data.rows)
    assert checked.eval_dataset is None
    assert len(checked.fingerprints["data"]["sha256"]) == 64
    assert json.dumps(checked.facts.counts())
