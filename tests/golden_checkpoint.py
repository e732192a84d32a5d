"""The small checkpoint to which the golden numbers belong, drawn from its recipe: no weights are stored."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"


def write_golden_checkpoint(out: Path, kind: Literal["safetensors", "bin"] = "safetensors") -> Path:
    """Writes the checkpoint in the released layout, in two shards, without a vocabulary.

    Args:
        out: The folder; it is made.
        kind: The kind of file that holds the weights.
    """
    recipe = json.loads((GOLDEN / "tiny_a.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    for part in ("config", "generation_config", "tokenizer_config"):
        (out / f"{part}.json").write_text(json.dumps(recipe[part], indent=2) + "\n")
    tensors = {name: _draw(name, shape, recipe["seed"]) for name, shape in recipe["shapes"].items()}
    names, half = list(tensors), math.ceil(len(tensors) / 2)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    places = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"{stem}-{number:05d}-of-00002.{kind}"
        shard = {name: tensors[name] for name in part}
        if kind == "bin":
            torch.save(shard, out / file)
        else:
            save_file(shard, out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (out / f"{stem}.{kind}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return out


def _draw(name: str, shape: list[int], seed: int) -> torch.Tensor:
    """A tensor that depends on its name and the seed alone: a standard normal, scaled by what it is for."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed))
    norm = ".ln_" in name or name == "transformer.ln_f.weight"
    if norm and name.endswith("weight"):
        return 1 + 0.1 * normal
    if name.endswith("bias"):
        return 0.1 * normal
    if name.endswith(("wte.weight", "query")):
        return normal
    if name.endswith(("positional_embedding", "pos_embed")):
        return 0.5 * normal
    inputs = shape[0] if name.endswith("visual.proj") else math.prod(shape[1:])
    gain = 2.0 if name.endswith("c_attn.weight") else 1.0
    return gain * normal / math.sqrt(inputs)
