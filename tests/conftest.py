"""Fixtures that all tests share: the real data and golden numbers, and the small golden checkpoint."""

import base64
import os
import shutil
import signal
from pathlib import Path

import pytest

from data_utils.demo.world import draw_world, write_world
from qwen_vl import QwenVLTokenizer
from tests.golden_checkpoint import write_golden_checkpoint

RANKS = 256  # of the small tokenizer: the bytes
ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Restore Ctrl-C, which processes in a shell's background ignore."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that all processes end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def shared_folder() -> Path | None:
    """Return the folder with real data and golden numbers (`MMROLE_SHARED`, else `../shared`), or None."""
    folder = Path(os.environ.get("MMROLE_SHARED", ROOT.parent / "shared"))
    return folder if (folder / "golden").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """`../shared`; the test is skipped, with the reason, where it is absent."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("no ../shared with golden numbers and real data here (set MMROLE_SHARED to point at it)")
    return folder


@pytest.fixture(scope="session")
def tiny_a(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint (2 layers, width 128) as sharded safetensors, with the real vocabulary."""
    folder = write_golden_checkpoint(tmp_path_factory.mktemp("golden") / "tiny_a")
    shutil.copyfile(shared / "qwen_vl_chat" / "qwen.tiktoken", folder / "qwen.tiktoken")
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up data root; tests must not change it."""
    root = tmp_path_factory.mktemp("demo") / "world"
    write_world(draw_world(3), root)
    return root


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> QwenVLTokenizer:
    """A tokenizer whose vocabulary is the 256 bytes and the special tokens."""
    folder = tmp_path_factory.mktemp("vocabulary")
    lines = [base64.b64encode(bytes([i])) + b" " + str(i).encode() for i in range(RANKS)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return QwenVLTokenizer.from_pretrained(folder)
