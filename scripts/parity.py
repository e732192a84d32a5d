"""Compares this implementation with the released code, case by case, on a checkpoint folder with that code.

bash scripts/parity.sh CHECKPOINT [--i_trust_the_code_in_this_folder] [--device D] [--dtype T]

The two sides run one after the other in separate processes (parity_ours.py here, reference/run.py in the released
code's environment), on the same cases in the same folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from parity_checks import check, model_folder
from parity_environment import ensure_environment
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_utils.errors import MMRoleError, run_main
from data_utils.files import read_json, write_text
from data_utils.flag_types import positive
from qwen_vl.checkpoint import ADAPTER_CONFIG

HERE = Path(__file__).resolve().parent
TRUST = "--i_trust_the_code_in_this_folder"
LENGTHS = (2048, 2049, 4096, 4097)  # tokens; dynamic NTK changes after the first and the third
PLACES = [i / 15 for i in range(16)]  # places in a prompt where logits are compared
SEED = 1234
SAMPLING = {"checkpoint's sampling": {}, "top_p 0.95": {"top_p": 0.95}}
# Largest allowed difference, in deviations of the released values. Half precision rounds differently in every kernel,
# so there the bound catches gross errors only, and float32 decides.
ALLOWED = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.05}
ALLOWED_PIXELS = 1e-6
# Environment variables that the released side inherits: no tokens, no keys.
PASSED_ON = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
AGREES = ("same", "within")
NOT_TRUSTED = f"""
Nothing was compared: above is what this implementation computes. To compare it with the released code, that code has
to run: the .py files in the checkpoint's folder, which came with the weights. They can do on this machine whatever you
can do. If you trust whoever wrote them, run the same command with
  {TRUST}
They then get an environment of their own (.venv-reference), an empty folder to work in, and none of your environment's
variables but {", ".join(PASSED_ON)}. Python's sockets and other programs are refused to them. That stops no code that
means harm: for code that you do not trust, use a container without a network."""

Case = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table. `verdict` is "same", "within", "DIFFERS", "FAILED" or, with nothing to compare, "-"."""

    part: str
    case: str
    compared: str
    difference: str
    allowed: str
    verdict: str


@dataclass(frozen=True)
class Side:
    """The results of one side: facts about it, and JSON values, failures and arrays by name of the case."""

    facts: dict[str, Any]
    values: dict[str, Any]
    arrays: Mapping[str, np.ndarray]


def build_cases(data: Mapping[str, Any], lengths: Sequence[int], new_tokens: int) -> list[Case]:
    """Return all cases in the order of the table; each has its `part`, a `kind` of work, and a `name`."""
    cases = [*_text_cases(data), *_picture_cases(data), *_logit_cases(data, lengths)]
    cases += _dialogue_cases(data["dialogues"], new_tokens)
    for name, sample in data["samples"].items():
        cases.append({"part": "training labels", "kind": "labels", "case": name, **sample})
    return [{**case, "name": f"{case['part']}: {case['case']}"} for case in cases]


def _text_cases(data: Mapping[str, Any]) -> Iterator[Case]:
    texts = data["texts"].items()
    for tags in ("all", "vision"):
        for name, text in texts:
            yield {"part": f"ids, {tags} tags read", "kind": "ids", "case": name, "text": text, "tags": tags}
    for skip in (False, True):
        options = {
            "part": "decoded, no special tokens" if skip else "decoded",
            "kind": "decode",
            "skip_special_tokens": skip,
        }
        yield from ({**options, "case": name, "text": text} for name, text in texts)
        yield {**options, "case": "not UTF-8", "ids": data["not_utf8"]}
    for name, elements in data["elements"].items():
        yield {"part": "list format", "kind": "from_list_format", "case": name, "elements": elements}
    for name in ("picture", "boxes", "english"):
        yield {"part": "list format back", "kind": "to_list_format", "case": name, "text": data["texts"][name]}
    for name, context in data["contexts"].items():
        yield {"part": "chat context", "kind": "context", "case": name, **context}


def _picture_cases(data: Mapping[str, Any]) -> Iterator[Case]:
    for part, kind, names in (
        ("pixels", "pixels", data["pictures"]),
        ("vision output", "vision", data["seen_by_the_model"]),
    ):
        yield from ({"part": part, "kind": kind, "case": name, "image": f"images/{name}.png"} for name in names)


def _logit_cases(data: Mapping[str, Any], lengths: Sequence[int]) -> Iterator[Case]:
    options = {"part": "logits", "kind": "logits", "at": PLACES}
    yield from ({**options, "case": name, "text": text} for name, text in data["logits"].items())
    for length in lengths:
        yield {**options, "case": f"{length} tokens", "text": data["filler"], "length": length}


def _dialogue_cases(dialogues: Mapping[str, Case], new_tokens: int) -> Iterator[Case]:
    limit = {"max_new_tokens": new_tokens}
    greedy = {"do_sample": False, **limit}
    for name, dialogue in dialogues.items():
        yield {"part": "greedy text", "kind": "chat", "case": name, **dialogue, "settings": greedy, "seed": SEED}
    for label, sampling in SAMPLING.items():
        settings = {"do_sample": True, **sampling, **limit}
        for name, dialogue in dialogues.items():
            case = f"{name}, {label}"
            yield {"part": "sampled text", "kind": "chat", "case": case, **dialogue, "settings": settings, "seed": SEED}
    for name, dialogue in dialogues.items():
        yield {"part": "streamed text", "kind": "stream", "case": name, **dialogue, "settings": greedy}


def draw_pictures(pictures: Mapping[str, Any], folder: Path) -> None:
    """Draw each picture as PNG: smooth colours with some noise, the same on every machine."""
    folder.mkdir(parents=True)
    for number, (name, picture) in enumerate(pictures.items()):
        width, height = picture["size"]
        rows, columns = np.mgrid[0:height, 0:width]
        waves = [np.sin(columns / (9 + 7 * c)) + np.cos(rows / (11 + 5 * c + number)) for c in range(4)]
        noise = np.random.default_rng(number).uniform(-30, 30, (height, width, 4))
        values = np.clip(128 + 48 * np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)
        image = Image.fromarray(values, "RGBA")
        (image if picture["mode"] == "RGBA" else image.convert("RGB").convert(picture["mode"])).save(
            folder / f"{name}.png"
        )


def run_side(name: str, command: Sequence[str], work: Path, environ: Mapping[str, str]) -> Side:
    """Run one side and read its results.

    Raises:
        MMRoleError: It failed; its own lines stand above.
    """
    status = subprocess.run(  # noqa: S603 - a list, no shell
        command, cwd=work, env=environ, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False
    ).returncode
    if status or not all((work / f"{name}{kind}").is_file() for kind in (".json", ".npz")):
        raise MMRoleError(
            f"the {name} side failed (its lines above say why)",
            f"exit status {status}" + (" (killed: out of memory?)" if status in (-9, 137) else ""),
            " ".join(command),
            "fix what its last lines name; with too little memory: --dtype bfloat16, or fewer --lengths",
        )
    content = json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
    return Side(content["facts"], content["values"], np.load(work / f"{name}.npz"))


def released_environment(work: Path) -> dict[str, str]:
    """Return the environment of the released side: what it needs, its caches in the work folder, and no hub."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    caches = dict.fromkeys(("HOME", "HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME"), str(work / "home"))
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
    return {**kept, **caches, **offline, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"}


def compare(cases: Sequence[Case], ours: Side, released: Side, allowed: float) -> list[Row]:
    """Return the rows of the table.

    Args:
        cases: The cases of both sides.
        ours, released: The sides.
        allowed: Largest difference of vision outputs and logits, in standard deviations of the released values.
    """
    rows = []
    for case in cases:
        name = case["name"]
        failures = [
            f"{who}: {side.values[name]['failed']}"
            for who, side in (("ours", ours), ("released", released))
            if "failed" in side.values.get(name, {})
        ]
        if failures:
            found = ("-", "; ".join(failures), "-", "FAILED")
        elif name in ours.arrays and name in released.arrays:
            bound = ALLOWED_PIXELS if case["kind"] == "pixels" else allowed * float(released.arrays[name].std())
            found = compare_arrays(ours.arrays[name], released.arrays[name], bound)
        else:
            left, right = ours.values[name]["value"], released.values[name]["value"]
            difference = first_difference(left, right)
            found = (describe(right), difference or "0", "0", "DIFFERS" if difference else "same")
        rows.append(Row(case["part"], case["case"], *found))
    return rows


def compare_arrays(ours: np.ndarray, released: np.ndarray, bound: float) -> tuple[str, str, str, str]:
    """Return what was compared, the largest difference, the bound, and the verdict; a NaN on either side differs."""
    shape = describe(released)
    if ours.shape != released.shape:
        return shape, f"shapes {ours.shape} / {released.shape}", f"{bound:.1e}", "DIFFERS"
    largest = float(np.abs(ours - released).max())
    verdict = "same" if largest == 0 else "within" if largest <= bound else "DIFFERS"
    return shape, f"{largest:.1e}", f"{bound:.1e}", verdict


def first_difference(ours: Any, released: Any) -> str | None:
    """Return where two texts, lists of ids, or lists of such first differ, as "ours / released"; None if equal."""
    if ours == released:
        return None
    if isinstance(ours, list) and isinstance(released, list) and ours and isinstance(ours[0], list | str):
        pairs = zip(ours, released, strict=False)
        inner = next((found for found in (first_difference(*pair) for pair in pairs) if found), None)
        return inner or f"{len(ours)} / {len(released)} parts"
    if isinstance(ours, list | str) and isinstance(released, type(ours)):
        shorter = min(len(ours), len(released))
        place = next((i for i in range(shorter) if ours[i] != released[i]), shorter)
        return f"from {place} on: {ours[place : place + 8]!r} / {released[place : place + 8]!r}"
    return f"{ours!r} / {released!r}"[:200]


def describe(value: Any) -> str:
    """Return how much was compared: "37 ids", "120 characters", "(16, 151936)"."""
    if isinstance(value, np.ndarray):
        return str(value.shape)
    if isinstance(value, str):
        return f"{len(value)} characters"
    if value and isinstance(value[-1], list):
        return f"{len(value[-1])} ids"
    return f"{len(value)} elements" if value and isinstance(value[0], dict) else f"{len(value)} ids"


def own_rows(cases: Sequence[Case], ours: Side) -> list[Row]:
    """Return the table if only our side ran: sizes, and for arrays mean and deviation."""
    rows = []
    for case in cases:
        name = case["name"]
        if name in ours.arrays:
            values = ours.arrays[name]
            found = (describe(values), f"mean {values.mean():.4f}, deviation {values.std():.4f}", "-", "-")
        elif "failed" in ours.values[name]:
            found = ("-", ours.values[name]["failed"], "-", "FAILED")
        else:
            value = ours.values[name]["value"]
            found = (describe(value), repr(value)[:60], "-", "-")
        rows.append(Row(case["part"], case["case"], *found))
    return rows


def show(rows: Sequence[Row], sides: Mapping[str, Side], console: Console) -> None:
    """Print the two sides and the rows."""
    for name, side in sides.items():
        facts = [f"{key} {value}" for key, value in side.facts.items() if key != "network"]
        console.print(f"{name + ':':<10}{', '.join(facts)}", markup=False, highlight=False)
        for line in side.facts.get("network", []):
            console.print(f"network:  {line}", markup=False, highlight=False)
    fourth = "largest difference (ours / released)" if len(sides) > 1 else "ours"
    table = Table("part", "case", "compared", fourth, "allowed", "verdict")
    for row in rows:
        style = None if row.verdict in (*AGREES, "-") else "bold red"
        table.add_row(*(_plain(cell) for cell in asdict(row).values()), style=style)
    console.print(table)


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("[", r"\[")


def run(options: argparse.Namespace, work: Path, console: Console) -> tuple[list[Row], dict[str, Side]]:
    """Run our side and, if its code is trusted, the released one; show the table."""
    data = read_json(HERE / "parity_cases.json")
    cases = build_cases(data, options.lengths, options.new_tokens)
    draw_pictures(data["pictures"], work / "images")
    (work / "home").mkdir()
    (work / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    checkpoint = for_work_folder(options.checkpoint, work)
    arguments = [str(work), str(checkpoint.absolute()), options.device, options.dtype]
    python = str(ensure_environment()) if options.i_trust_the_code_in_this_folder else None
    command = [sys.executable, str(HERE / "parity_ours.py"), *arguments]
    sides = {"ours": run_side("ours", command, work, os.environ)}
    if python is None:
        rows = own_rows(cases, sides["ours"])
    else:
        command = [python, str(HERE / "reference" / "run.py"), *arguments]
        sides["released"] = run_side("reference", command, work, released_environment(work))
        allowed = ALLOWED[sides["released"].facts["dtype"]] if options.tolerance is None else options.tolerance
        rows = compare(cases, sides["ours"], sides["released"], allowed)
    show(rows, sides, console)
    return rows, sides


def for_work_folder(checkpoint: Path, work: Path) -> Path:
    """Return the checkpoint's path for both sides, which run elsewhere; an adapter's base may be relative to here."""
    base = model_folder(checkpoint)
    if base == checkpoint:
        return checkpoint
    folder = work / "adapter"
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name != ADAPTER_CONFIG:
            (folder / file.name).symlink_to(file.absolute())
    config = {**read_json(checkpoint / ADAPTER_CONFIG), "base_model_name_or_path": str(base.absolute())}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if all agrees (or nothing was compared), 1 if something differs or failed."""
    options = _parse(arguments)
    check(options.checkpoint, code=options.i_trust_the_code_in_this_folder, report=options.report)
    console = Console(width=max(Console().width, 140), soft_wrap=False)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        rows, sides = run(options, Path(folder).resolve(), console)
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in (*AGREES, "DIFFERS", "FAILED")}
    if not options.i_trust_the_code_in_this_folder:
        console.print(NOT_TRUSTED, markup=False, highlight=False, soft_wrap=True)
    else:
        text = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        console.print(f"{len(rows)} cases: {text}", highlight=False)
    if options.report:
        report = {"facts": {name: side.facts for name, side in sides.items()}, "rows": [asdict(row) for row in rows]}
        write_text(options.report, json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    return int(counts["DIFFERS"] + counts["FAILED"] > 0)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    # No abbreviations: --i must not be enough to trust code.
    parser = argparse.ArgumentParser(
        prog="bash scripts/parity.sh", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a folder with weights and the released code"
    )
    parser.add_argument(TRUST, action="store_true", help="run the .py files in it; without this only our side runs")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the first GPU, else the CPU)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16", "auto"],
        help="default: float32, which decides; in the others rounding alone may turn a close choice of a token",
    )
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="*",
        default=LENGTHS,
        help=f"tokens of the long prompts (default: {LENGTHS})",
    )
    parser.add_argument("--new_tokens", type=positive, default=24, help="tokens of every compared text (default: 24)")
    parser.add_argument("--tolerance", type=float, help=f"of vision and logits, in deviations (default: {ALLOWED})")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the table there, as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_main(main))
