import importlib.util
from pathlib import Path

import pytest

from data_utils.errors import MMRoleError
from finetune.early import check_early, given_values, quiet_followers


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that seem to be installed; the key for wandb seems to be missing."""
    packages = {"accelerate", "peft", "deepspeed", "wandb", "tensorboard"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in packages else None)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    return packages


def test_values_of_a_flag() -> None:
    assert given_values(["--a", "1", "--report_to", "wandb", "tensorboard", "--b"], "--report_to") == [
        "wandb",
        "tensorboard",
    ]
    assert given_values(["--report_to=wandb", "--report_to", "none"], "--report_to") == ["none"]
    assert given_values(["--a"], "--report_to") == []


def test_nothing_asked_is_fine(installed: set[str]) -> None:
    installed.clear()
    installed.add("accelerate")
    check_early([])
    check_early(["--report_to", "none"])


@pytest.mark.parametrize(("flag", "package"), [("--deepspeed=x", "deepspeed"), ("--use_lora", "peft")])
def test_a_package_that_is_missing(installed: set[str], flag: str, package: str) -> None:
    check_early([flag])
    installed.remove(package)
    with pytest.raises(MMRoleError, match=r"scripts/setup\.sh") as caught:
        check_early([flag])
    assert package in str(caught.value)


def test_wandb_needs_a_key(installed: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["--report_to", "wandb"]
    with pytest.raises(MMRoleError, match="stop to ask"):
        check_early(words)
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        check_early(words)
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")  # only the first process tells
        check_early(words)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password key\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    check_early(words)


def test_who_loses_the_first_process_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    for rank, text, expected in (
        ("0", "Connection closed by peer", RuntimeError),
        ("1", "Connection closed by peer [127.0.0.1]", SystemExit),
        ("1", "shapes do not fit", RuntimeError),
    ):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(expected), quiet_followers():
            raise RuntimeError(text)


def test_reporters_that_cannot_be(installed: set[str]) -> None:
    installed -= {"tensorboard"}
    with pytest.raises(MMRoleError) as caught:
        check_early(["--report_to", "tensorboard", "mlflow"])
    assert "tensorboard is not installed" in str(caught.value)
    assert "no such reporter" in str(caught.value)
