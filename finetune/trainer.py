"""transformers' Trainer with what this project needs: the published log, errors with sample ids, whole saves."""

from __future__ import annotations

import math
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from data_utils.errors import MMRoleError
from data_utils.supervised import PackedCollator, PaddedCollator, SupervisedDataset
from finetune.arguments import TrainingArguments
from finetune.early import told_once
from finetune.report import Throughput, write_report
from finetune.saving import (
    STAGING,
    check_saved,
    drop_checkpoints,
    expected_tensors,
    publish_files,
    publish_folder,
    save_model,
    sync_folder,
    writing,
)
from qwen_vl import QwenVLTokenizer
from qwen_vl.loss import IGNORED

MOST_OVERFLOWS = 24  # steps in a row; a loss scale of 65,536 is down to 1 after 16


@dataclass
class _Meter:
    """What goes through this process; counts stay on the device until somebody asks."""

    began: float | None = None
    paused: float = 0.0
    waiting: float = 0.0
    steps: int = 0
    samples: int = 0
    counts: torch.Tensor | None = None

    def add(self, batch: Mapping[str, Any], ids: list[str]) -> None:
        """Counts a micro-batch."""
        mask = batch.get("attention_mask")
        positions = torch.tensor(batch["input_ids"].numel(), device=batch["input_ids"].device)
        tokens = positions if mask is None else mask.sum()
        supervised = (batch["labels"][:, 1:] != IGNORED).sum()
        counts = torch.stack([tokens, positions, supervised])
        self.counts = counts if self.counts is None else self.counts + counts
        self.samples += len(ids)


class SupervisedTrainer(Trainer):
    """Trains, logs and saves.

    Args:
        model: See `finetune.model.load_model`.
        arguments: The training flags.
        tokenizer: Saved with the model.
        dataset: Training samples.
        eval_dataset: Samples to evaluate on, if any.
        facts: What `training.json` is to say about the run.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        arguments: TrainingArguments,
        tokenizer: QwenVLTokenizer,
        dataset: SupervisedDataset,
        eval_dataset: SupervisedDataset | None,
        facts: Mapping[str, Any],
    ) -> None:
        self.tokenizer = tokenizer
        self.facts = facts
        self.padded = PaddedCollator(tokenizer.eod_id)
        collator = PackedCollator() if arguments.packing else self.padded
        self._staging: Path | None = None
        self._writes_here = False
        self._overflows = 0
        self._dtype: torch.dtype | None = None
        self._meter = _Meter()
        self._step_ids: list[str] = []
        super().__init__(
            model=model, args=arguments, data_collator=collator, train_dataset=dataset, eval_dataset=eval_dataset
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Evaluation pads: positions decide there (dynamic NTK, log-n), each row's own."""
        kept, self.data_collator = self.data_collator, self.padded
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = kept

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step; the time that takes is time waiting for data."""
        began = time.perf_counter()
        if self._meter.began is None:
            self._meter.began = began
        samples = super().get_batch_samples(*args, **kwargs)
        self._meter.waiting += time.perf_counter() - began
        self._step_ids = [name for batch in samples[0] for name in batch["ids"]]
        if not self._meter.steps:
            self._check_labels(samples[0])
        self._meter.steps += 1
        return samples

    def _check_labels(self, batches: list[dict[str, Any]]) -> None:
        """Refuses to begin with a step that learns nothing: a sign of wrong data or a wrong length."""
        count = sum(((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches), torch.tensor(0))
        if self.accelerator.reduce(count.to(self.args.device), reduction="sum").item():
            return
        fix = "look at these samples; raise --model_max_length"
        with told_once():
            raise MMRoleError("there is not one token to learn in the first step", self._step_ids, "these samples", fix)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Mean over the micro-batch's supervised tokens.

        Raises:
            MMRoleError: It is not finite; names the samples, before anything is updated with it.
        """
        batch = dict(inputs)
        ids = batch.pop("ids")
        outputs = model(**batch, loss_only=True, use_cache=False)
        if model.training:
            self._meter.add(batch, ids)
            if not torch.isfinite(outputs.loss):
                raise _not_finite("loss", outputs.loss.item(), ids, self.state.global_step + 1)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of a batch, in evaluation; logits are never made."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trains an epoch; nothing, where the checkpoint that is gone on with was the last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates; the throughput of training does not count that time."""
        began = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if self._meter.began is not None:  # not before the first step, with --eval_on_start
                self._meter.paused += time.perf_counter() - began

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if grad_norm is not None and not math.isfinite(grad_norm):
            self._overflows += 1
            if not self._step_was_skipped() or self._overflows > MOST_OVERFLOWS:
                raise _not_finite("gradient norm", float(grad_norm), self._step_ids, self.state.global_step)
            grad_norm = None  # nothing was updated with it, and JSON knows no infinity
        else:
            self._overflows = 0
        # published: the learning rate in the log is the one after the scheduler's step.
        kwargs["learning_rate"] = None
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _step_was_skipped(self) -> bool:
        """Whether float16's loss scale was too large and is now halved: normal in the first steps."""
        return self.args.fp16 and self.accelerator.optimizer_step_was_skipped

    @property
    def output_dir(self) -> Path:
        """Where checkpoints and, at the end, the model go."""
        return Path(self.args.output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.output_dir)
            save_model(self.model, self.tokenizer, folder, state_dict=state_dict, dtype=self._dtype)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint aside, checks it, and only then gives it its name and drops the oldest."""
        began = time.perf_counter()
        staging = self.output_dir / STAGING
        with writing(staging):
            self._begin_staging()
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            name = f"checkpoint-{self.state.global_step}"
            throughput = self.throughput()
            if self.args.should_save:
                check_saved(staging / name, expected_tensors(self.model))
                facts = self._facts("running", throughput)
                write_report([staging / name, self.output_dir], facts, self.state.log_history)
            self._publish(staging / name, self.output_dir / name)
            if self.args.should_save:
                drop_checkpoints(self.output_dir, self.args.save_total_limit, self.output_dir / name)
        self._meter.paused += time.perf_counter() - began

    def save_finished(self) -> None:
        """Writes the trained model, the trainer's state and the report into the output folder itself."""
        throughput = self.throughput()
        if self.args.bf16 and not self.args.deepspeed and not self.args.use_lora:
            # Trained in float32 under autocast; checkpoints stay so, to be gone on with.
            self._dtype = torch.bfloat16
        with writing(self.output_dir / STAGING):
            self._begin_staging()
            staging = self.output_dir / STAGING / "model"
            self.save_model(str(staging), _internal_call=True)
            if self.args.should_save:
                check_saved(staging, expected_tensors(self.model, self._dtype))
                self.state.save_to_json(str(staging / "trainer_state.json"))
                facts = self._facts("finished", throughput)
                write_report([staging], facts, self.state.log_history)
                publish_files(staging, self.output_dir)
            if self._writes_here:
                shutil.rmtree(self.output_dir / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _facts(self, state: str, throughput: Throughput) -> dict[str, Any]:
        """What the report says; of a run that had nothing left to train, what its checkpoint said of the throughput."""
        facts = {**self.facts, "state": state}
        return facts | {"throughput": throughput.told()} if throughput.steps or "throughput" not in facts else facts

    def throughput(self) -> Throughput:
        """What was worked off so far; every process must ask."""
        meter = self._meter
        now = time.perf_counter()
        seconds = now - (meter.began or now) - meter.paused
        counts = meter.counts if meter.counts is not None else torch.zeros(3, dtype=torch.long)
        local = torch.cat([counts.to(self.args.device), torch.tensor([meter.samples], device=self.args.device)])
        tokens, positions, supervised, samples = self.accelerator.reduce(local, reduction="sum").tolist()
        return Throughput(meter.steps, seconds, meter.waiting, samples, tokens, positions, supervised)

    def _begin_staging(self) -> None:
        """Makes an empty folder to write into, on the first process and on each node that has a disk of its own.

        Whether a node has one is seen before anything is published: the first process leaves a file of a new name, of
        which no cache of a network file system can know.
        """
        staging = self.output_dir / STAGING
        token = [uuid.uuid4().hex]
        first = self.args.process_index == 0
        if self.args.world_size > 1:
            dist.broadcast_object_list(token)
        if first:
            _empty(staging)
            (staging / token[0]).touch()
            sync_folder(staging)
        self.accelerator.wait_for_everyone()
        own_disk = self.args.local_process_index == 0 and not (staging / token[0]).exists()
        self._writes_here = first or own_disk
        self.accelerator.wait_for_everyone()  # all have looked before anybody changes anything
        if own_disk:
            _empty(staging)
        elif first:
            (staging / token[0]).unlink()
        self.accelerator.wait_for_everyone()

    def _publish(self, staged: Path, target: Path) -> None:
        """Renames on the first process, and on the first of each node that has a disk of its own."""
        self.accelerator.wait_for_everyone()
        if self._writes_here:
            publish_folder(staged, target)
        self.accelerator.wait_for_everyone()


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed in a save
    folder.mkdir(parents=True, exist_ok=True)


def _not_finite(what: str, value: float, ids: list[str], step: int) -> MMRoleError:
    fix = "look at these samples; lower the learning rate; the checkpoints so far are untouched"
    return MMRoleError(f"the {what} is not finite ({value}) at step {step}", ids, "these samples", fix)
