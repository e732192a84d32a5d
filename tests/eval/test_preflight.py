"""What is seen of a device and of generation settings without loading anything."""

import json
import subprocess
import sys

import pytest
import torch

from eval.backends.preflight import device_problems, generation_problems
from tests.conftest import ROOT
from tests.fake_backend import make_model


@pytest.mark.parametrize("device", ["auto", "cpu", "cpu:0"])
def test_devices_that_are_there(device):
    assert device_problems(device) == []


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1"])
def test_devices_that_do_not_exist(device):
    (problem,) = device_problems(device)
    assert "there is no such device" in problem.what
    assert problem.fix


@pytest.mark.parametrize(
    ("count", "device", "told"),
    [
        (0, "cuda", "finds no GPU"),
        (2, "cuda", None),
        (2, "cuda:1", None),
        (2, "cuda:2", "the last one here is cuda:1"),
    ],
)
def test_gpus_are_counted(monkeypatch, count, device, told):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("a forked child could not use the GPU"))
    assert [told in problem.what for problem in device_problems(device)] == ([True] if told else [])


SETTINGS = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.3, "max_new_tokens": 512, "num_beams": 1}


def generation_told(tmp_path, *, greedy=False, limit=None, batched=True, **changes):
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({**SETTINGS, **changes}))
    return [str(p) for p in generation_problems(folder, greedy=greedy, limit=limit, batched=batched)]


def test_generation_settings_that_are_right(tmp_path):
    assert generation_told(tmp_path) == []
    assert generation_problems(make_model(tmp_path / "no settings"), greedy=False, limit=None, batched=True) == []


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.0}, {"top_p": 0}, {"top_p": "much"}, {"top_k": -1}, {"top_k": True}],
)
def test_sampling_that_cannot_be(tmp_path, change):
    (name,) = change
    (told,) = generation_told(tmp_path, **change)
    assert name in told or "not supported" in told
    assert "generation_config.json" in told
    assert (
        generation_told(tmp_path, greedy=True, **change) == generation_told(tmp_path, do_sample=False, **change) == []
    )


def test_limits_that_cannot_be(tmp_path):
    assert "max_new_tokens is 0" in generation_told(tmp_path, max_new_tokens=0)[0]
    assert generation_told(tmp_path, max_new_tokens=0, limit=5) == []


def test_settings_that_the_engine_does_not_know(tmp_path):
    (told,) = generation_told(tmp_path, repetition_penalty=1.1, min_new_tokens=3)
    assert "repetition_penalty: 1.1" in told and "min_new_tokens: 3" in told and "--batch_size 1" in told
    assert generation_told(tmp_path, repetition_penalty=1.1, batched=False) == []


def test_generation_settings_of_an_adapters_base(tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({**SETTINGS, "top_p": 3}))
    (adapter := tmp_path / "adapter").mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (problem,) = generation_problems(adapter, greedy=False, limit=None, batched=True)
    assert problem.where == folder / "generation_config.json"


def test_generation_settings_are_seen_without_torch():
    code = "import eval.running.flags, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("device", "told"), [("meta", True), ("cpu:0", False)])
def test_devices_that_cannot_write(device, told):
    assert ["CPU or an NVIDIA GPU only" in problem.what for problem in device_problems(device)] == [True] * told
