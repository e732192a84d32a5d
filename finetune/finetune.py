"""Fine-tunes Qwen-VL-Chat into the agent or the reward model: full tuning or LoRA, with or without DeepSpeed.

python finetune/finetune.py --model_name_or_path model_weights/Qwen-VL-Chat --data_path data/train/train_85k.json \
    --output_dir checkpoints/MMRole-Agent …

The four finetune_*.sh give the paper's settings. Under `torchrun` it is one of several processes.
"""

from __future__ import annotations

import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # Started by path, Python looks for imports in this folder first, and finds this file for the package `finetune`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_utils.errors import run_main
from finetune.distributed import end_with_the_first, from_first, leave_group, report_once
from finetune.preflight import check_command_line

if TYPE_CHECKING:
    from finetune.arguments import Options
    from finetune.preflight import Checked
    from finetune.trainer import SupervisedTrainer


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, trains, saves; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # by torch about DeepSpeed, and by transformers about peft, at every step
    check_command_line(words)
    # What follows takes seconds to import, and the check above must not wait for it.
    from finetune import universal
    from finetune.arguments import parse_arguments
    from finetune.checkpoints import checkpoint_to_resume, is_finished, lock, schedule_notice
    from finetune.preflight import check, write_cache

    with ExitStack() as stack:
        with report_once(), end_with_the_first():
            options, notices = parse_arguments(words)
            training, output = options.training, Path(options.training.output_dir)
            first = training.process_index == 0
            if first and output.is_dir():
                stack.enter_context(lock(output))
            resume = checkpoint_to_resume(options)
            if first and resume:
                universal.remove(resume)
            checked = check(options, resume)
        if first:
            _print_plan(options, checked, resume)
            notices = [f"old spellings: {'; '.join(notices)}"] if notices else []
            if resume and (notice := schedule_notice(resume, options)):
                notices.append(notice)
            print(*notices, sep="\n", end="\n" * bool(notices), file=sys.stderr)
            if not output.is_dir():
                _prepare_output(output, overwrite=False)
                stack.enter_context(lock(output))
            _prepare_output(output, overwrite=training.overwrite_output_dir)
            write_cache(output, checked.cache)
        # The first process decides: other nodes may see the folder later.
        steps = training.order(len(checked.dataset)).updates
        if from_first(bool(resume) and is_finished(output, resume, steps)):
            if first:
                print(f"finished already, nothing is left to train: {output}", flush=True)
            return 0
        if resume and universal.is_needed(resume, training):
            with report_once(), end_with_the_first():
                universal.convert(resume, training)
        return train(options, checked, resume)


def train(options: Options, checked: Checked, resume: Path | None) -> int:
    """Loads the model, trains it from the beginning or from a checkpoint, and saves it; returns the exit status."""
    from finetune.model import load_model, parameter_counts, trainable_names
    from finetune.trainer import SupervisedTrainer

    with report_once():
        model = load_model(options)
    names, (trains, total) = trainable_names(model), parameter_counts(model)
    if options.training.process_index == 0:
        print(f"trains: {len(names)} tensors with {trains:,} of {total:,} weights", flush=True)
        if options.training.use_lora:
            print(f"  LoRA on {sum('lora_A' in name for name in names)} modules", flush=True)
    trainer = SupervisedTrainer(
        model=model,
        arguments=options.training,
        tokenizer=checked.tokenizer,
        dataset=checked.dataset,
        eval_dataset=checked.eval_dataset,
        facts={**_facts(options, checked, resume), "trainable_weights": trains, "weights": total, "trainable": names},
    )
    with end_with_the_first():
        with save_and_stop_on_sigterm(trainer):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if trainer.stopped:
            if options.training.process_index == 0:
                print(
                    f"stopped after step {trainer.state.global_step}, and saved: RESUME=auto resumes there", flush=True
                )
            return 128 + signal.SIGTERM
        trainer.save_finished()
    if options.training.process_index == 0:
        print(f"saved: {options.training.output_dir}", flush=True)
    return 0


@contextmanager
def save_and_stop_on_sigterm(trainer: SupervisedTrainer) -> Iterator[None]:
    """Lets SIGTERM (a scheduler's preemption) end training after the running step, with a checkpoint."""

    def stop(*_: object) -> None:
        trainer.stop_asked = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _facts(options: Options, checked: Checked, resume: Path | None) -> dict[str, Any]:
    """Returns the facts about the run for `training.json`."""
    from finetune.checkpoints import identity, report_of
    from finetune.report import versions

    before = report_of(resume) if resume else {}
    return {
        **{key: before[key] for key in ("throughput",) if key in before},
        "identity": identity(options),
        "global_batch": options.training.samples_per_step,
        "recipe": options.training.recipe_used(),
        "data": {**checked.fingerprints["data"], **checked.facts.counts()},
        "base": checked.fingerprints["base"],
        "versions": versions(),
        "options": options.resolved(),
    }


def _print_plan(options: Options, checked: Checked, resume: Path | None) -> None:
    """Prints the resolved options, the batch arithmetic and what was found in the data."""
    for name, value in sorted(options.changed().items()):
        print(f"  {name}: {value}")
    training = options.training
    order = training.order(len(checked.dataset))
    tokens = checked.facts.tokens / checked.facts.samples
    print(
        f"{training.samples_per_step} samples a step: micro-batch {training.per_device_train_batch_size} x "
        f"accumulation {training.gradient_accumulation_steps} x {training.world_size} process(es) "
        f"= about {training.samples_per_step * tokens:,.0f} tokens; "
        f"{order.updates:,} steps over {order.samples:,} samples, each epoch filled up to {order.filled:,}; "
        f"the loss is a mean over groups of {training.group_size}"
    )
    print(f"{options.data.data_path}: {checked.facts.summary(training.model_max_length)}")
    print(checked.space.summary())
    print(f"resumes from {resume}" if resume else "starts from the base", flush=True)


def _prepare_output(output: Path, *, overwrite: bool) -> None:
    """Makes the output folder, and deletes the checkpoints of an earlier run in it if requested.

    Raises:
        MMRoleError: It cannot be written.
    """
    from data_utils.files import write_error
    from finetune.checkpoints import checkpoints

    try:
        for folder in checkpoints(output) if overwrite else ():
            shutil.rmtree(folder)
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(output, error, "the rest of an earlier run is unchanged") from error


if __name__ == "__main__":
    status = run_main(main)
    if status == 0:
        leave_group()
    sys.exit(status)
