"""scripts/parity.sh: the table on stand-in checkpoints, whose code is run only on demand and gets no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qwen_vl
from data_utils.errors import MMRoleError
from finetune.arguments import LoraArguments
from finetune.model import add_adapters
from qwen_vl import QwenVLTokenizer
from scripts.reference import run as reference
from scripts.reference.torchvision import transforms
from tests.scripts import stand_in, stub_wheels

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))  # where a script finds the ones beside it
import parity
import parity_environment

ROOT = Path(__file__).resolve().parents[2]
PARITY = ROOT / "scripts" / "parity.sh"
FITTING_PYTHON = pytest.mark.skipif(
    sys.version_info[:2] not in ((3, 10), (3, 11)), reason="this Python is not one for the released code (3.10, 3.11)"
)


def run_parity(folder: Path, *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(PARITY), str(folder), "--device", "cpu", *flags]
    return subprocess.run(command, env={**os.environ, **environ}, cwd="/", capture_output=True, text=True)


@pytest.fixture(scope="module")
def reference_python() -> str:
    """The released code's environment; if it cannot be made, the test is skipped with the set-up's message."""
    command = [sys.executable, str(ROOT / "scripts" / "parity_environment.py")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    made = subprocess.run(command, env=environ, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"the released code's environment cannot be had here: {made.stderr[-600:]}")
    return made.stdout.strip()


def verdicts(report: Path) -> dict[tuple[str, str], str]:
    return {(row["part"], row["case"]): row["verdict"] for row in json.loads(report.read_text())["rows"]}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_agrees_with_code_that_does_the_same(tmp_path: Path, reference_python: str) -> None:
    folder, report = stand_in.write(tmp_path / "same"), tmp_path / "report.json"
    result = run_parity(folder, parity.TRUST, "--report", str(report))
    assert result.returncode == 0, result.stdout + result.stderr
    found = verdicts(report)
    assert set(found.values()) == {"same", "within"}
    assert {part for part, _ in found} >= {
        *("ids, all tags read", "ids, vision tags read", "decoded", "decoded, no special tokens", "chat context"),
        *("pixels", "vision output", "logits", "greedy text", "sampled text", "streamed text", "training labels"),
    }
    assert {("logits", f"{n} tokens") for n in (2048, 2049, 4096, 4097)} <= found.keys()
    assert all(verdict == "same" for (part, _), verdict in found.items() if part not in ("vision output", "logits"))
    facts = json.loads(report.read_text())["facts"]
    assert facts["released"]["transformers"] == "4.32.0"
    assert facts["released"]["transformers_stream_generator"] == "0.0.4"
    assert facts["ours"]["transformers"] != "4.32.0"
    assert facts["released"]["network"] == ["answered by an empty file: get https://fonts.example/SimSun.ttf"]
    # The font's empty file lies in the work folder, not beside the weights.
    assert {file.suffix for file in folder.iterdir()} == {".json", ".py", ".safetensors", ".tiktoken"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_shows_where_code_differs(tmp_path: Path, reference_python: str) -> None:
    message = ["nfc", "list format", "window", "pixels", "ntk", "stream"]
    folder, report = stand_in.write(tmp_path / "differs", message), tmp_path / "report.json"
    result = run_parity(folder, parity.TRUST, "--report", str(report), "--lengths", "2048", "2049")
    assert result.returncode == 1, result.stdout + result.stderr
    found = verdicts(report)
    differing = {row for row, verdict in found.items() if verdict == "DIFFERS"}
    assert differing | {row for row, verdict in found.items() if verdict in ("same", "within")} == found.keys()
    texts = {row for row in differing if row[0].endswith(" text")}
    assert differing - texts == {
        *((part, "mixed") for part in ("ids, all tags read", "ids, vision tags read")),
        *((part, "mixed") for part in ("decoded", "decoded, no special tokens")),
        *(("list format", "picture and text"), ("list format", "two pictures")),
        ("chat context", "history that does not fit"),
        *(("pixels", name) for name in ("colour", "gray", "transparent", "palette", "wide", "square")),
        *(("vision output", "colour"), ("vision output", "wide")),
        *(("logits", "one picture"), ("logits", "two pictures"), ("logits", "2049 tokens")),
    }
    # Without a picture both sides write the same text; the streams have lost their last character.
    assert {row for row in texts if not row[1].startswith("picture")} == {
        ("streamed text", "text"),
        ("streamed text", "history in Chinese"),
    }
    assert ("greedy text", "picture") in texts
    assert "DIFFERS" in result.stdout


@pytest.mark.slow
def test_code_is_not_run_without_the_flag(tmp_path: Path) -> None:
    folder = stand_in.write(tmp_path / "bad")
    marker = tmp_path / "was-run"
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(marker)!r}, 'w')\n")
    result = run_parity(folder, "--lengths", "--new_tokens", "2", PYTHON_FOR_REFERENCE="no-such-python")
    assert result.returncode == 0, result.stderr
    assert "Nothing was compared" in result.stdout
    assert parity.TRUST in result.stdout
    assert "a container without a network" in result.stdout
    assert "training labels" in result.stdout
    assert not marker.exists()


@pytest.mark.parametrize("base", ["base", "../base", "absolute"])
def test_an_adapters_base_is_found_from_the_work_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """A relative path counts from the user's directory, or from the adapter; both sides run elsewhere."""
    model, tokenizer = qwen_vl.load(stand_in.write(tmp_path / "base"), device="cpu")
    add_adapters(model, LoraArguments(lora_r=2), base=tmp_path / "base").save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    if base != "absolute":
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    before = path.read_bytes()
    monkeypatch.chdir(tmp_path if base == "base" else "/")
    (work := tmp_path / "work").mkdir()
    folder = parity.for_work_folder(Path("adapter") if base == "base" else tmp_path / "adapter", work)
    monkeypatch.chdir(work)
    loaded, _ = qwen_vl.load(folder, device="cpu")
    assert any("lora" in name for name, _ in loaded.named_modules())
    found, is_adapter = reference.base_of(folder)
    assert (found.resolve(), is_adapter) == (tmp_path / "base", True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("status", [0, 3])
def test_a_side_that_ends_early(tmp_path: Path, status: int) -> None:
    """Whatever its exit status, because foreign code may end the process with any."""
    command = [sys.executable, "-c", f"raise SystemExit({status})"]
    with pytest.raises(MMRoleError, match="failed"):
        parity.run_side("reference", command, tmp_path, os.environ)


def test_flag_must_be_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parity.main([str(stand_in.write(tmp_path / "same")), "--i_trust"])
    assert "--i_trust" in capsys.readouterr().err


NETWORK = """
import importlib, json, socket, subprocess, sys, urllib.request
import run
tried = run.close_the_network()
requests = importlib.import_module("requests")
assert requests.get("https://example.com/font.ttf").content == b""
assert requests.Session().post("http://example.com").status_code == 200
def refused(act):
    try:
        act()
    except OSError:
        return True
acts = [
    lambda: urllib.request.urlopen("http://127.0.0.1:9"),
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: socket.getaddrinfo("example.com", 80),
    lambda: subprocess.run(["true"]),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("127.0.0.1", 9)),
]
print(json.dumps([[bool(refused(act)) for act in acts], tried]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_released_code_gets_no_network(reference_python: str) -> None:
    command = [reference_python, "-c", NETWORK]
    result = subprocess.run(command, cwd=ROOT / "scripts" / "reference", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    refused, tried = json.loads(result.stdout)
    assert refused == [True] * 5
    assert tried[0] == "answered by an empty file: get https://example.com/font.ttf"
    assert sum("refused" in line for line in tried) >= 5


def test_attempts_to_reach_the_network_stand_in_the_head(capsys: pytest.CaptureFixture[str]) -> None:
    sides = {"ours": parity.Side({}, {}, {}), "released": parity.Side({"network": ["refused"]}, {}, {})}
    parity.show([], sides, parity.Console(width=140))
    assert "network:  refused" in capsys.readouterr().out


def test_released_side_gets_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "PYTHONPATH"):
        monkeypatch.setenv(name, "secret")
    environ = parity.released_environment(tmp_path)
    assert "secret" not in environ.values()
    assert environ["HF_HUB_OFFLINE"] == "1"


@FITTING_PYTHON
@pytest.mark.slow
def test_environment_is_made_once_and_again_when_requirements_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stub_wheels.write_wheel(tmp_path, "one", "1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PYTHON_FOR_REFERENCE", f"no-such-python {sys.executable}")
    folder, requirements = tmp_path / "environment", tmp_path / "requirements.txt"
    requirements.write_text("one==1.0\n")
    python = parity_environment.ensure_environment(folder, requirements)
    subprocess.run([python, "-c", "import one"], check=True)
    capfd.readouterr()
    assert parity_environment.ensure_environment(folder, requirements) == python
    assert capfd.readouterr().err == ""

    requirements.write_text("one==1.0\nnowhere==1.0\n")
    with pytest.raises(MMRoleError, match="could not be made"):
        parity_environment.ensure_environment(folder, requirements)
    assert not (folder / "made-from.txt").exists()


def test_no_fitting_python(tmp_path: Path) -> None:
    other = tmp_path / "python3"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    with pytest.raises(MMRoleError) as caught:
        parity_environment.find_python([str(other), "no-such-python"])
    for part in ("3.10 or 3.11", str(other), "no-such-python", "PYTHON_FOR_REFERENCE="):
        assert part in str(caught.value)


def test_transforms_by_hand() -> None:
    image = Image.new("RGB", (4, 2), (255, 0, 51))
    steps = [transforms.Resize((3, 5)), transforms.ToTensor(), transforms.Normalize((0.5, 0, 0.1), (0.5, 1, 0.1))]
    pixels = transforms.Compose(steps)(image)
    assert pixels.shape == (3, 3, 5)
    torch.testing.assert_close(pixels[:, 1, 2], torch.tensor([1.0, 0.0, 1.0]))
    assert transforms.Resize(4)(Image.new("RGB", (10, 5))).size == (8, 4)
    assert transforms.ToTensor()(Image.new("L", (4, 2))).shape == (1, 2, 4)


def test_transforms_give_the_golden_pixels(shared: Path) -> None:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    square = transforms.Resize((448, 448), interpolation=transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([square, transforms.ToTensor(), transforms.Normalize(mean, std)])
    golden = np.load(shared / "golden" / "image_transform.npz")
    names = [name for name in golden.files if not name.endswith(".mean_std")]
    assert len(names) == 8
    for name in names:
        pixels = transform(Image.open(shared / "golden" / "images" / name).convert("RGB"))
        np.testing.assert_allclose(pixels[:, ::16, 5::16], golden[name], atol=1e-6, rtol=0)


def test_training_labels_are_the_golden_ones(shared: Path) -> None:
    tokenizer = QwenVLTokenizer.from_pretrained(shared / "qwen_vl_chat")
    rows = json.loads((shared / "golden" / "train" / "train.json").read_text(encoding="utf-8"))
    golden = np.load(shared / "golden" / "train" / "preprocess.npz")
    for limit in (3072, 1024):
        for number, row in enumerate(rows):
            ids, labels = reference.training_labels(tokenizer, row["conversations"], limit)
            assert ids == golden[f"{limit}.{number}.input_ids"].tolist()
            assert labels == golden[f"{limit}.{number}.labels"].tolist()


def test_what_counts_as_a_difference() -> None:
    assert parity.first_difference("abcd", "abcd") is None
    assert parity.first_difference("abcd", "abxd") == "from 2 on: 'cd' / 'xd'"
    assert parity.first_difference([1, 2], [1, 2, 3]) == "from 2 on: [] / [3]"
    assert parity.first_difference(["text", [1, 2]], ["text", [1, 3]]) == "from 1 on: [2] / [3]"
    assert parity.first_difference([], [1]) is not None
    zeros, off = np.zeros((2, 3)), np.full((2, 3), 0.5)
    assert parity.compare_arrays(zeros, zeros, 0.1)[3] == "same"
    assert parity.compare_arrays(zeros, off, 1.0)[3] == "within"
    assert parity.compare_arrays(zeros, off, 0.1)[3] == "DIFFERS"
    assert parity.compare_arrays(zeros * np.nan, zeros, 1.0)[3] == "DIFFERS"
    assert parity.compare_arrays(zeros, np.zeros((2, 4)), 1.0)[3] == "DIFFERS"


def test_a_failed_case_is_shown_as_one() -> None:
    cases = [{"part": "p", "case": "c", "name": "p: c", "kind": "ids"}]
    fine, failed = parity.Side({}, {"p: c": {"value": [1]}}, {}), parity.Side({}, {"p: c": {"failed": "no"}}, {})
    row = parity.compare(cases, fine, failed, 1.0)[0]
    assert (row.verdict, row.difference) == ("FAILED", "released: no")


def test_the_stand_in_is_built_on_nothing_of_ours() -> None:
    ours = ("qwen_vl", "data_utils", "eval", "finetune", "scripts")
    files = [*stand_in.CODE.glob("*.py"), Path(stand_in.__file__), *(ROOT / "scripts" / "reference").rglob("*.py")]
    for file in files:
        lines = [line.split() for line in file.read_text().splitlines()]
        imported = [words[1] for words in lines if words and words[0] in ("import", "from")]
        assert not [name for name in imported if name.partition(".")[0] in ours], file
