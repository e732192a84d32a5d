"""Checks everything that can be checked before the weights load, and reports all problems at once.

Importing this module imports neither torch nor transformers, so that a wrong command line is answered within a second.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_utils.errors import MMRoleError, first_of, four_parts, raise_problems, shown
from finetune.report import size

if TYPE_CHECKING:
    from data_utils.schema import Row
    from finetune.arguments import Options, TrainingArguments
    from finetune.data import FileRows, SupervisedDataset
    from qwen_vl import QwenVLConfig, QwenVLForCausalLM, QwenVLTokenizer

# Packages, and the flags that need them.
_PACKAGES = {"accelerate": (), "peft": ("--use_lora", "--q_lora"), "deepspeed": ("--deepspeed",)}
# Parts of optimizers' names, the module that they need, and its package.
_OPTIMIZERS = {
    "torch_4bit|torch_8bit": ("torchao", "torchao"),
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "bnb|8bit|paged|lion|ademamix": ("bitsandbytes", "bitsandbytes"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "apex": ("apex", "apex"),
    "anyprecision": ("torchdistx", "torchdistx"),
    "npu": ("torch_npu", "torch-npu"),
    "xla": ("torch_xla", "torch-xla"),
}
_UNCUT = 1 << 30  # tokens: more than any sample has
_LISTED = 10
_CACHE = ".checked.json"
_CACHE_VERSION = 2  # of the checks of the data

# ---- the command line


def check_command_line(argv: Sequence[str]) -> None:
    """Refuses flags that need a missing package or key.

    Args:
        argv: The command line.

    Raises:
        ProblemsError: A package is not installed; a reporter is unknown, not installed, or has no key.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # the first process reports it
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--report_to", nargs="*", default=[])
    parser.add_argument("--optim", default="")
    known = parser.parse_known_args(list(argv))[0]
    given = {word.partition("=")[0] for word in argv}
    found = [
        _missing_package(package, package, ", ".join(flags) or None)
        for package, flags in _PACKAGES.items()
        if not flags or given.intersection(flags)
    ]
    needed = next((package for names, package in _OPTIMIZERS.items() if re.search(names, known.optim)), None)
    found += [_missing_package(*needed, f"--optim {known.optim}")] if needed else []
    found += [_reporter_problem(name) for name in known.report_to]
    raise_problems(problem for problem in found if problem)


def _missing_package(module: str, package: str, flag: str | None) -> MMRoleError | None:
    if importlib.util.find_spec(module) is not None:
        return None
    extra = module not in ("accelerate", "peft", "deepspeed")
    fix = f"run: pip install {package}, or choose another value" if extra else "run: bash scripts/setup.sh"
    return MMRoleError("training needs a package that is not installed", package, flag, fix)


def _reporter_problem(name: str) -> MMRoleError | None:
    flag = "--report_to"
    if name == "none":
        return None
    if name not in ("tensorboard", "wandb"):
        return MMRoleError("no such reporter", name, flag, "use none, tensorboard or wandb")
    if importlib.util.find_spec(name) is None:
        return MMRoleError(f"{name} is not installed", name, flag, f"pip install {name}, or give {flag} none")
    if name == "wandb":
        wandb = importlib.import_module("wandb")
        settings = wandb.setup().settings  # from the environment, `wandb offline` or `wandb login --host`
        if settings.mode in ("online", "run", "shared") and not wandb.api.api_key:
            fix = f"run `wandb login` or `wandb offline`, set WANDB_API_KEY, or give {flag} none"
            return MMRoleError(f"wandb has no key for {settings.base_url}, and would stop to ask", name, flag, fix)
    return None


# ---- everything else


@dataclass
class Checked:
    """The objects that the checks have read and made.

    Attributes:
        tokenizer: The base's.
        dataset: The training samples.
        eval_dataset: The samples of `--eval_data_path`, if there are any.
        facts: Facts about the training data.
        fingerprints: Path and hash of the training file and of the base checkpoint.
        space: Disk space of the saves.
        cache: What `write_cache` keeps of the checks of the data.
    """

    tokenizer: QwenVLTokenizer
    dataset: SupervisedDataset
    eval_dataset: SupervisedDataset | None
    facts: DataFacts
    fingerprints: dict[str, dict[str, str]]
    space: DiskSpace
    cache: dict[str, Any]


def check(options: Options, resume: Path | None = None) -> Checked:
    """Checks options, base and data.

    Args:
        options: The command line.
        resume: The checkpoint to resume from.

    Raises:
        ProblemsError: Something is wrong; every problem is reported.
    """
    from finetune import universal
    from finetune.checkpoints import origin_problems, resume_problems
    from finetune.data import FileRows
    from finetune.distributed import from_first, raise_together
    from finetune.model import q_lora_problems, target_problems
    from qwen_vl import QwenVLTokenizer
    from qwen_vl.checkpoint import checkpoint_fingerprint

    training, base = options.training, Path(options.model.model_name_or_path)
    data, eval_data = options.data.data_path, options.data.eval_data_path
    found = [*output_problems(training), *q_lora_problems(options.lora, training)]
    found += [*schedule_problems(training), *deepspeed_problems(training)]
    contents = {path: _content(path) for path in (data, eval_data) if path}
    hashes = [hashlib.sha256(content).hexdigest() for content in contents.values()]
    key = _cache_key(hashes, options)
    cache = from_first(_read_cache(key, options) if training.process_index == 0 else None)
    samples: dict[str, FileRows] = {}
    for number, (path, content) in enumerate(contents.items()):
        spans, wrong = (cache["rows"][number], []) if cache else _spans(path, content)
        samples[path] = FileRows(content, spans)
        fix = "build it, or give the right one"
        found += wrong or ([] if spans else [MMRoleError("the file has no samples", path, "--data_path", fix)])
    whole = list(samples.values())
    if options.data.eval_split:
        eval_data = f"{data}, held out"
        samples[data], samples[eval_data] = _split(samples[data], options, found)
    rows = samples[data]
    space = None
    if wrong := base_problems(base):
        found += wrong
    else:
        model = empty_model(base)
        if training.use_lora:
            found += target_problems(model, options.lora.lora_target_modules)
        found += _memory_problems(training, model.config.visual["image_size"])
        if rows:
            space = disk_space(options, model, len(rows))
            found += space.problems(training.output_dir) if training.process_index == 0 else []
    wrong = resume_problems(resume, options) if resume else []
    if resume and not wrong and universal.is_needed(resume, training) and training.process_index == 0:
        wrong = universal.problems(resume, training)
    found += wrong
    found += _batch_problems(training, len(rows))
    if (training.eval_strategy != "no" or training.eval_on_start) and not eval_data:
        fix = "give --eval_data_path, --eval_split, or neither --eval_strategy nor --eval_on_start"
        value = f"--eval_strategy {training.eval_strategy.value}, --eval_on_start {training.eval_on_start}"
        found.append(MMRoleError("there is nothing to evaluate on", value, None, fix))
    raise_together(found)

    fingerprints = {
        "data": {"path": str(Path(data).resolve()), "sha256": hashes[0]},
        "base": {"path": str(base.resolve()), "fingerprint": checkpoint_fingerprint(base)},
    }
    raise_together(origin_problems(resume, fingerprints, adapter=training.use_lora) if resume else [])
    tokenizer = QwenVLTokenizer.from_pretrained(base)
    datasets = {path: _dataset(rows, tokenizer, options) for path, rows in samples.items()}
    if cache is None:
        cache = {"key": key, "rows": [rows.spans for rows in whole], **_check_data(datasets, options)}
    facts = DataFacts(**cache["facts"][0])
    return Checked(tokenizer, datasets[data], datasets.get(eval_data), facts, fingerprints, space, cache)


def _content(path: str) -> bytes:
    """Returns a file's bytes; none of one that cannot be read, which `read_rows` reports."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _spans(path: str, content: bytes) -> tuple[list[tuple[int, int]], list[MMRoleError]]:
    """Returns where the rows of a data file lie in it, and no problems; or none and everything that is wrong."""
    from data_utils.schema import TrainSample, read_rows
    from finetune.data import row_spans

    wrong = read_rows(path, TrainSample)[1]
    return ([], wrong) if wrong else (row_spans(content), [])


def _dataset(rows: FileRows, tokenizer: QwenVLTokenizer, options: Options) -> SupervisedDataset:
    from finetune.data import SupervisedDataset
    from qwen_vl import QwenVLConfig

    return SupervisedDataset(
        rows,
        tokenizer,
        data_root=options.data.data_root,
        max_length=options.training.model_max_length,
        use_sample_system=options.data.use_sample_system,
        image_size=QwenVLConfig.from_pretrained(options.model.model_name_or_path).visual["image_size"],
    )


def _split(rows: FileRows, options: Options, found: list[MMRoleError]) -> tuple[FileRows, FileRows]:
    """Returns the rows to train on and those to evaluate on."""
    import numpy as np

    share = options.data.eval_split
    count = max(1, int(share * len(rows))) if share < 1 else int(share)
    if count >= len(rows):
        if rows:
            fix = f"give a number below {len(rows):,}"
            where = options.data.data_path
            found.append(MMRoleError("nothing would be left to train on", f"--eval_split {share:g}", where, fix))
        return rows, rows
    seed = options.training.seed if options.training.data_seed is None else options.training.data_seed
    drawn = np.random.default_rng((seed, len(rows))).permutation(len(rows))[:count]
    return rows.taken(np.delete(np.arange(len(rows)), drawn)), rows.taken(np.sort(drawn))


def _memory_problems(training: TrainingArguments, image_size: int) -> list[MMRoleError]:
    """Returns a problem if the loader's batches do not fit into shared memory, which would kill a worker."""
    workers, place = training.dataloader_num_workers, Path("/dev/shm")  # noqa: S108 - where torch shares tensors
    if not workers or not place.is_dir():
        return []
    # Without a GPU to copy them to, those of a whole step lie there until the next step's have come.
    waiting = 1 if training.device.type == "cuda" else 2 * training.gradient_accumulation_steps + 1
    batches = workers * (training.dataloader_prefetch_factor or 2) + waiting
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # A picture in float32 for each sample, and four numbers of eight bytes for each of its tokens.
    sample = 3 * image_size**2 * 4 + 4 * 8 * training.model_max_length
    needed = processes * batches * training.per_device_train_batch_size * sample
    free = shutil.disk_usage(place).free
    if needed <= free:
        return []
    value = (
        f"{size(needed)} are needed for {processes} process(es) with {workers} worker(s) each, {size(free)} are free"
    )
    fix = "start the container with --shm-size=16g or --ipc=host, or give --dataloader_num_workers 0"
    return [MMRoleError("shared memory has no room for the loader's batches", value, place, fix)]


def _batch_problems(training: TrainingArguments, samples: int) -> list[MMRoleError]:
    order, unit = training.order(samples), training.batch_unit
    if not samples or order.step <= order.filled:
        return []
    fix = f"give a global batch of {order.filled // unit * unit:,} or a smaller multiple of {unit}"
    if unit > order.filled:
        fix = "use fewer processes, a smaller micro-batch (MICRO_BATCH) or a smaller --loss_group, or more samples"
    value = f"global batch {order.step:,}, {samples:,} samples, filled up to {order.filled:,}"
    where = "--global_batch_size (GLOBAL_BATCH)"
    return [MMRoleError("the global batch is larger than an epoch", value, where, fix)]


def schedule_problems(training: TrainingArguments) -> list[MMRoleError]:
    """Returns why the schedule cannot be made; it is made once for a single number."""
    import torch
    from transformers import get_scheduler

    from finetune.arguments import WARMUP_LR

    name = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    if name == WARMUP_LR:
        return []
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        get_scheduler(name, optimizer, 1, 10, scheduler_specific_kwargs=training.lr_scheduler_kwargs)
    except (TypeError, ValueError, AttributeError) as error:
        what = f"the schedule {name} cannot be made: {error}"
        fix = "correct them, or choose another schedule"
        return [MMRoleError(what, training.lr_scheduler_kwargs, "--lr_scheduler_kwargs", fix)]
    return []


def deepspeed_problems(training: TrainingArguments) -> list[MMRoleError]:
    """Returns a problem for a DeepSpeed config that contradicts flags, which transformers finds after the load."""
    if not training.deepspeed or not (found := training.hf_deepspeed_config.mismatches):
        return []
    fix = 'write "auto" into the config, or give the flags these values'
    return [MMRoleError("the DeepSpeed config and the flags differ", found, training.deepspeed, fix)]


# ---- the base checkpoint


def base_problems(base: Path) -> list[MMRoleError]:
    """Returns everything that keeps a checkpoint from being trained from; no weights are read, only their headers.

    Args:
        base: The checkpoint's folder.
    """
    from qwen_vl import QwenVLTokenizer
    from qwen_vl.checkpoint import checkpoint_problems, is_adapter, weight_problems
    from qwen_vl.loading import check_fit
    from qwen_vl.tokenization import VOCAB_FILE, read_ranks

    flag = "--model_name_or_path"
    if is_adapter(base):
        fix = "merge it first with scripts/merge_lora.py, then start from the result"
        return [MMRoleError("an adapter cannot be the base of another training", base, flag, fix)]
    found = four_parts(checkpoint_problems(base, flag=flag))
    if found:
        return found
    found = four_parts(weight_problems(base))
    config = _read(lambda: _read_config(base), base / "config.json", found)
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        fix = "give the base in bfloat16 with --model_name_or_path (MODEL_PATH); --q_lora True quantizes it on loading"
        method = quantized.get("quant_method", quantized) if isinstance(quantized, dict) else quantized
        return [*found, MMRoleError("a base with quantized weights cannot be trained", method, base, fix)]
    _read(lambda: read_ranks(base / VOCAB_FILE), base / VOCAB_FILE, found)  # whatever other problems the folder has
    tokenizer = _read(lambda: QwenVLTokenizer.from_pretrained(base), base, found)
    _read(lambda: [_settings(base / name) for name in ("generation_config.json", "tokenizer_config.json")], base, found)
    if config is not None and tokenizer is not None:
        _read(lambda: check_fit(tokenizer, config, base), base, found)
    if config is not None and not found:
        _read(lambda: _check_tensors(base), base, found)
    return found


def empty_model(base: Path) -> QwenVLForCausalLM:
    """Returns a checkpoint's model without weights: names, shapes and kinds of its modules, on the meta device.

    Args:
        base: A checkpoint's folder without problems.
    """
    import torch

    from qwen_vl import QwenVLConfig, QwenVLForCausalLM

    with torch.device("meta"):
        return QwenVLForCausalLM(QwenVLConfig.from_pretrained(str(base)))


def _read(read: Callable[[], Any], where: Path, found: list[MMRoleError]) -> Any:
    """Returns what a reader returns; adds a problem and returns None if it fails, unless the file has one already."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from qwen_vl.checkpoint import CheckpointError

    unreadable = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError)
    unreadable += (StrictDataclassError, SafetensorError)
    try:
        return read()
    except MMRoleError as error:
        problem = error
    except unreadable as error:
        if isinstance(error, CheckpointError):
            problem = four_parts([error])[0]
        else:
            fix = "fetch the checkpoint again, or give another folder with --model_name_or_path"
            what = "the base checkpoint cannot be read"
            problem = MMRoleError(what, f"{type(error).__name__}: {error}", where, fix)
    if not any(one.where == problem.where or str(one.where) in str(problem.value) for one in found if one.where):
        found.append(problem)
    return None


def _settings(file: Path) -> None:
    from qwen_vl.checkpoint import read_json_file

    if file.is_file():
        read_json_file(file)


def _read_config(base: Path) -> QwenVLConfig:
    from qwen_vl import QwenVLConfig
    from qwen_vl.checkpoint import check_vision, read_json_file

    check_vision(read_json_file(base / "config.json"), base)
    return QwenVLConfig.from_pretrained(str(base))


def _check_tensors(base: Path) -> None:
    """Compares the tensors of a checkpoint with what its model needs; only safetensors are looked into."""
    from finetune.checkpoints import saved_tensors

    there = {name: tuple(shape) for name, (shape, _) in saved_tensors(base).items()}
    needed = {name: tuple(parameter.shape) for name, parameter in empty_model(base).named_parameters()}
    if not there:
        return  # a .bin is not opened before it is loaded
    wrong = [f"{name}: missing" for name in needed if name not in there]
    wrong += [
        f"{name}: {list(there[name])} instead of {list(shape)}"
        for name, shape in needed.items()
        if there.get(name, shape) != shape
    ]
    if wrong:
        fix = "fetch the checkpoint again, or give another folder with --model_name_or_path"
        raise MMRoleError("the weights do not fit config.json", first_of(wrong), base, fix)


# ---- the output folder


@dataclass(frozen=True)
class DiskSpace:
    """The disk space of a run's saves, in bytes.

    Attributes:
        checkpoint: Size of a checkpoint that can be resumed from, 0 if none is written.
        finished: Size of the finished model.
        peak: The most that all saves take at once.
        free: Free space, with that of existing checkpoints, which are a part of the peak or are deleted.
    """

    checkpoint: int
    finished: int
    peak: int
    free: int

    def summary(self) -> str:
        """Returns a one-line summary."""
        saves = f"a checkpoint takes about {size(self.checkpoint)}, " if self.checkpoint else ""
        text = f"{saves}the finished model {size(self.finished)}, all together up to {size(self.peak)}"
        return f"{text}; {size(self.free)} are free"

    def problems(self, output_dir: str) -> list[MMRoleError]:
        """Returns a problem if the saves do not fit."""
        if self.free >= self.peak:
            return []
        fix = (
            "free some space, give another --output_dir, or write less with --save_total_limit, --save_only_model or "
            "--save_strategy no"
        )
        return [MMRoleError("the disk has no room for what the run saves", self.summary(), output_dir, fix)]


def disk_space(options: Options, model: QwenVLForCausalLM, samples: int) -> DiskSpace:
    """Estimates what the run's saves need by the sizes of what trains.

    Args:
        options: The command line.
        model: The base's `empty_model`; what is frozen is marked in it.
        samples: Number of training samples.
    """
    import torch

    from finetune.checkpoints import checkpoints
    from finetune.model import adapter_weights, freeze, is_chat_model, parameter_counts, weight_dtype

    training, dtype = options.training, weight_dtype(options.training)
    if training.use_lora:
        trained = adapter_weights(model, options.lora)
        if not options.lora.q_lora and not is_chat_model(options.model.model_name_or_path):
            trained += model.transformer.wte.weight.numel() + model.lm_head.weight.numel()
        weights = finished = trained * (dtype.itemsize if training.deepspeed else torch.float32.itemsize)
    else:
        freeze(model, training)
        trained, total = parameter_counts(model)
        weights, finished = total * dtype.itemsize, total * (torch.bfloat16 if training.bf16 else dtype).itemsize
    adam = str(getattr(training.optim, "value", training.optim)).startswith("adamw_torch")
    # A weight's two moments, and DeepSpeed's own float32 copy.
    state = trained * (12 if training.deepspeed else 8) * adam * (not training.save_only_model)
    order, folder = training.order(samples), Path(training.output_dir)
    strategy = getattr(training.save_strategy, "value", training.save_strategy)
    saves = {"no": 0, "steps": _saves_by_steps(training.save_steps, order.updates), "epoch": order.epoch_ends()}[
        strategy
    ]
    kept = min(saves, (training.save_total_limit or saves) + training.load_best_model_at_end)
    # An older one is deleted when the newest is in place; with one kept to resume from, only these two hold state.
    states = 2 if training.resume_save_steps else min(saves, kept + 1)
    peak = weights * (kept + 1 if training.resume_save_steps else states) + state * states
    old = [file for path in checkpoints(folder) for file in path.rglob("*")]
    freed = sum(file.stat().st_size for file in old if file.is_file())
    checkpoint = (weights + state) * bool(peak)
    return DiskSpace(checkpoint, finished, peak + finished, shutil.disk_usage(_existing(folder)).free + freed)


def _saves_by_steps(every: float, updates: int) -> int:
    """Returns the number of saves; `every` below 1 is a share of all updates, and the last update is saved too."""
    return math.ceil(updates / (every if every >= 1 else max(1, math.ceil(every * updates))))


def output_problems(training: TrainingArguments) -> list[MMRoleError]:
    """Returns a problem if the output folder cannot be written, or holds another run and no flag says what to do."""
    from finetune.arguments import resumes
    from finetune.checkpoints import checkpoints

    folder, problems = Path(training.output_dir), []
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"\0")
    except OSError as error:
        fix = "correct the folder's permissions, or give another --output_dir"
        problems.append(MMRoleError(f"nothing can be written there: {error.strerror}", folder, place, fix))
    there = checkpoints(folder)
    if there and not training.overwrite_output_dir and not resumes(training.resume_from_checkpoint):
        fix = "give --resume_from_checkpoint auto to resume it, another --output_dir, or --overwrite_output_dir"
        problems.append(MMRoleError("the output folder already holds a run", there[-1].name, folder, fix))
    return problems


def _existing(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    return next((path for path in (folder, *folder.resolve().parents) if path.exists()), Path.cwd())


# ---- the samples


@dataclass
class DataFacts:
    """Counts over a training file.

    Attributes:
        samples: Number of samples.
        tokens: Tokens that are kept of them.
        longest: Tokens of the longest, before it is cut.
        too_long: Ids of the samples that are cut.
        answer_cut: Ids of those whose answer is partly cut off.
        answer_lost: Ids of those whose answer is cut off completely: they train on control tokens only.
        no_answer: Ids of those without an answer, which do so too.
        answered: Samples with at least one answer token.
        pictures: Pictures of all samples.
        with_picture: Samples with a picture.
    """

    samples: int = 0
    tokens: int = 0
    longest: int = 0
    too_long: list[str] = field(default_factory=list)
    answer_cut: list[str] = field(default_factory=list)
    answer_lost: list[str] = field(default_factory=list)
    no_answer: list[str] = field(default_factory=list)
    answered: int = 0
    pictures: int = 0
    with_picture: int = 0

    def add(self, other: DataFacts) -> None:
        """Adds the counts of another share of the file."""
        for name, value in vars(other).items():
            setattr(self, name, max(self.longest, value) if name == "longest" else getattr(self, name) + value)

    def summary(self, max_length: int) -> str:
        """Returns a summary of two to four lines."""
        mean = self.tokens / max(self.samples, 1)
        text = f"{self.samples:,} samples, {mean:,.0f} tokens on average, the longest {self.longest:,}"
        text += f"\n{self.pictures:,} pictures in {self.with_picture:,} of the samples"
        if self.too_long:
            text += (
                f"\n{len(self.too_long):,} are longer than {max_length:,} tokens and are cut: {len(self.answer_cut):,} "
                f"lose a part of their answer, {len(self.answer_lost):,} all of it"
            )
            lost = [*self.answer_lost, *self.answer_cut]
            if lost:
                text += f" ({_listed(lost)}); a larger --model_max_length keeps them"
        if self.no_answer:
            text += f"\n{len(self.no_answer):,} have no answer to learn from ({_listed(self.no_answer)})"
        return text

    def counts(self) -> dict[str, int]:
        """Returns the counts, for `training.json`."""
        return {name: len(value) if isinstance(value, list) else value for name, value in asdict(self).items()}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:_LISTED])) + (", …" if len(names) > _LISTED else "")


def write_cache(output: Path, cache: dict[str, Any]) -> None:
    """Stores the results of the data checks in the output folder, for the next start of the same training."""
    from data_utils.files import write_text

    write_text(output / _CACHE, json.dumps(cache))


def _read_cache(key: list[Any], options: Options) -> Any:
    """Returns the results of an earlier start for the same data, or None if it or a picture has changed since."""
    from data_utils.files import read_json

    try:
        cache = read_json(Path(options.training.output_dir) / _CACHE)
        if cache["key"] != key:
            return None
        root = Path(options.data.data_root)
        if any(_stamp(root / image) != stamp for image, stamp in cache["pictures"].items()):
            return None
        [DataFacts(**facts) for facts in cache["facts"]]
    except (MMRoleError, OSError, KeyError, TypeError, AttributeError):
        return None
    return cache


def _cache_key(hashes: list[str], options: Options) -> list[Any]:
    """Returns everything that decides the results of the data checks, except the pictures.

    Args:
        hashes: Of the data files.
        options: The command line.
    """
    from data_utils.paths import sha256_of
    from qwen_vl.checkpoint import VOCAB_FILE

    vocabulary = sha256_of(Path(options.model.model_name_or_path) / VOCAB_FILE)
    root = str(Path(options.data.data_root).resolve())
    length, system = options.training.model_max_length, options.data.use_sample_system
    split = [options.data.eval_split, options.training.seed, options.training.data_seed]
    return [_CACHE_VERSION, hashes, vocabulary, root, length, system, split]


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _check_data(datasets: dict[str, SupervisedDataset], options: Options) -> dict[str, Any]:
    """Tokenizes all samples and opens all pictures, each in one process; returns what is found for `write_cache`."""
    from finetune.distributed import gathered, raise_together

    rank, processes = options.training.process_index, options.training.world_size
    all_facts, pictures, found = {}, {}, []
    for path, dataset in datasets.items():
        facts, users, wrong = check_samples(dataset, Path(path), rank, processes)
        found += wrong
        all_facts[path], all_users = DataFacts(), {}
        for share, share_users in gathered((facts, users)):
            all_facts[path].add(share)
            for image, names in share_users.items():
                all_users.setdefault(image, []).extend(names)
        stamps, wrong = check_pictures(dataset, all_users, Path(path), rank, processes)
        found += wrong
        pictures |= stamps
    raise_together(found)
    length = options.training.model_max_length
    fix = "raise --model_max_length, or look for the answers (turns from assistant) in the file"
    value = f"{length} tokens are kept of a sample"
    what = "no answer token is left in the whole file"
    raise_together([MMRoleError(what, value, path, fix) for path, facts in all_facts.items() if not facts.answered])
    pictures = {image: stamp for share in gathered(pictures) for image, stamp in share.items()}
    return {"facts": [asdict(one) for one in all_facts.values()], "pictures": pictures}


def check_samples(
    dataset: SupervisedDataset, source: Path, first: int = 0, step: int = 1
) -> tuple[DataFacts, dict[str, list[str]], list[MMRoleError]]:
    """Tokenizes samples.

    Args:
        dataset: The samples.
        source: Their file, for the messages.
        first: This process's first sample.
        step: Distance from each of its samples to the next.

    Returns:
        Facts about its share, its pictures with the ids of the samples that show them, and a problem per sample that
        cannot be made.
    """
    from tqdm import tqdm

    from data_utils.supervised import image_names

    facts, users, problems = DataFacts(), {}, []
    hidden = None if first == 0 else True
    for index in tqdm(range(first, len(dataset), step), desc=f"checking {source.name}", disable=hidden, leave=False):
        row = dataset.rows[index]
        name = row["id"]
        try:
            ids, labels = dataset.tokens(index, _UNCUT)
            kept = ids if len(ids) <= dataset.max_length else dataset.tokens(index)[0]
        except ValueError as error:
            problems.append(MMRoleError(str(error), name, source, "correct or remove the sample"))
            continue
        if row.get("image") and "<img>" not in "".join(turn["value"] for turn in row["conversations"]):
            problems.append(_hidden_picture(row, source))
            continue
        images = image_names(kept, dataset.tokenizer)
        _count(facts, name, labels, len(kept), dataset.tokenizer)
        facts.pictures += len(images)
        facts.with_picture += bool(images)
        for image in images:
            users.setdefault(image, []).append(name)
    return facts, users, problems


def check_pictures(
    dataset: SupervisedDataset, users: dict[str, list[str]], source: Path, first: int = 0, step: int = 1
) -> tuple[dict[str, list[int]], list[MMRoleError]]:
    """Opens pictures.

    Args:
        dataset: The samples.
        users: Pictures with the ids of the samples that show them.
        source: The samples' file, for the messages.
        first: This process's first picture.
        step: Distance from each of its pictures to the next.

    Returns:
        Size and time of modification of its share of the pictures, and a problem per picture that cannot be used.
    """
    from tqdm import tqdm

    stamps, problems = {}, []
    share = list(users.items())[first::step]
    for image, samples in tqdm(share, desc="opening images", disable=None if first == 0 else True, leave=False):
        if problem := _image_problem(dataset, image, samples, source):
            problems.append(problem)
        else:
            stamps[image] = _stamp(dataset.data_root / image)
    return stamps, problems


def _hidden_picture(row: Row, source: Path) -> MMRoleError:
    fix = "begin the question with: Picture 1: <img>images/NAME</img> (and remove `<image>`), or remove `image`"
    what = "a sample names a picture that its text does not show, so it would train without the picture"
    return MMRoleError(what, row["image"], f"{source}, sample {shown(row['id'])}", fix)


def _count(facts: DataFacts, name: str, labels: Sequence[int], kept: int, tokenizer: QwenVLTokenizer) -> None:
    facts.samples += 1
    facts.tokens += kept
    facts.longest = max(facts.longest, len(labels))
    answer = answer_positions(labels, tokenizer)
    facts.answered += any(position < kept for position in answer)
    if not answer:
        facts.no_answer.append(name)
    if kept == len(labels):
        return
    facts.too_long.append(name)
    lost = sum(1 for position in answer if position >= kept)
    if lost:
        (facts.answer_lost if lost == len(answer) else facts.answer_cut).append(name)


def answer_positions(labels: Sequence[int], tokenizer: QwenVLTokenizer) -> list[int]:
    """Returns the positions of the assistant's words: labels without the control tokens around each turn."""
    from qwen_vl.loss import IGNORED

    marks = (IGNORED, tokenizer.im_start_id, tokenizer.im_end_id)
    return [i for i, label in enumerate(labels) if label not in marks and labels[i - 1] != tokenizer.im_end_id]


def _image_problem(dataset: SupervisedDataset, image: str, samples: Sequence[str], source: Path) -> MMRoleError | None:
    from data_utils.supervised import image_path

    where = f"{source}, sample {shown(samples[0])}" + (f" and {len(samples) - 1} more" if len(samples) > 1 else "")
    try:
        dataset.processor.decode(image_path(dataset.data_root, image))
    except FileNotFoundError:
        fix = f"put it below {dataset.data_root.resolve()}, or give the right --data_root (DATA_ROOT)"
        return MMRoleError("an image is missing", image, where, fix)
    except MMRoleError as error:
        return MMRoleError(error.what, image, where, error.fix)
    except (OSError, ValueError) as error:
        return MMRoleError("an image is broken", f"{image}: {error}", where, "fetch it again")
    return None
