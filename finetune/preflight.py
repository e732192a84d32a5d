"""Everything that can be checked before the weights load, all problems at once; the work is shared by the processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from data_utils.errors import MMRoleError, ProblemsError, shown
from data_utils.files import sha256_of
from data_utils.fingerprint import checkpoint_fingerprint, checkpoint_problems, is_adapter
from data_utils.schema import Row, TrainSample, read_rows
from data_utils.supervised import SupervisedDataset, image_names, image_path
from finetune.arguments import Options
from finetune.lora import q_lora_problems
from finetune.resuming import identity, origin_problems, resume_problems
from finetune.rows import CompactRows
from finetune.saving import checkpoints
from qwen_vl import QwenVLConfig, QwenVLTokenizer
from qwen_vl.loss import IGNORED

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
    """

    samples: int = 0
    tokens: int = 0
    longest: int = 0
    too_long: list[str] = field(default_factory=list)
    answer_cut: list[str] = field(default_factory=list)
    answer_lost: list[str] = field(default_factory=list)

    def add(self, other: DataFacts) -> None:
        """Counts another share in."""
        self.samples += other.samples
        self.tokens += other.tokens
        self.longest = max(self.longest, other.longest)
        self.too_long += other.too_long
        self.answer_cut += other.answer_cut
        self.answer_lost += other.answer_lost

    def told(self, max_length: int) -> str:
        """One or two lines for people."""
        mean = self.tokens / max(self.samples, 1)
        text = f"{self.samples:,} samples, {mean:,.0f} tokens on average, the longest {self.longest:,}"
        if self.too_long:
            text += (
                f"\n{len(self.too_long):,} are longer than {max_length:,} tokens and are cut: {len(self.answer_cut):,} "
                f"lose a part of their answer, {len(self.answer_lost):,} all of it"
            )
            lost = [*self.answer_lost, *self.answer_cut]
            if lost:
                more = ", …" if len(lost) > _LISTED else ""
                text += f" ({', '.join(map(shown, lost[:_LISTED]))}{more}); a larger --model_max_length keeps them"
        return text

    def counts(self) -> dict[str, int]:
        """The counts, for `training.json`."""
        return {name: len(value) if isinstance(value, list) else value for name, value in asdict(self).items()}


@dataclass
class Checked:
    """What the checks have read and made on the way.

    Attributes:
        tokenizer: The base's.
        dataset: The training samples.
        eval_dataset: The samples of `--eval_data_path`, if there are any.
        facts: About the training data.
        fingerprints: Of the training file and of the base checkpoint.
    """

    tokenizer: QwenVLTokenizer
    dataset: SupervisedDataset
    eval_dataset: SupervisedDataset | None
    facts: DataFacts
    fingerprints: dict[str, dict[str, str]]


def check(options: Options, resume: Path | None = None) -> Checked:
    """Checks options, base and data.

    Args:
        options: The command line.
        resume: The checkpoint to go on with.

    Raises:
        ProblemsError: Anything is wrong, with everything that is.
    """
    found = [*output_problems(options), *q_lora_problems(options.lora, options.training), *_base_problems(options)]
    found += resume_problems(resume, identity(options)) if resume else []
    files = [path for path in (options.data.data_path, options.data.eval_data_path) if path]
    contents = {path: read_rows(path, TrainSample) for path in files}
    found += [problem for _, wrong in contents.values() for problem in wrong]
    found += [_empty(path) for path, (rows, wrong) in contents.items() if not rows and not wrong]
    if options.training.eval_strategy != "no" and not options.data.eval_data_path:
        fix = "give --eval_data_path, or --eval_strategy no"
        found.append(MMRoleError("there is nothing to evaluate on", options.training.eval_strategy.value, None, fix))
    together(options, found)
    prints = fingerprints(options)
    together(options, origin_problems(resume, prints) if resume else [])
    tokenizer = QwenVLTokenizer.from_pretrained(options.model.model_name_or_path)
    datasets = {path: _dataset(rows, tokenizer, options) for path, (rows, _) in contents.items()}
    contents.clear()
    facts = {path: DataFacts() for path in datasets}
    for path, dataset in datasets.items():
        facts[path], wrong = check_samples(dataset, Path(path), *_share(options))
        found += wrong
    together(options, found)
    return Checked(
        tokenizer,
        datasets[options.data.data_path],
        datasets.get(options.data.eval_data_path),
        _summed(facts[options.data.data_path], options),
        prints,
    )


def fingerprints(options: Options) -> dict[str, dict[str, str]]:
    """What the run is made from, as `training.json` says it: path and hash of the data and of the base."""
    data, base = Path(options.data.data_path), Path(options.model.model_name_or_path)
    return {
        "data": {"path": str(data.resolve()), "sha256": sha256_of(data) or ""},
        "base": {"path": str(base.resolve()), "fingerprint": checkpoint_fingerprint(base)},
    }


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


def together(options: Options, problems: Sequence[MMRoleError]) -> None:
    """Ends all processes if any has found a problem; the first one tells all that were found, each once.

    Raises:
        ProblemsError: On the first process.
    """
    if options.training.world_size == 1:
        merged = list(problems)
    else:
        shares: list[Any] = [None] * options.training.world_size
        dist.all_gather_object(shares, list(problems))
        merged = list({str(problem): problem for share in shares for problem in share}.values())
    if not merged:
        return
    if options.training.process_index == 0:
        raise ProblemsError(merged)
    dist.barrier()  # the launcher ends this process when the first one has told what is wrong
    raise SystemExit(2)


def output_problems(options: Options) -> list[MMRoleError]:
    """An output folder with another run in it, unless the flags say what to do with that."""
    training = options.training
    there = checkpoints(Path(training.output_dir))
    if not there or training.overwrite_output_dir or training.resume_from_checkpoint:
        return []
    fix = "give --resume_from_checkpoint auto to go on with it, another --output_dir, or --overwrite_output_dir"
    return [MMRoleError("the output folder has a run in it already", there[-1].name, training.output_dir, fix)]


def _count(facts: DataFacts, name: str, labels: Sequence[int], kept: int, tokenizer: QwenVLTokenizer) -> None:
    facts.samples += 1
    facts.tokens += kept
    facts.longest = max(facts.longest, len(labels))
    if kept == len(labels):
        return
    facts.too_long.append(name)
    answer = answer_positions(labels, tokenizer)
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


def _base_problems(options: Options) -> list[MMRoleError]:
    base = Path(options.model.model_name_or_path)
    if is_adapter(base):
        fix = "merge it first with scripts/merge_lora.py, then start from what that gives"
        return [MMRoleError("an adapter cannot be the base of another training", base, "--model_name_or_path", fix)]
    return checkpoint_problems(base)


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


def _empty(path: str) -> MMRoleError:
    return MMRoleError("the file has no samples", path, "--data_path", "build it, or give the right one")
