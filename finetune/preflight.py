"""Everything that can be checked before the weights load, all problems at once; the work is shared by the processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_utils.errors import MMRoleError, ProblemsError, shown
from data_utils.paths import sha256_of
from data_utils.schema import Row, TrainSample, read_rows
from data_utils.supervised import SupervisedDataset
from finetune.arguments import Options
from finetune.base_checks import base_problems, outline
from finetune.disk import Room, output_problems, room, room_problems
from finetune.lora import q_lora_problems, target_problems
from finetune.resuming import identity, origin_problems, resume_problems
from finetune.rows import CompactRows
from finetune.sample_checks import DataFacts, check_samples
from qwen_vl import QwenVLConfig, QwenVLTokenizer
from qwen_vl.checkpoint import checkpoint_fingerprint

_ALONE = 3  # equal problems up to this many are told one by one, more of them as one
_LISTED = 10


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
    together(options, found)
    prints = fingerprints(options)
    together(options, origin_problems(resume, prints, adapter=options.training.use_lora) if resume else [])
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
        raise ProblemsError(grouped(merged))
    dist.barrier()  # the launcher ends this process when the first one has told what is wrong
    raise SystemExit(2)


def grouped(problems: Sequence[MMRoleError]) -> list[MMRoleError]:
    """The problems with those that differ in their value and place alone as one, of which some are listed.

    Args:
        problems: In the order in which they were found.
    """
    groups: dict[tuple[str, str | None], list[MMRoleError]] = {}
    for problem in problems:
        groups.setdefault((problem.what, problem.fix), []).append(problem)
    told = []
    for (what, fix), group in groups.items():
        if len(group) <= _ALONE:
            told += group
            continue
        listed = [f"{shown(problem.value)} ({shown(problem.where)})" for problem in group[:_LISTED]]
        more = [f"… and {len(group) - _LISTED:,} more"] if len(group) > _LISTED else []
        told.append(MMRoleError(f"{what} ({len(group):,} times)", [*listed, *more], None, fix))
    return told


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
    together(options, found)
    facts = {path: _summed(one, options) for path, one in facts.items()}
    together(options, [_nothing_to_learn(path, options) for path, one in facts.items() if not one.answered])
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
