"""The files of a checkpoint: what is missing or damaged is named, and the fingerprint stays what it is."""

import io
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from data_utils.errors import four_parts
from qwen_vl.checkpoint import (
    CheckpointError,
    MissingFilesError,
    checkpoint_fingerprint,
    checkpoint_problems,
    weight_problems,
)
from tests.closed import close
from tests.conftest import ROOT

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "generation_config.json").write_text('{"top_p": 0.3}')
    (folder / "qwen.tiktoken").write_text("IQ== 0\n")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(b"weights" * 100 * number)
    return folder


def make_adapter(folder, base):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 64}))
    (folder / "adapter_model.safetensors").write_bytes(b"lora")
    return folder


def test_a_copy_or_a_new_name_changes_nothing(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("notes")
    (copy / "config.json").write_text('{\n  "_name_or_path": "/elsewhere",\n  "hidden_size": 8\n}')
    assert checkpoint_fingerprint(folder) == checkpoint_fingerprint(copy)


def test_the_fingerprint_is_the_one_that_journals_hold(folder, tmp_path):
    assert checkpoint_fingerprint(folder) == "c403e61472a126d7"
    assert checkpoint_fingerprint(make_adapter(tmp_path / "adapter", folder)) == "f0dd318f8434db15"
    (big := tmp_path / "big").mkdir()
    (big / "config.json").write_text('{"a": [1, "喝茶"], "_name_or_path": "/x", "f": 1e-6}', encoding="utf-8")
    (big / "model.safetensors").write_bytes(bytes(range(256)) * (1 << 15))
    assert checkpoint_fingerprint(big) == "ef8c25d87761d7e3"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"hidden_size": 9}'),
        ("generation_config.json", '{"top_p": 0.4}'),
        ("tokenizer_config.json", "{}"),
        ("qwen.tiktoken", "IQ== 1\n"),
        ("model-00002-of-00002.safetensors", "weightz" * 200),
    ],
)
def test_settings_and_weights_count(folder, name, content):
    before = checkpoint_fingerprint(folder)
    (folder / name).write_text(content)
    assert checkpoint_fingerprint(folder) != before


@pytest.mark.parametrize("place", [0, 1 << 22, (1 << 23) - 1])
def test_large_weights_are_sampled_from_end_to_end(folder, place):
    shard = folder / "model-00001-of-00002.safetensors"
    data = bytearray(1 << 23)
    shard.write_bytes(data)
    before = checkpoint_fingerprint(folder)
    data[place : place + (1 << 17)] = b"x" * len(data[place : place + (1 << 17)])
    shard.write_bytes(data)
    assert shard.stat().st_size == 1 << 23
    assert checkpoint_fingerprint(folder) != before


def test_an_adapter_includes_its_base(folder, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", folder)
    before = checkpoint_fingerprint(adapter)
    assert before != checkpoint_fingerprint(folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"other")
    assert checkpoint_fingerprint(adapter) != before


def test_a_base_beside_the_adapter_is_found(folder, tmp_path):
    assert checkpoint_problems(make_adapter(tmp_path / "adapter", "../model"), use_lora=True) == []


def test_a_complete_checkpoint_has_no_problems(folder):
    assert checkpoint_problems(folder) == []


@pytest.mark.parametrize("name", ["config.json", "qwen.tiktoken", "model-00002-of-00002.safetensors"])
def test_what_is_missing_is_named(folder, name):
    (folder / name).unlink()
    (problem,) = checkpoint_problems(folder)
    assert name in str(problem)


def test_missing_weights_base_and_folder(folder, tmp_path):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    assert "the weights" in str(checkpoint_problems(folder)[0])
    assert "no such checkpoint folder" in str(checkpoint_problems(tmp_path / "nowhere")[0])
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(checkpoint_problems(adapter)[0])


def test_an_index_must_not_lead_out_of_the_folder(folder):
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names no files of its folder" in str(checkpoint_problems(folder)[0])


def test_use_lora_needs_an_adapter(folder):
    assert "--use_lora" in str(checkpoint_problems(folder, use_lora=True)[0])


@pytest.mark.parametrize("base", ["Qwen/Qwen-VL-Chat", "../adapter"])
def test_an_adapter_whose_base_is_none(tmp_path, base):
    adapter = make_adapter(tmp_path / "adapter", base)
    (problem,) = checkpoint_problems(adapter)
    assert "names a base model that is not a checkpoint folder here" in problem.what
    assert problem.where == adapter / "adapter_config.json"
    assert "base_model_name_or_path" in problem.fix and "--model_path" not in str(problem)


def test_an_incomplete_base_is_not_given_with_a_flag(folder, tmp_path):
    (folder / "qwen.tiktoken").unlink()
    (problem,) = checkpoint_problems(make_adapter(tmp_path / "adapter", folder))
    assert problem.where == folder
    assert "base_model_name_or_path in" in problem.fix and "--model_path" not in str(problem)


def test_a_closed_folder_is_not_incomplete(folder, tmp_path, monkeypatch):
    adapter = make_adapter(tmp_path / "adapter", folder)
    close(monkeypatch, folder)
    for checkpoint in (folder, adapter):
        (problem,) = checkpoint_problems(checkpoint)
        assert (problem.what, problem.value) == ("cannot read: Permission denied", folder)


def saved_by_torch(*, legacy=False):
    file = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


SAFETENSORS, ZIPPED, LEGACY = save({"w": np.zeros(3)}), saved_by_torch(), saved_by_torch(legacy=True)


def folder_with(tmp_path, name, content):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "qwen.tiktoken").write_text("IQ== 0\n")
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", SAFETENSORS), ("pytorch_model.bin", ZIPPED), ("pytorch_model.bin", LEGACY)],
)
def test_sound_weights(tmp_path, name, content):
    assert weight_problems(folder_with(tmp_path, name, content)) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", SAFETENSORS[:-1], "is cut off or damaged"),
        ("model.safetensors", SAFETENSORS + b"x", "is cut off or damaged"),
        ("model.safetensors", b"\xff" * 40, "is cut off or damaged"),
        ("model.safetensors", b"", "is empty"),
        ("model.safetensors", POINTER, "git lfs pull"),
        ("pytorch_model.bin", ZIPPED[:-1], "is cut off"),
        ("pytorch_model.bin", b"", "is empty"),
        ("pytorch_model.bin", b"<html>not found</html>", "is not a file of weights"),
        ("qwen.tiktoken", POINTER, "git lfs pull"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    folder = folder_with(tmp_path, name, content)
    (problem,) = weight_problems(folder)
    assert message in str(problem)
    assert problem.where == folder / name
    assert problem.fix


def test_every_shard_is_looked_at(folder):
    (folder / "model-00001-of-00002.safetensors").write_bytes(SAFETENSORS)
    (problem,) = weight_problems(folder)
    assert problem.where == folder / "model-00002-of-00002.safetensors"


def test_pickles_beside_safetensors_do_not_matter(tmp_path):
    folder = folder_with(tmp_path, "model.safetensors", SAFETENSORS)
    (folder / "pytorch_model.bin").write_bytes(POINTER)
    assert weight_problems(folder) == []


def test_damage_of_an_adapter_and_of_its_base(tmp_path):
    base = folder_with(tmp_path, "model.safetensors", b"")
    adapter = make_adapter(tmp_path / "adapter", base)
    (adapter / "adapter_model.safetensors").write_bytes(POINTER)
    assert [problem.where for problem in weight_problems(adapter)] == [
        adapter / "adapter_model.safetensors",
        base / "model.safetensors",
    ]


def test_problems_keep_their_parts_across_processes_and_as_four_part_errors():
    for kind in (CheckpointError, MissingFilesError):
        problem = pickle.loads(pickle.dumps(kind("what", ["a", "b"], "where", "fix it")))
        assert type(problem) is kind
        assert str(problem) == "what: a, b (where). Fix it."
        (error,) = four_parts([problem])
        assert (error.what, error.value, error.where, error.fix) == ("what", ["a", "b"], "where", "fix it")


def test_files_are_checked_without_torch():
    code = "import qwen_vl.checkpoint, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
