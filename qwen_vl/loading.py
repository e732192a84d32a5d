"""Loads a model and its tokenizer from a checkpoint folder."""

import logging
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from qwen_vl.checkpoint import (
    GENERATION_CONFIG,
    VOCAB_FILE,
    CheckpointError,
    adapter_base,
    checkpoint_problems,
    code_files,
    is_adapter,
    read_json_file,
)
from qwen_vl.configuration import QwenVLConfig
from qwen_vl.modeling import NOT_QUANTIZED, QwenVLForCausalLM
from qwen_vl.tokenization import QwenVLTokenizer

logger = logging.getLogger(__name__)
QUANTIZATIONS = ("4bit", "8bit")


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    attn_implementation: str = "sdpa",
    device_map: str | dict[str, Any] | None = None,
    quantization: str | None = None,
) -> tuple[QwenVLForCausalLM, QwenVLTokenizer]:
    """Model, in eval mode, and tokenizer of a checkpoint folder: a released one, a fine-tuned one, or a LoRA adapter.

    Args:
        path: A local folder. One with `adapter_config.json` is applied to the base model that it names.
        dtype: A torch dtype or its name; "auto" is the checkpoint's.
        device: "auto" is the first GPU, or the CPU where there is none.
        attn_implementation: "sdpa", "flash_attention_2" (where installed) or "eager".
        device_map: Spreads the model over several devices, which accelerate chooses ("auto") or a map names, the CPU
            and the disk included; `device` is then ignored. Such a model answers through `chat()` and `generate()`,
            but not through the engine. What `.bin` files give to the disk is written to a temporary
            folder (TMPDIR), which goes with the model.
        quantization: "4bit" or "8bit" puts the decoder's weights into bitsandbytes' formats.

    Raises:
        MissingFilesError: The folder, its weights or its vocabulary are not there; a FileNotFoundError.
        ValueError: A file of it is damaged or does not fit the others, a tensor is missing, there is no such dtype or
            device, or a package that an argument needs is not installed.
    """
    folder = Path(path)
    if problems := checkpoint_problems(folder):
        raise problems[0]
    options: dict[str, Any] = {"dtype": _dtype(dtype), "attn_implementation": attn_implementation}
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization)
    place = None if device_map is not None else resolve_device(device)
    if device_map is not None and not find_spec("accelerate"):
        raise ValueError("device_map needs the package accelerate: pip install accelerate")
    if is_adapter(folder):
        return _load_adapter(
            folder,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            device_map=device_map,
            quantization=quantization,
        )
    if code_files(folder):
        logger.warning("%s has code files (%s): they are not run.", folder, code_files(folder)[0].name)
    if (settings := folder / GENERATION_CONFIG).is_file():
        read_json_file(settings)  # transformers ignores a broken one, and would decode greedily
    tokenizer = QwenVLTokenizer.from_pretrained(folder)
    check_fit(tokenizer, QwenVLConfig.from_pretrained(str(folder)), folder)
    # Directly onto the device if accelerate is installed: eight processes would fill the machine's memory first.
    if find_spec("accelerate"):
        options["device_map"] = device_map if place is None else {"": place}
    if device_map is None or any(folder.glob("*.safetensors")):
        model = QwenVLForCausalLM.from_pretrained(str(folder), weights_only=True, **options)
    else:  # what goes to the disk is read from there, and no part of a .bin file can be
        offloaded = tempfile.TemporaryDirectory(prefix="qwen_vl_")
        options["offload_folder"] = offloaded.name
        model = QwenVLForCausalLM.from_pretrained(str(folder), weights_only=True, **options)
        model.offloaded = offloaded  # deleted with the model
    if place is not None and quantization is None:
        model.to(place)
    return model.eval(), tokenizer


def check_fit(tokenizer: QwenVLTokenizer, config: QwenVLConfig, folder: Path) -> None:
    """Checks that vocabulary and model give the special tokens the same ids.

    Raises:
        CheckpointError: They do not: the vocabulary is cut short, or another model's. Every prompt would be garbage.
    """
    if tokenizer.img_start_id != config.image_start_id:
        what = f"{VOCAB_FILE} and config.json do not belong together"
        value = (
            f"<img> is {tokenizer.img_start_id} by the vocabulary's {tokenizer.eod_id} lines, and "
            f"visual.image_start_id is {config.image_start_id}"
        )
        raise CheckpointError(what, value, folder, "download both again")


def resolve_device(device: torch.device | str) -> torch.device:
    """Returns an available device; "auto" is the first GPU, or else the CPU.

    Raises:
        ValueError: No device has that name, or this machine or this torch has none of its kind.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"no such device: {device!r}. Use auto, cpu, cuda or cuda:N.") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"the device {device!r} is not here: this torch ({torch.__version__}) sees {torch.cuda.device_count()} "
            "GPUs. Use auto or cpu, or install a torch build with CUDA."
        )
    return place


def _load_adapter(folder: Path, **options: Any) -> tuple[QwenVLForCausalLM, QwenVLTokenizer]:
    from peft import PeftModel  # heavy, and only for adapters

    model, tokenizer = load(adapter_base(folder), **options)
    if (folder / VOCAB_FILE).is_file():
        tokenizer = QwenVLTokenizer.from_pretrained(folder)
        check_fit(tokenizer, model.config, folder)
    # The adapter's layers are put into `model` itself, which keeps its own methods: chat, generate and the rest.
    adapted: PreTrainedModel = PeftModel.from_pretrained(model, str(folder))
    return adapted.get_base_model().eval(), tokenizer


def _quantization_config(quantization: str) -> BitsAndBytesConfig:
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"no such quantization: {quantization!r}. Use {' or '.join(QUANTIZATIONS)}.")
    if not find_spec("bitsandbytes"):
        raise ValueError(
            f"quantization {quantization} needs the package bitsandbytes: pip install bitsandbytes, or leave it out"
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"no such dtype: {dtype!r}. Use auto, bfloat16, float16 or float32.")
    return named
