"""Checks everything that can be checked before the weights load, and reports all problems at once.

Importing this module imports neither torch nor transformers, so that a wrong command line is answered within a second.
"""

from __future__ import annotations

import argparse
import importlib.util
import netrc
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_utils.errors import MMRoleError, four_parts, raise_problems, shown

if TYPE_CHECKING:
    from data_utils.schema import Row
    from finetune.arguments import Options, TrainingArguments
    from finetune.data import SupervisedDataset
    from qwen_vl import QwenVLConfig, QwenVLForCausalLM, QwenVLTokenizer

_PACKAGES = {"accelerate": None, "peft": "--use_lora", "deepspeed": "--deepspeed"}  # and the flags that need them
_WANDB_MODES_WITHOUT_KEY = {"offline", "disabled", "dryrun"}
_UNCUT = 1 << 30  # tokens: more than any sample has
_LISTED = 10


# ---- the command line


def check_command_line(argv: Sequence[str]) -> None:
    """Refuses flags that need a package or a key that is not there.

    Args:
        argv: The command line.

    Raises:
        ProblemsError: A package is not installed; a reporter is unknown, not installed, or has no key.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # the first process reports it
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--report_to", nargs="*", default=[])
    reporters = parser.parse_known_args(list(argv))[0].report_to
    given = {word.partition("=")[0] for word in argv}
    missing = [
        MMRoleError("training needs a package that is not installed", package, flag, "run: bash scripts/setup.sh")
        for package, flag in _PACKAGES.items()
        if (flag is None or flag in given) and importlib.util.find_spec(package) is None
    ]
    raise_problems([*missing, *(problem for name in reporters if (problem := _reporter_problem(name)))])


def _reporter_problem(name: str) -> MMRoleError | None:
    flag = "--report_to"
    if name == "none":
        return None
    if name not in ("tensorboard", "wandb"):
        return MMRoleError("no such reporter", name, flag, "use none, tensorboard or wandb")
    if importlib.util.find_spec(name) is None:
        return MMRoleError(f"{name} is not installed", name, flag, f"pip install {name}, or give {flag} none")
    if name == "wandb" and not _wandb_can_log_in():
        fix = f"run `wandb login`, set WANDB_API_KEY, set WANDB_MODE=offline, or give {flag} none"
        return MMRoleError("wandb has no key, and would stop to ask for one", name, flag, fix)
    return None


def _wandb_can_log_in() -> bool:
    if os.environ.get("WANDB_MODE") in _WANDB_MODES_WITHOUT_KEY or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


# ---- everything else


@dataclass
class Checked:
    """What the checks have read and made on the way.

    Attributes:
        tokenizer: The base's.
        dataset: The training samples.
        eval_dataset: The samples of `--eval_data_path`, if there are any.
        facts: Facts about the training data.
        fingerprints: Path and hash of the training file and of the base checkpoint.
        space: What the saves need on the disk.
    """

    tokenizer: QwenVLTokenizer
    dataset: SupervisedDataset
    eval_dataset: SupervisedDataset | None
    facts: DataFacts
    fingerprints: dict[str, dict[str, str]]
    space: DiskSpace


def check(options: Options, resume: Path | None = None) -> Checked:
    """Checks options, base and data.

    Args:
        options: The command line.
        resume: The checkpoint to resume from.

    Raises:
        ProblemsError: Something is wrong; holds everything that is.
    """
    from data_utils.paths import sha256_of
    from data_utils.schema import TrainSample, read_rows
    from finetune.checkpoints import identity, origin_problems, resume_problems
    from finetune.distributed import raise_together
    from finetune.model import q_lora_problems, target_problems
    from qwen_vl import QwenVLTokenizer
    from qwen_vl.checkpoint import checkpoint_fingerprint

    training, base = options.training, Path(options.model.model_name_or_path)
    data, eval_data = options.data.data_path, options.data.eval_data_path
    found = [*output_problems(training), *q_lora_problems(options.lora, training)]
    contents = {path: read_rows(path, TrainSample) for path in (data, eval_data) if path}
    for path, (rows, wrong) in contents.items():
        fix = "build it, or give the right one"
        found += wrong or ([] if rows else [MMRoleError("the file has no samples", path, "--data_path", fix)])
    rows = contents[data][0]
    space = None
    if wrong := base_problems(base):
        found += wrong
    else:
        model = empty_model(base)
        if training.use_lora:
            found += target_problems(model, options.lora.lora_target_modules)
        space = disk_space(options, model)
        found += space.problems(training.output_dir) if training.process_index == 0 else []
    found += resume_problems(resume, identity(options)) if resume else []
    found += _batch_problems(training, len(rows))
    if training.eval_strategy != "no" and not eval_data:
        fix = "give --eval_data_path, or --eval_strategy no"
        found.append(MMRoleError("there is nothing to evaluate on", training.eval_strategy.value, None, fix))
    raise_together(found)

    fingerprints = {
        "data": {"path": str(Path(data).resolve()), "sha256": sha256_of(Path(data)) or ""},
        "base": {"path": str(base.resolve()), "fingerprint": checkpoint_fingerprint(base)},
    }
    raise_together(origin_problems(resume, fingerprints, adapter=training.use_lora) if resume else [])
    tokenizer = QwenVLTokenizer.from_pretrained(base)
    datasets = {path: _dataset(rows, tokenizer, options) for path, (rows, _) in contents.items()}
    facts = _check_data(datasets, options)
    return Checked(tokenizer, datasets[data], datasets.get(eval_data), facts[data], fingerprints, space)


def _dataset(rows: Sequence[Row], tokenizer: QwenVLTokenizer, options: Options) -> SupervisedDataset:
    from finetune.data import CompactRows, SupervisedDataset
    from qwen_vl import QwenVLConfig

    return SupervisedDataset(
        CompactRows(rows),
        tokenizer,
        data_root=options.data.data_root,
        max_length=options.training.model_max_length,
        use_sample_system=options.data.use_sample_system,
        image_size=QwenVLConfig.from_pretrained(options.model.model_name_or_path).visual["image_size"],
    )


def _batch_problems(training: TrainingArguments, samples: int) -> list[MMRoleError]:
    order, group = training.order(samples), training.group_size
    if not samples or order.step <= order.filled:
        return []
    fix = f"give a global batch of {order.filled // group * group:,} or a smaller multiple of {group}"
    value = f"global batch {order.step:,}, {samples:,} samples, filled up to {order.filled:,}"
    where = "--global_batch_size (GLOBAL_BATCH)"
    return [MMRoleError("the global batch is larger than an epoch", value, where, fix)]


# ---- the base checkpoint


def base_problems(base: Path) -> list[MMRoleError]:
    """Returns everything that keeps a checkpoint from being trained from; no weights are read, only their headers.

    Args:
        base: The checkpoint's folder.
    """
    from qwen_vl import QwenVLTokenizer
    from qwen_vl.checkpoint import checkpoint_problems, is_adapter, weight_problems
    from qwen_vl.loading import check_fit

    flag = "--model_name_or_path"
    if is_adapter(base):
        fix = "merge it first with scripts/merge_lora.py, then start from the result"
        return [MMRoleError("an adapter cannot be the base of another training", base, flag, fix)]
    found = four_parts(checkpoint_problems(base, flag=flag))
    if found:
        return found
    found = four_parts(weight_problems(base))
    config = _read(lambda: _read_config(base), base / "config.json", found)
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
    from qwen_vl.checkpoint import read_json_file

    if "visual" not in read_json_file(base / "config.json"):
        raise ValueError("config.json has no vision tower (visual): this is no Qwen-VL checkpoint")
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
        listed = wrong if len(wrong) <= _LISTED else [*wrong[:_LISTED], f"… and {len(wrong) - _LISTED} more"]
        fix = "fetch the checkpoint again, or give another folder with --model_name_or_path"
        raise MMRoleError("the weights do not fit config.json", listed, base, fix)


# ---- the output folder


@dataclass(frozen=True)
class DiskSpace:
    """What a run's saves need on the disk, in bytes.

    Attributes:
        checkpoint: Size of a checkpoint, 0 if none is written.
        finished: Size of the finished model.
        free: What is free; an earlier run's checkpoints that are to be deleted count.
    """

    checkpoint: int
    finished: int
    free: int

    def summary(self) -> str:
        """Returns one line for people."""
        saves = f"a checkpoint takes about {_size(self.checkpoint)}, " if self.checkpoint else ""
        return f"{saves}the finished model {_size(self.finished)}; {_size(self.free)} are free"

    def problems(self, output_dir: str) -> list[MMRoleError]:
        """Returns a problem if a first checkpoint and the finished model do not fit."""
        if self.free >= self.checkpoint + self.finished:
            return []
        fix = "free some space, give another --output_dir, or write less with --save_only_model or --save_strategy no"
        return [MMRoleError("the disk has no room for what the run saves", self.summary(), output_dir, fix)]


def disk_space(options: Options, model: QwenVLForCausalLM) -> DiskSpace:
    """Estimates what the run's saves need by the sizes of what trains.

    Args:
        options: The command line.
        model: The base's `empty_model`; what is frozen is marked in it.
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
    state_bytes = 12 if training.deepspeed else 8  # a weight's two moments, and DeepSpeed's own float32 copy
    checkpoint = weights + trained * state_bytes * adam * (not training.save_only_model)
    saves = str(getattr(training.save_strategy, "value", training.save_strategy)) != "no"
    folder = Path(training.output_dir)
    old = [file for path in checkpoints(folder) for file in path.rglob("*")] if training.overwrite_output_dir else []
    freed = sum(file.stat().st_size for file in old if file.is_file())
    return DiskSpace(checkpoint * saves, finished, shutil.disk_usage(_existing(folder)).free + freed)


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
        problems.append(MMRoleError("the output folder has a run in it already", there[-1].name, folder, fix))
    return problems


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"


def _existing(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    return next((path for path in (folder, *folder.resolve().parents) if path.exists()), Path.cwd())


# ---- the samples


@dataclass
class DataFacts:
    """What a training file holds, counted over the whole of it.

    Attributes:
        samples: Number of samples.
        tokens: Tokens that are kept of them.
        longest: Tokens of the longest, before it is cut.
        too_long: Ids of the samples that are cut.
        answer_cut: Ids of those that lose a part of their answer.
        answer_lost: Ids of those that lose all of it: they train on control tokens only.
        no_answer: Ids of those without an answer, which do so too.
        answered: Samples of which at least a token of an answer is kept.
    """

    samples: int = 0
    tokens: int = 0
    longest: int = 0
    too_long: list[str] = field(default_factory=list)
    answer_cut: list[str] = field(default_factory=list)
    answer_lost: list[str] = field(default_factory=list)
    no_answer: list[str] = field(default_factory=list)
    answered: int = 0

    def add(self, other: DataFacts) -> None:
        """Adds the counts of another share of the file."""
        for name, value in vars(other).items():
            setattr(self, name, max(self.longest, value) if name == "longest" else getattr(self, name) + value)

    def summary(self, max_length: int) -> str:
        """Returns one to three lines for people."""
        mean = self.tokens / max(self.samples, 1)
        text = f"{self.samples:,} samples, {mean:,.0f} tokens on average, the longest {self.longest:,}"
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


def _check_data(datasets: dict[str, SupervisedDataset], options: Options) -> dict[str, DataFacts]:
    """Returns facts about each file, if all of its samples can be made and it has answers to learn from."""
    from finetune.distributed import gathered, raise_together

    facts, found = {}, []
    first, step = options.training.process_index, options.training.world_size
    for path, dataset in datasets.items():
        facts[path], wrong = check_samples(dataset, Path(path), first, step)
        found += wrong
    raise_together(found)
    for path, share in facts.items():
        facts[path] = DataFacts()
        for one in gathered(share):
            facts[path].add(one)
    length = options.training.model_max_length
    fix = "raise --model_max_length, or look for the answers (turns from assistant) in the file"
    value = f"{length} tokens are kept of a sample"
    what = "no answer token is left in the whole file"
    raise_together([MMRoleError(what, value, path, fix) for path, one in facts.items() if not one.answered])
    return facts


def check_samples(
    dataset: SupervisedDataset, source: Path, first: int = 0, step: int = 1
) -> tuple[DataFacts, list[MMRoleError]]:
    """Tokenizes samples and opens their images, each image once.

    Args:
        dataset: The samples.
        source: Their file, for the messages.
        first: This process's first sample.
        step: Distance from each of its samples to the next.

    Returns:
        Facts about its share, and a problem per sample that cannot be made and per image that cannot be used.
    """
    from tqdm import tqdm

    from data_utils.supervised import image_names

    facts, problems = DataFacts(), []
    users: dict[str, list[str]] = {}
    hidden = None if first == 0 else True
    for index in tqdm(range(first, len(dataset), step), desc=f"checking {source.name}", disable=hidden, leave=False):
        name = dataset.rows[index]["id"]
        try:
            ids, labels = dataset.tokens(index, _UNCUT)
            kept = ids if len(ids) <= dataset.max_length else dataset.tokens(index)[0]
        except ValueError as error:
            problems.append(MMRoleError(str(error), name, source, "correct or remove the sample"))
            continue
        _count(facts, name, labels, len(kept), dataset.tokenizer)
        for image in image_names(kept, dataset.tokenizer):
            users.setdefault(image, []).append(name)
    for image, samples in tqdm(users.items(), desc="opening images", disable=hidden, leave=False):
        if problem := _image_problem(dataset, image, samples, source):
            problems.append(problem)
    return facts, problems


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
    """Returns the positions of the assistant's words: labels without the marks around a turn, which all turns have."""
    from qwen_vl.loss import IGNORED

    marks = (IGNORED, tokenizer.im_start_id, tokenizer.im_end_id)
    return [i for i, label in enumerate(labels) if label not in marks and labels[i - 1] != tokenizer.im_end_id]


def _image_problem(dataset: SupervisedDataset, image: str, samples: Sequence[str], source: Path) -> MMRoleError | None:
    from data_utils.supervised import image_path

    where = f"{source}, sample {shown(samples[0])}" + (f" and {len(samples) - 1} more" if len(samples) > 1 else "")
    try:
        dataset.processor.load(image_path(dataset.data_root, image))
    except FileNotFoundError:
        fix = f"put it below {dataset.data_root.resolve()}, or give the right --data_root (DATA_ROOT)"
        return MMRoleError("an image is missing", image, where, fix)
    except MMRoleError as error:
        return MMRoleError(error.what, image, where, error.fix)
    except (OSError, ValueError) as error:
        return MMRoleError(f"an image is broken: {error}", image, where, "fetch it again")
    return None
