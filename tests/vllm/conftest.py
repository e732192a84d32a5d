"""What the exactness tests share: prompts of exact lengths, the native model's answers to them, and engines.

They run in the environment of `scripts/vllm_environment.sh --test`; elsewhere they are skipped. An engine runs inside
the test's own process, so that a test can take a part of the plugin away.
"""

import json
import random
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import qwen_vl
from qwen_vl.chat import build_context, cut_answer
from tests.conftest import shared_folder

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed here: bash scripts/vllm_environment.sh --test"
)
# vLLM reads them on import, which these tests do late.
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
NEW_TOKENS = 24
SYSTEM = "You speak as an old sailor."
WORDS = ["harbour", "storm", "rope", "lantern", "captain", "whale", "north", "winter", "letter", "bread", "silver"]
WORDS += ["crow", "island", "fever", "song"]


@dataclass(frozen=True)
class Prompt:
    """A query of `chat()`, as elements, and the number of tokens of the prompt."""

    query: list[dict[str, Any]]
    tokens: int

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The same for an OpenAI-compatible API of vLLM's own process."""
        parts = [
            {"type": "image_pil", "image_pil": Image.open(element["image"])}
            if "image" in element
            else {"type": "text", "text": element["text"]}
            for element in self.query
        ]
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}]


@dataclass(frozen=True)
class Native:
    """The model without vLLM, whose answers vLLM's are compared with."""

    folder: Path
    model: qwen_vl.QwenVLForCausalLM
    tokenizer: qwen_vl.QwenVLTokenizer

    def prompt(self, tokens: int, *, picture: Path | None = None, seed: int = 0, begin: str = "") -> Prompt:
        """A prompt of exactly so many tokens, of words drawn from `seed` after the text `begin`.

        Words and digits are split before anything is merged; a digit is a token whatever the vocabulary.
        """
        before = [] if picture is None else [{"image": picture}]
        draw = random.Random(seed)

        def missing(text: str) -> int:
            return tokens - len(self.ids([*before, {"text": text}]))

        text = begin + "".join(f" {draw.choice(WORDS)}" for _ in range(tokens))
        while missing(text) < 0:
            text = text[: len(text) + missing(text)].rpartition(" ")[0]
        assert text.startswith(begin)
        text += "7" * missing(text)
        assert missing(text) == 0
        return Prompt([*before, {"text": text}], tokens)

    def ids(self, query: Sequence[dict[str, Any]]) -> list[int]:
        return build_context(self.tokenizer, query, None, [{"text": SYSTEM}]).ids

    def answers(self, prompts: Sequence[Prompt], new_tokens: int = NEW_TOKENS) -> list[str]:
        """What `chat()` answers, greedily."""
        limits = {"do_sample": False, "max_new_tokens": new_tokens}
        system = [{"text": SYSTEM}]
        return [self.model.chat(self.tokenizer, p.query, system=system, **limits)[0] for p in prompts]

    def cut(self, ids: Sequence[int]) -> str:
        """The text that `chat()` makes of an answer's ids."""
        return cut_answer(self.tokenizer, ids)


def load_native(folder: Path) -> Native:
    return Native(folder, *qwen_vl.load(folder, dtype=torch.float32, device="cpu"))


@pytest.fixture(scope="session", autouse=True)
def variables() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def own_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the repository's own recipe, saved by `save_pretrained`, as fine-tuned and merged ones are.

    Its attention is made sharp, so that a wrong rotation shows in the first tokens.
    """
    from scripts.make_tiny_checkpoint import make_checkpoint

    root = tmp_path_factory.mktemp("own")
    (root / "corpus").mkdir()
    draw = random.Random(0)
    texts = [" ".join(draw.choices([*WORDS, "assistant", SYSTEM], k=40)) for _ in range(60)]
    (root / "corpus" / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    sizes = {"hidden_size": 128, "layers": 2, "heads": 4, "vision_width": 32, "vision_layers": 1, "vision_heads": 1}
    made = Namespace(out_dir=root / "drawn", corpus=root / "corpus", seed=0, ranks=600, **sizes)
    model = make_checkpoint(made)
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.attn.c_attn.weight *= 2
        model.transformer.wte.weight *= 8
    model.save_pretrained(root / "tuned")
    qwen_vl.QwenVLTokenizer.from_pretrained(made.out_dir).save_pretrained(root / "tuned")
    return root / "tuned"


@pytest.fixture(scope="session")
def native(request: pytest.FixtureRequest, own_checkpoint: Path) -> Native:
    """The golden checkpoint `tiny_a`, in the released layout; the repository's own where there is no `../shared`."""
    return load_native(request.getfixturevalue("tiny_a") if shared_folder() else own_checkpoint)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures that other loaders change: one is transparent, one is stored sideways."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = random.Random(0)
    noise = Image.frombytes("RGBA", (60, 40), draw.randbytes(60 * 40 * 4)).resize((600, 400))
    noise.save(folder / "transparent.png")
    sideways = Image.Exif()
    sideways[0x0112] = 6
    noise.convert("RGB").save(folder / "sideways.jpg", exif=sideways)
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def start(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Starts an engine in this process."""

    def start_engine(folder: Path, **settings: Any) -> Any:
        from vllm import LLM

        fixed = {"tokenizer_mode": "qwen_vl", "dtype": "float32", "enforce_eager": True, "seed": 0}
        return LLM(str(folder), **fixed, distributed_executor_backend="uni", **settings)

    return start_engine


def ask(engine: Any, prompts: Sequence[Prompt], new_tokens: int = NEW_TOKENS, **settings: Any) -> list[Any]:
    """vLLM's outputs for all prompts at once, greedy."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, **settings)
    return engine.chat([p.messages for p in prompts], greedy, use_tqdm=False)
