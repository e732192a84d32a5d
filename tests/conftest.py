"""Fixtures that all tests share: the real data and golden numbers, and the small golden checkpoint."""

import base64
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_utils.demo.world import draw_world, write_world
from qwen_vl import QwenVLTokenizer
from tests.golden_checkpoint import write_golden_checkpoint

RANKS = 256  # of the small tokenizer: the bytes
ROOT = Path(__file__).resolve().parent.parent
# Settings of programs, and proxies: what the user exports is not meant for the tests.
SETTINGS = """
    AGENT COCO_URL DATA_PATH DATA_ROOT DEMO_DIR ENDPOINT EVAL_DIR GLOBAL_BATCH HF_ENDPOINT HF_HUB_OFFLINE HOST JUDGE
    JUDGE_ENDPOINT JUDGE_MODEL LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT MICRO_BATCH MMROLE_HOSTS MMROLE_KEY
    MODEL MODEL_PATH MPLBACKEND NNODES NODE_RANK OPENAI_API_KEY OPENAI_BASE_URL OUTPUT_DIR PORT PROCESSES RANK RESUME
    SAVE_TO TRANSFORMERS_OFFLINE VLLM_API_KEY WEIGHTS_DIR WORLD_SIZE
    ALL_PROXY HTTP_PROXY HTTPS_PROXY NO_PROXY all_proxy http_proxy https_proxy no_proxy
"""


def pytest_configure() -> None:
    """Make the tests independent of the shell that runs them: of its settings, its proxies, and whether it waits."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as for all that a shell starts in its background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in SETTINGS.split():
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that all processes end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Undo what a test's programs set in the environment: their own process would end, a test's goes on."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


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
