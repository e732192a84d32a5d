"""The report that a run writes at each save and at the end: `training.json` and `loss.png`."""

from __future__ import annotations

import resource
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_utils.files import write_json

if TYPE_CHECKING:
    import torch

    from qwen_vl import QwenVLConfig

TRAINING = "training.json"
DENSE_BFLOAT16 = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12}  # FLOP/s, datasheets
CURVES = "loss.png"
_PACKAGES = ("mmrole", "torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")
_PANELS = (("loss", "loss"), ("learning_rate", "learning rate"), ("grad_norm", "gradient norm"))


@dataclass
class Throughput:
    """Totals since the run began or was resumed, over all processes (except the seconds).

    Attributes:
        steps: Optimizer steps.
        seconds: Wall-clock time, saves left out.
        waiting: Seconds of this time in which the first process waited for data.
        samples: Samples.
        tokens: Tokens, padding left out.
        positions: Tokens and padding.
        supervised: Supervised tokens.
        flops: Floating-point operations that the model needs for them, see `model_flops`.
    """

    steps: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    samples: int = 0
    tokens: int = 0
    positions: int = 0
    supervised: int = 0
    flops: float = 0.0

    def since(self, before: Throughput) -> Throughput:
        """Returns the totals since an earlier moment of the same run."""
        return Throughput(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))

    def utilisation(self, device: str | None, processes: int) -> float | None:
        """Returns the model FLOPs utilisation: the share of the GPUs' dense bfloat16 rate that the model's work uses.

        Args:
            device: The GPU's name; None without one.
            processes: GPUs.
        """
        peak = next((rate for card, rate in DENSE_BFLOAT16.items() if card in (device or "")), None)
        return None if peak is None else self.flops / max(self.seconds, 1e-9) / (peak * processes)

    def summary(self) -> dict[str, float | int]:
        """Returns totals and rates for `training.json`."""
        seconds = max(self.seconds, 1e-9)
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "samples": self.samples,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "samples_per_second": round(self.samples / seconds, 4),
            "tokens_per_second": round(self.tokens / seconds, 2),
            "supervised_tokens_per_second": round(self.supervised / seconds, 2),
            "padding_share": round(1 - self.tokens / max(self.positions, 1), 4),
            "waiting_for_data_share": round(self.waiting / seconds, 4),
            "model_tflops_per_second": round(self.flops / seconds / 1e12, 4),
        }


def model_flops(
    config: QwenVLConfig, *, tokens: float, squares: float, supervised: float, images: float, lora: bool
) -> float:
    """Returns the floating-point operations that training on samples needs: no padding, nothing twice.

    Logits count where there is a label. Gradient checkpointing executes the decoder's forward pass once more than is
    counted here, and a tower that trains is counted as if it did not.

    Args:
        config: The model's.
        tokens: Tokens of the samples.
        squares: Sum of the squares of the samples' lengths.
        supervised: Supervised tokens.
        images: Pictures.
        lora: Whether adapters train, and so no gradients of the weights are needed.
    """
    width, layers, visual = config.hidden_size, config.num_hidden_layers, config.visual
    passes = 2 if lora else 3  # forward, gradients of activations, and without LoRA those of weights
    decoder = 2 * layers * (4 * width**2 + 3 * width * config.intermediate_size // 2) * tokens * passes
    attention = 2 * squares * width * layers * 3  # causal: half of the square
    head = 2 * width * config.vocab_size * supervised * passes
    tower = visual["layers"] * (
        4 * visual["width"] ** 2 + 2 * visual["width"] * int(visual["width"] * visual["mlp_ratio"])
    )
    patches = (visual["image_size"] // visual["patch_size"]) ** 2
    return float(decoder + attention + head + 2 * tower * patches * images)


def size(number: int) -> str:
    """Returns a number of bytes for people."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory that was taken at once: of a GPU by tensors, otherwise by this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that affect numbers; None if not installed."""
    return {"python": sys.version.split()[0]} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_report(folders: Sequence[Path], facts: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    """Writes `training.json` and `loss.png` into each folder, each atomically.

    Args:
        folders: Existing folders.
        facts: The content of `training.json`, to which the history is added.
        history: The trainer's log: of each logged step a dict with `step` and `loss`, and other entries.
    """
    logged = [dict(entry) for entry in history if "loss" in entry]
    for folder in folders:
        write_json(folder / TRAINING, {**facts, "log": logged})
        if logged:
            try:
                draw_curves(folder / CURVES, logged)
            except (ImportError, ValueError, RuntimeError) as error:  # a failed plot must not cost the weights
                warnings.warn(f"{CURVES} could not be drawn: {error}", stacklevel=2)


def draw_curves(file: Path, logged: Sequence[Mapping[str, Any]]) -> None:
    """Plots loss, learning rate and gradient norm over the optimizer steps, one above the other, as PNG."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(8, 8), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, (key, label) in zip(figure.subplots(len(_PANELS), 1, sharex=True), _PANELS, strict=True):
            points = [(entry["step"], entry[key]) for entry in logged if key in entry]
            marker = "o" if len(points) <= 30 else ""
            axis.plot([x for x, _ in points], [y for _, y in points], color="#1f5fa8", marker=marker, markersize=3)
            axis.set_ylabel(label)
            axis.grid(alpha=0.25)
        axis.set_xlabel("optimizer step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        temporary = file.with_name(f".{file.name}.tmp")
        figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(file)
