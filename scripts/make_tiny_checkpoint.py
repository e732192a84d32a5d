"""Makes a small, untrained Qwen-VL checkpoint in the released layout, with a vocabulary learned from a data root.

python scripts/make_tiny_checkpoint.py OUT_DIR --corpus DATA_ROOT [--seed N] [--hidden_size 128] …

The same corpus, seed and sizes give the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from data_utils.errors import MMRoleError, run_main
from data_utils.files import read_json, write_bytes
from qwen_vl import QwenVLConfig, QwenVLForCausalLM, QwenVLTokenizer
from qwen_vl.tokenization import SPLIT_PATTERN, VOCAB_FILE

BYTES = 256
HEAD_MULTIPLE = 128  # the resampler has one head per 128 of its width
VOCAB_MULTIPLE = 64
LONGEST_TOKEN = 16  # bytes; otherwise complete Chinese sentences, which have no blanks, would become tokens
SHARDS = 2
# Fields of the released files that do not concern size, without auto_map, whose code is not here.
RELEASED_CONFIG: dict[str, Any] = {
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": True,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "no_bias": True,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": False,
    "use_logn_attn": True,
}
RELEASED_GENERATION: dict[str, Any] = {
    "chat_format": "chatml",
    "do_sample": True,
    "max_new_tokens": 512,
    "max_window_size": 6144,
    "top_k": 0,
    "top_p": 0.3,
}
RELEASED_TOKENIZER: dict[str, Any] = {
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
}


def corpus_texts(data_root: Path) -> list[str]:
    """Yield each text of the data root's JSON files once, in order of file name.

    Raises:
        MMRoleError: There is no text.
    """
    files = sorted(data_root.rglob("*.json"), key=lambda path: path.relative_to(data_root).as_posix())
    texts = dict.fromkeys(
        unicodedata.normalize("NFC", text) for file in files for text in _strings(read_json(file)) if text
    )
    if not texts:
        raise MMRoleError(
            "no text to learn a vocabulary from", str(data_root), "--corpus", "give a data root with JSON files in it"
        )
    return list(texts)


def train_ranks(texts: Sequence[str], size: int) -> list[bytes]:
    """Learn byte-pair merges with the released split pattern.

    Args:
        texts: The training texts.
        size: The largest number of ranks, the 256 bytes included.

    Returns:
        The tokens in order of rank: all single bytes first, in order, then the merges, the earliest learned first.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"), byte_level]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        max_token_length=LONGEST_TOKEN,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = tokenizer.get_vocab()
    letters = _byte_letters()
    tokens = [bytes(letters[letter] for letter in token) for token in sorted(learned, key=learned.__getitem__)]
    return [bytes([value]) for value in range(BYTES)] + [token for token in tokens if len(token) > 1]


def write_ranks(path: Path, tokens: Sequence[bytes]) -> None:
    """Write a `.tiktoken` file: a line `base64(token) rank` for each token."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    write_bytes(path, "".join(lines).encode())


def tiny_config(tokenizer: QwenVLTokenizer, options: argparse.Namespace) -> QwenVLConfig:
    """Return the released configuration with small numbers, for the ids of ``tokenizer``.

    Raises:
        MMRoleError: The sizes do not fit together.
    """
    _check_multiple("--hidden_size", options.hidden_size, HEAD_MULTIPLE)
    _check_multiple("--hidden_size", options.hidden_size, options.heads)
    _check_multiple("--vision_width", options.vision_width, options.vision_heads)
    return QwenVLConfig(
        **RELEASED_CONFIG,
        dtype=torch.float32,
        # Not the released 0.02, with which so narrow an attention starts out flat and learns slowly.
        initializer_range=round(options.hidden_size**-0.5, 3),
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        kv_channels=options.hidden_size // options.heads,
        num_attention_heads=options.heads,
        num_hidden_layers=options.layers,
        visual={
            "heads": options.vision_heads,
            "image_size": 448,
            "image_start_id": tokenizer.img_start_id,
            "layers": options.vision_layers,
            "mlp_ratio": 2.0,
            "output_dim": options.hidden_size,
            "patch_size": 14,
            "width": options.vision_width,
        },
        # Above the tokenizer's ids: some rows have no token, as in the released model.
        vocab_size=(len(tokenizer) // VOCAB_MULTIPLE + 1) * VOCAB_MULTIPLE,
    )


def draw_model(config: QwenVLConfig, seed: int) -> QwenVLForCausalLM:
    """Initialise a model from ``seed``; the global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return QwenVLForCausalLM(config).eval()


def make_checkpoint(options: argparse.Namespace) -> QwenVLForCausalLM:
    """Make the checkpoint of the command line and return its model.

    Raises:
        MMRoleError: The corpus or the sizes are unsuitable, or OUT_DIR is not empty.
    """
    out: Path = options.out_dir
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MMRoleError("the folder is not empty", str(out), "OUT_DIR", "choose a new or an empty folder")
    tokens = train_ranks(corpus_texts(options.corpus), options.ranks)
    with tempfile.TemporaryDirectory() as folder:
        write_ranks(Path(folder) / VOCAB_FILE, tokens)
        tokenizer = QwenVLTokenizer(Path(folder) / VOCAB_FILE, **RELEASED_TOKENIZER)
        model = draw_model(tiny_config(tokenizer, options), options.seed)
        model.generation_config = GenerationConfig(
            **RELEASED_GENERATION, eos_token_id=tokenizer.eod_id, pad_token_id=tokenizer.eod_id
        )
        out.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(out, max_shard_size=_shard_size(model))
        tokenizer.save_pretrained(out)
    return model


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict):
        yield from value
        yield from _strings(list(value.values()))


def _byte_letters() -> dict[str, int]:
    """Return the letters for bytes in byte-level vocabularies: printable ones unchanged, others above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(BYTES) if value not in printable]
    return {chr(v): v for v in printable} | {chr(BYTES + place): v for place, v in enumerate(others)}


def _shard_size(model: QwenVLForCausalLM) -> int:
    """Return the bytes of a shard such that the tensors in order fill SHARDS of them."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()]
    return sum(sizes) // SHARDS + max(sizes)


def _check_multiple(option: str, value: int, factor: int) -> None:
    if value <= 0 or factor <= 0 or value % factor:
        raise MMRoleError("a size does not divide", value, option, f"choose a multiple of {factor}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="a new or empty folder")
    parser.add_argument("--corpus", type=Path, required=True, metavar="DATA_ROOT", help="source of the vocabulary")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--ranks", type=int, default=3000, help="at most so many byte-pair ranks (default: 3000)")
    parser.add_argument("--hidden_size", type=int, default=128, help="width of the decoder, a multiple of 128")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--vision_width", type=int, default=32)
    parser.add_argument("--vision_layers", type=int, default=1)
    parser.add_argument("--vision_heads", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(arguments)
    disable_progress_bar()  # it takes a moment
    model = make_checkpoint(options)
    weights = sum(parameter.numel() for parameter in model.parameters())
    size = sum(file.stat().st_size for file in options.out_dir.iterdir())
    sizes = {"ranks": model.generation_config.eos_token_id, "vocab_size": model.config.vocab_size, "weights": weights}
    print(f"{options.out_dir}: {json.dumps(sizes)}, {size / 1e6:.1f} MB, untrained")


if __name__ == "__main__":
    sys.exit(run_main(main))
