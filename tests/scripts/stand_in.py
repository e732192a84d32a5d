"""Writes a checkpoint folder in the released layout with stand-in code in it, for scripts/parity.sh to run.

The code (stand_in_code/) was written from the published behaviour and is built on nothing of ours, so that it is a
second witness. Told to, it departs from that behaviour in chosen places.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

CODE = Path(__file__).resolve().parent / "stand_in_code"
# The ways in which it can differ, and the file whose setting chooses them.
TOKENIZER_DIFFERENCES = ("nfc", "list format", "window")
MODEL_DIFFERENCES = ("pixels", "logn", "ntk", "chat", "stream")
WIDTH, LAYERS, HEADS, INNER = 128, 2, 4, 256
VISION_WIDTH, VISION_HEADS, VISION_INNER = 32, 2, 64
PIECES = (b"th", b"he", b"the", b" the", b" a", b"an", b"in", b"ing", b"er", b"\xe4\xb8", b"\xef\xbc", b"\xef\xbc\x8c")
RANKS = 256 + len(PIECES)
IMAGE_START = RANKS + 208 + 6
VOCABULARY = IMAGE_START + 3 + 7  # rows without a token exist, as in the released model

CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": False,
    "fp16": False,
    "fp32": False,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * INNER,
    "kv_channels": WIDTH // HEADS,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "rotary_emb_base": 10000,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_dynamic_ntk": True,
    "use_flash_attn": False,
    "use_logn_attn": True,
    "visual": {
        "heads": VISION_HEADS,
        "image_size": 448,
        "image_start_id": IMAGE_START,
        "layers": 1,
        "mlp_ratio": VISION_INNER / VISION_WIDTH,
        "output_dim": WIDTH,
        "patch_size": 14,
        "width": VISION_WIDTH,
    },
    "vocab_size": VOCABULARY,
}
GENERATION = {
    "chat_format": "chatml",
    "do_sample": True,
    "eos_token_id": RANKS,
    "max_new_tokens": 512,
    "max_window_size": 6144,
    "pad_token_id": RANKS,
    "top_k": 0,
    "top_p": 0.3,
}
TOKENIZER = {
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The released tensors' names with small shapes."""
    found = {"transformer.wte.weight": (VOCABULARY, WIDTH), "transformer.ln_f.weight": (WIDTH,)}
    found["lm_head.weight"] = (VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        parts = {"ln_1": (WIDTH,), "ln_2": (WIDTH,), "attn.c_attn": (3 * WIDTH, WIDTH), "attn.c_proj": (WIDTH, WIDTH)}
        parts |= {"mlp.w1": (INNER, WIDTH), "mlp.w2": (INNER, WIDTH), "mlp.c_proj": (WIDTH, INNER)}
        found |= {f"transformer.h.{layer}.{name}.weight": shape for name, shape in parts.items()}
        found[f"transformer.h.{layer}.attn.c_attn.bias"] = (3 * WIDTH,)
    tower, block, pool = (
        "transformer.visual",
        "transformer.visual.transformer.resblocks.0",
        "transformer.visual.attn_pool",
    )
    found |= {f"{tower}.conv1.weight": (VISION_WIDTH, 3, 14, 14), f"{tower}.positional_embedding": (256, VISION_WIDTH)}
    found |= {f"{tower}.proj": (WIDTH, WIDTH), f"{pool}.kv_proj.weight": (WIDTH, VISION_WIDTH)}
    found |= {f"{pool}.query": (256, WIDTH), f"{pool}.pos_embed": (256, WIDTH)}
    found |= {f"{pool}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{pool}.attn.in_proj_bias": (3 * WIDTH,)}
    linear = {f"{block}.attn.in_proj": (3 * VISION_WIDTH, VISION_WIDTH)}
    linear |= {
        f"{block}.attn.out_proj": (VISION_WIDTH, VISION_WIDTH),
        f"{block}.mlp.c_fc": (VISION_INNER, VISION_WIDTH),
    }
    linear |= {f"{block}.mlp.c_proj": (VISION_WIDTH, VISION_INNER), f"{pool}.attn.out_proj": (WIDTH, WIDTH)}
    linear |= {f"{block}.ln_1": (VISION_WIDTH,), f"{block}.ln_2": (VISION_WIDTH,), f"{tower}.ln_pre": (VISION_WIDTH,)}
    linear |= {f"{tower}.ln_post": (WIDTH,), f"{pool}.ln_q": (WIDTH,), f"{pool}.ln_kv": (WIDTH,)}
    for name, shape in linear.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Wide enough that logits are far apart, and no choice of a token is close."""
    values = torch.randn(shape, generator=generator)
    if name.endswith("bias") or "embed" in name:
        return 0.2 * values
    if ".ln_" in name:
        return 1 + 0.1 * values
    if name.endswith(("wte.weight", "query")):
        return values
    return values * (2.0 if "c_attn" in name else 1.0) / (values[0].numel() ** 0.5)


def write(folder: Path, differs: Sequence[str] = (), *, code: bool = True) -> Path:
    """Writes the folder.

    Args:
        folder: A new folder.
        differs: Where the code is to depart from what was published: names of `*_DIFFERENCES`.
        code: Whether to put the code in.
    """
    assert set(differs) <= {*TOKENIZER_DIFFERENCES, *MODEL_DIFFERENCES}
    folder.mkdir(parents=True)
    tokens = [*(bytes([i]) for i in range(256)), *PIECES]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    contents = {"config": {**CONFIG, "differs": list(differs)}, "generation_config": GENERATION}
    contents["tokenizer_config"] = {**TOKENIZER, "differs": list(differs)}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    generator = torch.Generator().manual_seed(0)
    weights = {name: draw(name, shape, generator) for name, shape in shapes().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if code:
        for file in CODE.glob("*.py"):
            shutil.copy(file, folder)
    return folder
