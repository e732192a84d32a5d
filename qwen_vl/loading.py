"""One call from a checkpoint folder to a model that can talk."""

import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qwen_vl.folder import code_files, read_json_file
from qwen_vl.modeling import QwenVLForCausalLM
from qwen_vl.tokenization import VOCAB_FILE, QwenVLTokenizer

logger = logging.getLogger(__name__)
ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    attn_implementation: str = "sdpa",
) -> tuple[QwenVLForCausalLM, QwenVLTokenizer]:
    """Model, in eval mode, and tokenizer of a checkpoint folder: a released one, a fine-tuned one, or a LoRA adapter.

    Args:
        path: A local folder. One with `adapter_config.json` is put onto the base model that it names.
        dtype: A torch dtype or its name; "auto" is what the checkpoint says.
        device: "auto" is the first GPU, or the CPU where there is none.
        attn_implementation: "sdpa", "flash_attention_2" (where installed) or "eager".

    Raises:
        FileNotFoundError: The folder, its weights or its vocabulary are not there.
        ValueError: A file of it is damaged, or the dtype has no such name.
    """
    folder = check_folder(path)
    if (folder / ADAPTER_CONFIG).is_file():
        return _load_adapter(folder, dtype=dtype, device=device, attn_implementation=attn_implementation)
    if code_files(folder):
        logger.warning("%s has code files (%s): they are not run.", folder, code_files(folder)[0].name)
    tokenizer = QwenVLTokenizer.from_pretrained(folder)
    model = QwenVLForCausalLM.from_pretrained(
        str(folder), dtype=_dtype(dtype), attn_implementation=attn_implementation, weights_only=True
    )
    return model.to(_device(device)).eval(), tokenizer


def check_folder(path: str | Path) -> Path:
    """The folder, if it looks like a checkpoint: cheap, nothing is loaded.

    Raises:
        FileNotFoundError: It does not; says what is missing and where weights come from.
    """
    folder = Path(path)
    hint = "Download the checkpoint folder whole (README: where weights come from), or give another --model_path."
    if not folder.is_dir():
        raise FileNotFoundError(f"no such checkpoint folder: {folder}\n{hint}")
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    missing = [name for name in ("config.json", VOCAB_FILE) if not (folder / name).is_file()]
    if not any(True for pattern in WEIGHT_FILES for _ in folder.glob(pattern)):
        missing.append("weights (model*.safetensors or pytorch_model*.bin)")
    for index in [*folder.glob("*.safetensors.index.json"), *folder.glob("pytorch_model.bin.index.json")]:
        shards = set(read_json_file(index).get("weight_map", {}).values())
        missing += sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise FileNotFoundError(f"the checkpoint folder {folder} lacks: {', '.join(missing)}\n{hint}")
    return folder


def _load_adapter(
    folder: Path, *, dtype: torch.dtype | str, device: torch.device | str, attn_implementation: str
) -> tuple[QwenVLForCausalLM, QwenVLTokenizer]:
    from peft import PeftModel  # heavy, and needed for adapters only

    base = read_json_file(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    base_folder = Path(base) if Path(base).is_absolute() or Path(base).is_dir() else folder / base
    if not base or not base_folder.is_dir():
        raise FileNotFoundError(
            f"the adapter {folder} names the base model {base!r}, which is no folder here.\n"
            f"Put the base model there, or correct base_model_name_or_path in {folder / ADAPTER_CONFIG}."
        )
    model, tokenizer = load(base_folder, dtype=dtype, device=device, attn_implementation=attn_implementation)
    if (folder / VOCAB_FILE).is_file():
        tokenizer = QwenVLTokenizer.from_pretrained(folder)
    # The adapter's layers are put into `model` itself, which keeps its own methods: chat, generate and the rest.
    adapted: PreTrainedModel = PeftModel.from_pretrained(model, str(folder))
    return adapted.get_base_model().eval(), tokenizer


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"no such dtype: {dtype!r}. Use auto, bfloat16, float16 or float32.")
    return named


def _device(device: torch.device | str) -> torch.device:
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
