"""One call from a checkpoint folder to a model that can talk."""

import logging
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from qwen_vl.configuration import QwenVLConfig
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
        ValueError: A file of it is damaged or does not fit the others, a tensor is missing, or there is no such dtype
            or device.
    """
    folder = check_folder(path)
    place = resolve_device(device)
    if (folder / ADAPTER_CONFIG).is_file():
        return _load_adapter(folder, dtype=dtype, device=device, attn_implementation=attn_implementation)
    if code_files(folder):
        logger.warning("%s has code files (%s): they are not run.", folder, code_files(folder)[0].name)
    if (settings := folder / GENERATION_CONFIG_NAME).is_file():
        read_json_file(settings)  # transformers takes a broken one for none, and would decode greedily
    tokenizer = QwenVLTokenizer.from_pretrained(folder)
    check_fit(tokenizer, QwenVLConfig.from_pretrained(str(folder)), folder)
    # Straight to the device, where accelerate is there to do it: eight processes would fill the machine's memory first.
    straight = {"device_map": {"": place}} if find_spec("accelerate") else {}
    model = QwenVLForCausalLM.from_pretrained(
        str(folder), dtype=_dtype(dtype), attn_implementation=attn_implementation, weights_only=True, **straight
    )
    return model.to(place).eval(), tokenizer


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


def check_fit(tokenizer: QwenVLTokenizer, config: QwenVLConfig, folder: Path) -> None:
    """Sees to it that vocabulary and model number the special tokens alike.

    Raises:
        ValueError: They don't: the vocabulary is cut short, or another model's. Every prompt would be garbage.
    """
    if tokenizer.img_start_id != config.image_start_id:
        raise ValueError(
            f"{VOCAB_FILE} and config.json of {folder} do not belong together: <img> is {tokenizer.img_start_id} by "
            f"the vocabulary's {tokenizer.eod_id} lines, and visual.image_start_id is {config.image_start_id}. "
            "Download both again."
        )


def resolve_device(device: torch.device | str) -> torch.device:
    """A device that is here; "auto" is the first GPU, or the CPU where there is none.

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
        check_fit(tokenizer, model.config, folder)
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
