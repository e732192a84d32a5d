"""Everything that can be checked before the weights load, all problems at once."""

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
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm import tqdm

from data_utils.errors import MMRoleError, four_parts, raise_problems, shown
from data_utils.paths import sha256_of
from data_utils.schema import Row, TrainSample, read_rows
from data_utils.supervised import image_names, image_path
from finetune.arguments import Options, TrainingArguments, resumes
from finetune.checkpoints import checkpoints, identity, origin_problems, resume_problems, saved_tensors
from finetune.data import CompactRows, SupervisedDataset
from finetune.distributed import together
from finetune.model import (
    adapter_weights,
    freeze,
    is_chat_model,
    parameter_counts,
    q_lora_problems,
    target_problems,
    weight_dtype,
)
from qwen_vl import QwenVLConfig, QwenVLForCausalLM, QwenVLTokenizer
from qwen_vl.checkpoint import checkpoint_fingerprint, checkpoint_problems, is_adapter, read_json_file, weight_problems
from qwen_vl.loading import check_fit
from qwen_vl.loss import IGNORED

REPORT_TO = "--report_to"
# Packages that training needs beyond answering and judging, and the flag that asks for each.
PACKAGES = {"accelerate": None, "peft": "--use_lora", "deepspeed": "--deepspeed"}
_WANDB_HOST = "api.wandb.ai"
_WANDB_NEEDS_NO_KEY = {"offline", "disabled", "dryrun"}


def check_early(argv: Sequence[str]) -> None:
    """Refuses what would fail, or wait at a prompt, once the weights are loaded.

    Args:
        argv: The command line.

    Raises:
        ProblemsError: A package is not installed; a reporter is unknown, not installed, or has no key.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # the first process tells it once
    found = [_package_problem(package, flag, argv) for package, flag in PACKAGES.items()]
    found += [_reporter_problem(reporter) for reporter in _reporters(argv)]
    raise_problems(problem for problem in found if problem)


def _reporters(argv: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(REPORT_TO, nargs="*", default=[])
    return getattr(parser.parse_known_args(list(argv))[0], REPORT_TO.removeprefix("--"))


def _package_problem(package: str, flag: str | None, argv: Sequence[str]) -> MMRoleError | None:
    asked = flag is None or any(word.partition("=")[0] == flag for word in argv)
    if not asked or importlib.util.find_spec(package):
        return None
    return MMRoleError("training needs a package that is not installed", package, flag, "run: bash scripts/setup.sh")


def _reporter_problem(reporter: str) -> MMRoleError | None:
    if reporter == "none":
        return None
    if reporter not in ("tensorboard", "wandb"):
        return MMRoleError("no such reporter", reporter, REPORT_TO, "use none, tensorboard or wandb")
    if importlib.util.find_spec(reporter) is None:
        return MMRoleError(
            f"{reporter} is not installed", reporter, REPORT_TO, f"pip install {reporter}, or give {REPORT_TO} none"
        )
    if reporter == "wandb" and not _wandb_can_log_in():
        fix = f"run `wandb login`, set WANDB_API_KEY, set WANDB_MODE=offline, or give {REPORT_TO} none"
        return MMRoleError("wandb has no key, and would stop to ask for one", reporter, REPORT_TO, fix)
    return None


def _wandb_can_log_in() -> bool:
    if os.environ.get("WANDB_MODE") in _WANDB_NEEDS_NO_KEY or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


BASE = "--model_name_or_path"
# What reading a damaged or wrong file ends in, where the reader has no words of its own for it.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError)
_UNREADABLE = (*_UNREADABLE, StrictDataclassError, SafetensorError)
_SETTINGS = ("generation_config.json", "tokenizer_config.json")


def base_problems(base: Path) -> list[MMRoleError]:
    """Everything that keeps a checkpoint from being trained from; the headers of its weights are read, no weight is.

    Args:
        base: The checkpoint's folder.
    """
    if is_adapter(base):
        fix = "merge it first with scripts/merge_lora.py, then start from what that gives"
        return [MMRoleError("an adapter cannot be the base of another training", base, BASE, fix)]
    found = four_parts(checkpoint_problems(base, flag=BASE))
    if found:
        return found
    found = four_parts(weight_problems(base))
    settings = [base / name for name in _SETTINGS if (base / name).is_file()]
    found += [problem for path in settings if (problem := _tried(lambda path=path: read_json_file(path), path)[1])]
    config, wrong = _tried(lambda: _config(base), base / "config.json")
    tokenizer, no_tokenizer = _tried(lambda: QwenVLTokenizer.from_pretrained(base), base)
    found += [problem for problem in (wrong, no_tokenizer) if problem and not _told_of(problem, found)]
    if config is not None and tokenizer is not None:
        _, misfit = _tried(lambda: check_fit(tokenizer, config, base), base)
        found += [misfit] if misfit else []
    if config is not None and not found:
        wrong = _tried(lambda: _tensor_problem(base), base)
        found += [problem for problem in wrong if problem]
    return found


def outline(base: Path) -> QwenVLForCausalLM:
    """The model of a checkpoint without its weights: names, shapes and kinds of its modules, in no memory.

    Args:
        base: A checkpoint's folder without problems.
    """
    with torch.device("meta"):
        return QwenVLForCausalLM(QwenVLConfig.from_pretrained(str(base)))


def _config(base: Path) -> QwenVLConfig:
    if "visual" not in read_json_file(base / "config.json"):
        raise ValueError("config.json says nothing of the vision tower (visual): this is no Qwen-VL checkpoint")
    return QwenVLConfig.from_pretrained(str(base))


def _tensor_problem(base: Path) -> MMRoleError | None:
    """Tensors that the model has and the checkpoint has not, or in another shape; only safetensors are looked into."""
    there = {name: tuple(shape) for name, (shape, _) in saved_tensors(base).items()}
    needed = {name: tuple(parameter.shape) for name, parameter in outline(base).named_parameters()}
    if not there:
        return None  # a .bin is not opened before it is loaded
    wrong = [f"{name}: missing" for name in needed if name not in there]
    wrong += [
        f"{name}: {list(there[name])} instead of {list(shape)}"
        for name, shape in needed.items()
        if there.get(name, shape) != shape
    ]
    if not wrong:
        return None
    shown = wrong if len(wrong) <= 10 else [*wrong[:10], f"… and {len(wrong) - 10} more"]
    return _problem("the weights do not fit config.json", shown, base)


def _tried(read: Callable[[], Any], where: Path) -> tuple[Any, MMRoleError | None]:
    try:
        return read(), None
    except MMRoleError as error:
        return None, error
    except _UNREADABLE as error:
        return None, _problem("the base checkpoint cannot be read", f"{type(error).__name__}: {error}", where)


def _told_of(problem: MMRoleError, found: list[MMRoleError]) -> bool:
    """Whether the same file's damage is found already, in other words."""
    return any(one.where == problem.where or str(one.where) in str(problem.value) for one in found if one.where)


def _problem(what: str, value: object, where: Path) -> MMRoleError:
    return MMRoleError(what, value, where, f"fetch the checkpoint again, or give another folder with {BASE}")


OUTPUT = "--output_dir"
_ADAM, _ADAM_AND_COPY = 8, 12  # bytes a weight: two moments, and DeepSpeed's own copy in float32


@dataclass(frozen=True)
class Room:
    """Bytes that a run's saves take, and that are free.

    Attributes:
        checkpoint: A checkpoint takes, 0 if none is written.
        finished: The finished model takes.
        free: There are; an earlier run's checkpoints that are to be deleted count.
    """

    checkpoint: int
    finished: int
    free: int

    def told(self) -> str:
        """One line for people."""
        saves = f"a checkpoint takes about {_size(self.checkpoint)}, " if self.checkpoint else ""
        return f"{saves}the finished model {_size(self.finished)}; {_size(self.free)} are free"


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"


def output_problems(training: TrainingArguments) -> list[MMRoleError]:
    """An output folder that cannot be written, or has another run in it unless the flags say what to do with that.

    Args:
        training: Its flags.
    """
    folder = Path(training.output_dir)
    problems = _writing_problems(folder)
    there = checkpoints(folder)
    if there and not training.overwrite_output_dir and not resumes(training.resume_from_checkpoint):
        fix = "give --resume_from_checkpoint auto to go on with it, another --output_dir, or --overwrite_output_dir"
        problems.append(MMRoleError("the output folder has a run in it already", there[-1].name, folder, fix))
    return problems


def room(options: Options, model: QwenVLForCausalLM) -> Room:
    """What the run's saves will take at least, by the sizes of what trains, and what there is.

    Args:
        options: The command line.
        model: The base's `outline`; what is frozen is marked in it.
    """
    training, kind = options.training, weight_dtype(options.training)
    if training.use_lora:
        trained = adapter_weights(model, options.lora) + _whole_modules(options, model)
        weights = finished = trained * (kind.itemsize if training.deepspeed else torch.float32.itemsize)
    else:
        freeze(model, training)
        trained, total = parameter_counts(model)
        weights, finished = total * kind.itemsize, total * (torch.bfloat16 if training.bf16 else kind).itemsize
    state = _ADAM_AND_COPY if training.deepspeed else _ADAM
    adam = str(getattr(training.optim, "value", training.optim)).startswith("adamw_torch")
    checkpoint = weights + trained * state * adam * (not training.save_only_model)
    saves = str(getattr(training.save_strategy, "value", training.save_strategy)) != "no"
    return Room(checkpoint * saves, finished, _free(training))


def room_problems(found: Room, output_dir: str) -> list[MMRoleError]:
    """A disk on which a first checkpoint and the finished model do not fit.

    Args:
        found: See `room`.
        output_dir: The output folder.
    """
    if found.free >= found.checkpoint + found.finished:
        return []
    fix = f"free some space, give another {OUTPUT}, or write less with --save_only_model or --save_strategy no"
    return [MMRoleError("the disk has no room for what the run saves", found.told(), output_dir, fix)]


def _whole_modules(options: Options, model: QwenVLForCausalLM) -> int:
    """Weights of embedding and head, where LoRA trains them whole."""
    if options.lora.q_lora or is_chat_model(options.model.model_name_or_path):
        return 0
    return model.transformer.wte.weight.numel() + model.lm_head.weight.numel()


def _writing_problems(folder: Path) -> list[MMRoleError]:
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"\0")
    except OSError as error:
        told = f"nothing can be written there: {error.strerror}"
        return [MMRoleError(told, folder, place, f"see to the folder and its permissions, or give another {OUTPUT}")]
    return []


def _free(training: TrainingArguments) -> int:
    folder = Path(training.output_dir)
    old = [file for path in checkpoints(folder) for file in path.rglob("*")] if training.overwrite_output_dir else []
    freed = sum(file.stat().st_size for file in old if file.is_file())
    return shutil.disk_usage(_existing(folder)).free + freed


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next((path for path in (folder, *folder.resolve().parents) if path.exists()), Path.cwd())


_WHOLE = 1 << 30  # tokens: more than any sample has
_LISTED = 10


@dataclass
class DataFacts:
    """What a training file holds, counted over the whole of it.

    Attributes:
        samples: Its samples.
        tokens: Tokens that are kept of them.
        longest: Tokens of the longest, before it is cut.
        too_long: Ids of the samples that are cut.
        answer_cut: Ids of those that lose a part of their answer.
        answer_lost: Ids of those that lose all of it: they train on control tokens only.
        no_answer: Ids of those that have none to begin with, and so do too.
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
        """Counts another share in."""
        self.samples += other.samples
        self.tokens += other.tokens
        self.longest = max(self.longest, other.longest)
        self.too_long += other.too_long
        self.answer_cut += other.answer_cut
        self.answer_lost += other.answer_lost
        self.no_answer += other.no_answer
        self.answered += other.answered

    def told(self, max_length: int) -> str:
        """One to three lines for people."""
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
        """The counts, for `training.json`."""
        return {name: len(value) if isinstance(value, list) else value for name, value in asdict(self).items()}


def check_samples(
    dataset: SupervisedDataset, source: Path, first: int = 0, step: int = 1
) -> tuple[DataFacts, list[MMRoleError]]:
    """Tokenizes samples and opens their images, each image once.

    Args:
        dataset: The samples.
        source: Their file, for the messages.
        first: This process's first sample.
        step: From each of its samples to the next.

    Returns:
        Facts about its share, and a problem per sample that cannot be made and per image that cannot be used.
    """
    facts, problems = DataFacts(), []
    users: dict[str, list[str]] = {}
    share = range(first, len(dataset), step)
    for index in tqdm(share, desc=f"checking {source.name}", disable=None if first == 0 else True, leave=False):
        name = dataset.rows[index]["id"]
        try:
            ids, labels = dataset.tokens(index, _WHOLE)
            kept = ids if len(ids) <= dataset.max_length else dataset.tokens(index)[0]
        except ValueError as error:
            problems.append(MMRoleError(str(error), name, source, "correct or remove the sample"))
            continue
        _count(facts, name, labels, len(kept), dataset.tokenizer)
        for image in image_names(kept, dataset.tokenizer):
            users.setdefault(image, []).append(name)
    for image, samples in tqdm(users.items(), desc="opening images", disable=None if first == 0 else True, leave=False):
        problem = _image_problem(dataset, image, samples, source)
        if problem:
            problems.append(problem)
    return facts, problems


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:_LISTED])) + (", …" if len(names) > _LISTED else "")


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
    """Positions of what the assistant says: labels without the marks around each turn, which every turn has."""
    marks = (IGNORED, tokenizer.im_start_id, tokenizer.im_end_id)
    return [i for i, label in enumerate(labels) if label not in marks and labels[i - 1] != tokenizer.im_end_id]


def _image_problem(dataset: SupervisedDataset, image: str, samples: Sequence[str], source: Path) -> MMRoleError | None:
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


@dataclass
class Checked:
    """What the checks have read and made on the way.

    Attributes:
        tokenizer: The base's.
        dataset: The training samples.
        eval_dataset: The samples of `--eval_data_path`, if there are any.
        facts: About the training data.
        fingerprints: Of the training file and of the base checkpoint.
        room: What the saves take, and what there is.
    """

    tokenizer: QwenVLTokenizer
    dataset: SupervisedDataset
    eval_dataset: SupervisedDataset | None
    facts: DataFacts
    fingerprints: dict[str, dict[str, str]]
    room: Room


def check(options: Options, resume: Path | None = None) -> Checked:
    """Checks options, base and data.

    Args:
        options: The command line.
        resume: The checkpoint to go on with.

    Raises:
        ProblemsError: Anything is wrong, with everything that is.
    """
    found = [*output_problems(options.training), *q_lora_problems(options.lora, options.training)]
    more, space = _model_problems(options)
    found += more
    found += resume_problems(resume, identity(options)) if resume else []
    files = [path for path in (options.data.data_path, options.data.eval_data_path) if path]
    contents = {path: read_rows(path, TrainSample) for path in files}
    found += [problem for _, wrong in contents.values() for problem in wrong]
    found += [_empty(path) for path, (rows, wrong) in contents.items() if not rows and not wrong]
    if options.training.eval_strategy != "no" and not options.data.eval_data_path:
        fix = "give --eval_data_path, or --eval_strategy no"
        found.append(MMRoleError("there is nothing to evaluate on", options.training.eval_strategy.value, None, fix))
    found += _stream_problems(options, len(contents[options.data.data_path][0]))
    together(found)
    prints = fingerprints(options)
    together(origin_problems(resume, prints, adapter=options.training.use_lora) if resume else [])
    tokenizer = QwenVLTokenizer.from_pretrained(options.model.model_name_or_path)
    datasets = {path: _dataset(rows, tokenizer, options) for path, (rows, _) in contents.items()}
    contents.clear()
    facts = _check_data(datasets, options)
    return Checked(
        tokenizer,
        datasets[options.data.data_path],
        datasets.get(options.data.eval_data_path),
        facts[options.data.data_path],
        prints,
        space,
    )


def fingerprints(options: Options) -> dict[str, dict[str, str]]:
    """What the run is made from, as `training.json` says it: path and hash of the data and of the base."""
    data, base = Path(options.data.data_path), Path(options.model.model_name_or_path)
    return {
        "data": {"path": str(data.resolve()), "sha256": sha256_of(data) or ""},
        "base": {"path": str(base.resolve()), "fingerprint": checkpoint_fingerprint(base)},
    }


def _model_problems(options: Options) -> tuple[list[MMRoleError], Room | None]:
    """Of the base, of what is put on it, and of the room for its saves; without problems the room too."""
    base = Path(options.model.model_name_or_path)
    found = base_problems(base)
    if found:
        return found, None
    model = outline(base)
    if options.training.use_lora:
        found = target_problems(model, options.lora.lora_target_modules)
    space = room(options, model)
    if options.training.process_index == 0:
        found += room_problems(space, options.training.output_dir)
    return found, space


def _check_data(datasets: dict[str, SupervisedDataset], options: Options) -> dict[str, DataFacts]:
    """Facts about each file, if all of its samples can be made and something is learned from it."""
    facts, found = {}, []
    for path, dataset in datasets.items():
        facts[path], wrong = check_samples(dataset, Path(path), *_share(options))
        found += wrong
    together(found)
    facts = {path: _summed(one, options) for path, one in facts.items()}
    together([_nothing_to_learn(path, options) for path, one in facts.items() if not one.answered])
    return facts


def _dataset(rows: Sequence[Row], tokenizer: QwenVLTokenizer, options: Options) -> SupervisedDataset:
    return SupervisedDataset(
        CompactRows(rows),
        tokenizer,
        data_root=options.data.data_root,
        max_length=options.training.model_max_length,
        use_sample_system=options.data.use_sample_system,
        image_size=QwenVLConfig.from_pretrained(options.model.model_name_or_path).visual["image_size"],
    )


def _share(options: Options) -> tuple[int, int]:
    return options.training.process_index, options.training.world_size


def _summed(facts: DataFacts, options: Options) -> DataFacts:
    if options.training.world_size == 1:
        return facts
    shares: list[Any] = [None] * options.training.world_size
    dist.all_gather_object(shares, facts)
    total = DataFacts()
    for share in shares:
        total.add(share)
    return total


def _stream_problems(options: Options, samples: int) -> list[MMRoleError]:
    order = options.training.order(samples)
    if not samples or order.step <= order.filled:
        return []
    group = options.training.group_size
    fits = order.filled // group * group
    fix = f"give a global batch of {fits:,} or a smaller multiple of {group}"
    where = "--global_batch_size (GLOBAL_BATCH)"
    told = f"global batch {order.step:,}, {samples:,} samples, filled up to {order.filled:,}"
    return [MMRoleError("the global batch is larger than an epoch", told, where, fix)]


def _empty(path: str) -> MMRoleError:
    return MMRoleError("the file has no samples", path, "--data_path", "build it, or give the right one")


def _nothing_to_learn(path: str, options: Options) -> MMRoleError:
    length = options.training.model_max_length
    fix = "raise --model_max_length, or look for the answers (turns from assistant) in the file"
    return MMRoleError("no answer token is left in the whole file", f"{length} tokens are kept of a sample", path, fix)
