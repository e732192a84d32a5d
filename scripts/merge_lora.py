"""Merges a LoRA adapter into its base, into a checkpoint that needs neither peft nor the base's folder.

python scripts/merge_lora.py checkpoints/MMRole-Agent-LoRA model_weights/MMRole-Agent [--base_model FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from data_utils.errors import MMRoleError, four_parts, raise_problems, run_main
from data_utils.files import read_json
from finetune.checkpoints import check_saved, expected_tensors, publish_folder, save_model
from qwen_vl import QwenVLForCausalLM, QwenVLTokenizer
from qwen_vl.checkpoint import adapter_base, checkpoint_problems, is_adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Check, merge and save."""
    options = parse_options(argv)
    base = check(options.adapter, options.base_model, options.output_dir)
    model, tokenizer = merged(options.adapter, base, DTYPES.get(options.dtype, "auto"))
    staged = options.output_dir.with_name(f".{options.output_dir.name}.part")
    shutil.rmtree(staged, ignore_errors=True)
    save_model(model, tokenizer, staged)
    check_saved(staged, expected_tensors(model))
    publish_folder(staged, options.output_dir)
    print(f"{options.output_dir}: {options.adapter} merged into {base}")
    return 0


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("output_dir", type=Path, help="folder to create")
    parser.add_argument("--base_model", type=Path, help="folder of the base (default: the one that the adapter names)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="(%(default)s: the base's)")
    return parser.parse_args(argv)


def check(adapter: Path, base_model: Path | None, output_dir: Path) -> Path:
    """Return the base to merge into, after all checks.

    Raises:
        ProblemsError: The adapter or its base is incomplete, the base is quantized, or the output folder exists.
    """
    if adapter.is_dir() and not is_adapter(adapter):
        raise MMRoleError("the folder holds no adapter", "adapter_config.json", adapter, "give the adapter's folder")
    if not adapter.is_dir():
        raise MMRoleError("there is no such folder", adapter, "adapter", "give the folder that training made")
    base = base_model or adapter_base(adapter)
    problems = four_parts(checkpoint_problems(base, flag="--base_model"))
    if not problems and "quantization_config" in read_json(base / "config.json"):
        fix = "give the unquantized base (bfloat16) with --base_model"
        problems.append(MMRoleError("an adapter cannot be merged into quantized weights", base, "--base_model", fix))
    if output_dir.exists():
        fix = "choose another folder, or remove this one"
        problems.append(MMRoleError("the output folder already exists", output_dir, "output_dir", fix))
    raise_problems(problems)
    return base


def merged(adapter: Path, base: Path, dtype: Any) -> tuple[PreTrainedModel, QwenVLTokenizer]:
    """Return the base with the adapter's weights added, and the tokenizer."""
    from peft import PeftModel

    model = QwenVLForCausalLM.from_pretrained(str(base), dtype=dtype, weights_only=True)
    adapted = PeftModel.from_pretrained(model, str(adapter))
    return adapted.merge_and_unload(safe_merge=True), QwenVLTokenizer.from_pretrained(adapter)


if __name__ == "__main__":
    sys.exit(run_main(main))
