"""The report that a run writes at each save and at the end: `training.json` and `loss.png`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_utils.files import write_json

TRAINING = "training.json"
CURVES = "loss.png"
_PACKAGES = ("mmrole", "torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")
_PANELS = (("loss", "loss"), ("learning_rate", "learning rate"), ("grad_norm", "gradient norm"))


@dataclass
class Throughput:
    """What was trained since the run began or was resumed; over all processes, but for the seconds.

    Attributes:
        steps: Optimizer steps.
        seconds: Wall-clock time, saves left out.
        waiting: Seconds of it that the first process waited for data.
        samples: Samples.
        tokens: Tokens, padding left out.
        positions: Tokens and padding.
        supervised: Tokens that were learned.
    """

    steps: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    samples: int = 0
    tokens: int = 0
    positions: int = 0
    supervised: int = 0

    def summary(self) -> dict[str, float | int]:
        """Returns totals and rates, as `training.json` has them."""
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
        }


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that decide numbers; None for what is not installed."""
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
        facts: What `training.json` holds; the history is added.
        history: The trainer's log: of each logged step a dict with `step` and `loss`, and other entries.
    """
    logged = [dict(entry) for entry in history if "loss" in entry]
    for folder in folders:
        write_json(folder / TRAINING, {**facts, "log": logged})
        if logged:
            try:
                draw_curves(folder / CURVES, logged)
            except (ImportError, ValueError, RuntimeError) as error:  # no picture is worth the weights
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
