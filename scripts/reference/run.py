"""The released side of scripts/parity.sh: runs the remote code in a checkpoint's folder on every case.

Started by parity.py:

    .venv-reference/bin/python run.py WORK CHECKPOINT DEVICE DTYPE

It imports nothing of this project. It reads WORK/cases.json, runs with WORK as its working directory, and writes
reference.json and reference.npz there. A download of the remote code through `requests` (a font) gives an empty file;
Python's sockets and other programs are refused to it, and listed. This stops well-meaning code only: what bypasses
Python (ctypes, a library's own sockets) needs a container without a network.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

IGNORED = -100
SHOWN_PACKAGES = ("transformers", "tokenizers", "accelerate", "peft", "transformers_stream_generator", "numpy")
REFUSED = (
    *("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"),
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
)

Case = Mapping[str, Any]


def close_the_network() -> list[str]:
    """Refuse Python's sockets and other programs for the rest of this process; `requests` returns empty files.

    Returns:
        A list that gets a line for each attempt.
    """
    tried: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in REFUSED:
            tried.append(f"refused: {event} {arguments[1:] if event.startswith('socket') else arguments}"[:200])
            raise PermissionError(f"{event}: the released code gets no network and no other programs here")

    def nothing(_: Any, method: str, url: str, *__: Any, **___: Any) -> Any:
        tried.append(f"answered by an empty file: {method} {url}")
        response = requests.Response()
        response.status_code, response.url, response._content = 200, url, b""
        return response

    # By name: it belongs to requirements-reference.txt, not to this project.
    requests = importlib.import_module("requests")
    requests.sessions.Session.request = nothing
    sys.addaudithook(hook)  # cannot be taken back
    return tried


class Released:
    """The released model and tokenizer, with a method for each kind of case."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype | None) -> None:
        base, self.adapter = base_of(folder)
        config_class = _remote_class(base, "config.json", "AutoConfig")
        model_class = _remote_class(base, "config.json", "AutoModelForCausalLM")
        with_tokenizer = folder if (folder / "qwen.tiktoken").is_file() else base
        tokenizer_class = _remote_class(base, "tokenizer_config.json", "AutoTokenizer")
        config = config_class.from_pretrained(str(base))
        dtype = dtype or _dtype_of(config)
        # Otherwise the released code chooses a precision itself.
        config.bf16, config.fp16 = dtype == torch.bfloat16, dtype == torch.float16
        config.fp32, config.use_flash_attn = dtype == torch.float32, False
        model = model_class.from_pretrained(str(base), config=config, torch_dtype=dtype, low_cpu_mem_usage=True)
        if self.adapter:
            model = _with_adapter(model, folder)
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer_class.from_pretrained(str(with_tokenizer))
        self.code: ModuleType = sys.modules[model_class.__module__]
        self.dtype, self.device = dtype, device

    def ids(self, case: Case) -> list[int]:
        if case["tags"] == "all":
            return list(self.tokenizer(case["text"]).input_ids)
        return list(self.tokenizer.encode(case["text"], allowed_special=set(self.tokenizer.IMAGE_ST)))

    def decode(self, case: Case) -> str:
        ids = case["ids"] if "ids" in case else self.tokenizer(case["text"]).input_ids
        return self.tokenizer.decode(ids, skip_special_tokens=case["skip_special_tokens"])

    def from_list_format(self, case: Case) -> str:
        return self.tokenizer.from_list_format(case["elements"])

    def to_list_format(self, case: Case) -> list[dict[str, str]]:
        return self.tokenizer.to_list_format(case["text"])

    def context(self, case: Case) -> list[Any]:
        text, ids = self.code.make_context(
            self.tokenizer,
            case["query"],
            history=_pairs(case),
            system=case["system"],
            max_window_size=case["max_window_size"],
            chat_format="chatml",
        )
        return [text, list(ids)]

    def pixels(self, case: Case) -> np.ndarray:
        image_module = importlib.import_module("PIL.Image")
        image = image_module.open(case["image"]).convert("RGB")
        return self.model.transformer.visual.image_transform(image).float().numpy()

    def vision(self, case: Case) -> np.ndarray:
        return self.model.transformer.visual.encode([case["image"]])[0].float().cpu().numpy()

    def logits(self, case: Case) -> np.ndarray:
        ids = torch.tensor([cut_to_length(self.tokenizer(case["text"]).input_ids, case.get("length"))])
        logits = self.model(ids.to(self.device)).logits[0]
        return logits[[round(place * (len(logits) - 1)) for place in case["at"]]].float().cpu().numpy()

    def chat(self, case: Case) -> str:
        torch.manual_seed(case["seed"])
        return self.model.chat(self.tokenizer, case["query"], **_dialogue(case), **case["settings"])[0]

    def stream(self, case: Case) -> str:
        # The streaming package streams only when it samples; with one candidate token that is greedy.
        settings = {"do_sample": True, "top_k": 1, "max_new_tokens": case["settings"]["max_new_tokens"]}
        text = ""
        for text in self.model.chat_stream(self.tokenizer, case["query"], **_dialogue(case), **settings):  # noqa: B007
            pass
        return text

    def labels(self, case: Case) -> list[list[int]]:
        ids, labels = training_labels(self.tokenizer, case["conversations"], case["max_length"])
        return [ids, labels]


def cut_to_length(ids: Sequence[int], length: int | None) -> list[int]:
    """Return the ids, repeated up to `length`; unchanged for None."""
    return list(ids) if length is None else (list(ids) * (length // len(ids) + 1))[:length]


def training_labels(tokenizer: Any, conversations: Sequence[Case], limit: int) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a sample by the paper's trainer, whose code is in no checkpoint's folder.

    Every turn is `<|im_start|>role\\ntext<|im_end|>\\n`, a fixed system turn first. The tokens that open and close a
    turn are always learned, the assistant's text too, the role never. Tokens over `limit` are cut off.
    """
    newline = tokenizer("\n").input_ids
    turns = [{"from": "system", "value": "You are a helpful assistant."}, *conversations]
    if len(turns) > 1 and turns[1]["from"] == "assistant":
        del turns[1]  # a conversation begins with the user
    ids: list[int] = []
    learned: list[bool] = []
    for turn in turns:
        text = tokenizer(turn["value"]).input_ids
        role = tokenizer(turn["from"]).input_ids + newline
        ids += [tokenizer.im_start_id, *role, *text, tokenizer.im_end_id, *newline]
        learned += [True] + [False] * len(role) + [turn["from"] == "assistant"] * len(text)
        learned += [True] * (1 + len(newline))
    labels = [token if counts else IGNORED for token, counts in zip(ids, learned, strict=True)]
    return ids[:limit], labels[:limit]


def run_cases(side: Any, cases: Sequence[Case], name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run every case on a side; returns JSON values and arrays by the case's name, or the error of a failed case."""
    values: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    part = None
    for case in cases:
        if case["part"] != part:
            part = case["part"]
            print(f"[parity] {name}: {part}", file=sys.stderr, flush=True)
        try:
            compute: Callable[[Case], Any] = getattr(side, case["kind"])
            with torch.no_grad():
                found = compute(case)
            if isinstance(found, np.ndarray):
                arrays[case["name"]] = found
            else:
                values[case["name"]] = {"value": found}
        except Exception as error:  # noqa: BLE001 - the failure becomes data
            values[case["name"]] = {"failed": f"{type(error).__name__}: {error}"[:500]}
    return values, arrays


def _pairs(case: Case) -> list[tuple[str, str]]:
    return [tuple(turn) for turn in case["history"]]


def _dialogue(case: Case) -> dict[str, Any]:
    return {"history": _pairs(case), "system": case["system"]}


def base_of(folder: Path) -> tuple[Path, bool]:
    """Return the folder with the model and its code, and whether the given one is an adapter on top of it."""
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        return folder, False
    base = Path(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    return (base if base.is_absolute() or base.is_dir() else folder / base), True


def _remote_class(folder: Path, file: str, name: str) -> Any:
    """Return a class of the code in `folder`, as its `auto_map` names it; only this folder is searched."""
    reference = json.loads((folder / file).read_text(encoding="utf-8"))["auto_map"][name]
    dynamic = importlib.import_module("transformers.dynamic_module_utils")
    return dynamic.get_class_from_dynamic_module(
        reference if isinstance(reference, str) else reference[0], str(folder), local_files_only=True
    )


def _with_adapter(model: Any, folder: Path) -> Any:
    """Return the model with a LoRA adapter in its layers, without fields that this peft does not know."""
    peft = importlib.import_module("peft")
    fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    known = {name: value for name, value in fields.items() if name in peft.LoraConfig.__dataclass_fields__}
    return peft.PeftModel.from_pretrained(model, str(folder), config=peft.LoraConfig(**known)).base_model.model


def _dtype_of(config: Any) -> torch.dtype:
    named = config.torch_dtype or "float32"
    return named if isinstance(named, torch.dtype) else getattr(torch, named)


def main(arguments: Sequence[str]) -> int:
    """Run all cases and write the results."""
    # As given: a checkpoint may be a link, and the work folder is the working directory.
    work, folder, device, dtype = Path(arguments[0]), Path(arguments[1]), arguments[2], arguments[3]
    for package in ("transformers", "matplotlib.font_manager"):  # their imports are not the released code's doing
        importlib.import_module(package)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tried = close_the_network()
    side = Released(folder, device, None if dtype == "auto" else getattr(torch, dtype))
    values, arrays = run_cases(side, json.loads((work / "cases.json").read_text(encoding="utf-8")), "released")
    facts = {"device": device, "dtype": str(side.dtype).removeprefix("torch."), "python": platform.python_version()}
    facts |= {"torch": torch.__version__} | {name: importlib.metadata.version(name) for name in SHOWN_PACKAGES}
    facts |= {"class": type(side.model).__name__, "network": tried}
    (work / "reference.json").write_text(json.dumps({"facts": facts, "values": values}), encoding="utf-8")
    np.savez(work / "reference.npz", **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
