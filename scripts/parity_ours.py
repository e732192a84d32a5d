"""Our side of scripts/parity.sh: runs this project's model on every case. Started by parity.py.

    python scripts/parity_ours.py WORK CHECKPOINT DEVICE DTYPE

Reads WORK/cases.json, runs with WORK as its working directory, and writes ours.json and ours.npz there.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from reference.run import run_cases

import qwen_vl
from data_utils.errors import MMRoleError, run_main
from data_utils.supervised import preprocess
from qwen_vl.chat import make_context
from qwen_vl.special_tokens import VISION_TAGS

Case = Mapping[str, Any]


class Ours:
    """Our model and tokenizer, with a method for each kind of case."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        try:
            self.model, self.tokenizer = qwen_vl.load(folder, dtype=dtype, device=device)
        except (OSError, ValueError) as error:
            raise MMRoleError(
                "the checkpoint cannot be loaded", str(error), str(folder), "see the line above"
            ) from error
        self.processor = qwen_vl.QwenVLImageProcessor(self.model.config.visual["image_size"])

    def ids(self, case: Case) -> list[int]:
        return self.tokenizer.encode(case["text"], allowed_special="all" if case["tags"] == "all" else VISION_TAGS)

    def decode(self, case: Case) -> str:
        ids = case["ids"] if "ids" in case else self.tokenizer.encode(case["text"])
        return self.tokenizer.decode(ids, skip_special_tokens=case["skip_special_tokens"])

    def from_list_format(self, case: Case) -> str:
        return self.tokenizer.from_list_format(case["elements"])

    def to_list_format(self, case: Case) -> list[dict[str, str]]:
        return self.tokenizer.to_list_format(case["text"])

    def context(self, case: Case) -> list[Any]:
        window = case["max_window_size"]
        return list(make_context(self.tokenizer, case["query"], case["history"], case["system"], window))

    def pixels(self, case: Case) -> np.ndarray:
        return self.processor.load(case["image"]).numpy()

    def vision(self, case: Case) -> np.ndarray:
        pixels = self.processor.load_all([case["image"]]).to(self.model.device)
        return self.model.transformer.visual(pixels)[0].float().cpu().numpy()

    def logits(self, case: Case) -> np.ndarray:
        ids = self.tokenizer.encode(case["text"])
        if (length := case.get("length")) is not None:
            ids = (ids * (length // len(ids) + 1))[:length]
        images = [e["image"] for e in self.tokenizer.to_list_format(case["text"]) if "image" in e]
        pixels = self.processor.load_all(images)
        out = self.model(
            torch.tensor([ids], device=self.model.device),
            pixel_values=None if pixels is None else pixels.to(self.model.device),
            logits_to_keep=torch.tensor([round(place * (len(ids) - 1)) for place in case["at"]]),
            use_cache=False,
        )
        return out.logits[0].float().cpu().numpy()

    def chat(self, case: Case) -> str:
        return self.model.chat(
            self.tokenizer,
            case["query"],
            case["history"],
            case["system"],
            seed=case["seed"],
            **case["settings"],
        )[0]

    def stream(self, case: Case) -> str:
        arguments = (self.tokenizer, case["query"], case["history"], case["system"])
        return ["", *self.model.chat_stream(*arguments, **case["settings"])][-1]

    def labels(self, case: Case) -> list[list[int]]:
        return list(preprocess(case["conversations"], self.tokenizer, case["max_length"]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cases and write the results."""
    work, folder, device, dtype = arguments or sys.argv[1:]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    print("[parity] ours: loading the model, without the folder's code", file=sys.stderr, flush=True)
    side = Ours(Path(folder), device, dtype)
    cases = json.loads((Path(work) / "cases.json").read_text(encoding="utf-8"))
    values, arrays = run_cases(side, cases, "ours")
    facts = {"device": str(side.model.device), "dtype": str(side.model.dtype).removeprefix("torch.")}
    facts |= {"python": platform.python_version(), "torch": torch.__version__}
    facts |= {"transformers": transformers.__version__, "numpy": np.__version__, "class": type(side.model).__name__}
    (Path(work) / "ours.json").write_text(json.dumps({"facts": facts, "values": values}), encoding="utf-8")
    np.savez(Path(work) / "ours.npz", **arrays)


if __name__ == "__main__":
    sys.exit(run_main(main))
