"""Extends transformers' Trainer: the published log, errors with sample ids, verified saves."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from data_utils.errors import MMRoleError
from finetune import universal
from finetune.arguments import WARMUP_LR, TrainingArguments
from finetune.checkpoints import (
    STAGING,
    check_saved,
    copy_model,
    expected_tensors,
    processes_of,
    prune,
    publish_files,
    publish_folder,
    save_model,
    writing,
)
from finetune.data import (
    FilledDataset,
    Order,
    PackedCollator,
    PaddedCollator,
    Stream,
    StreamCollator,
    SupervisedDataset,
    loss_divisors,
)
from finetune.distributed import report_once
from finetune.report import Throughput, model_flops, peak_bytes, write_report
from qwen_vl import QwenVLTokenizer
from qwen_vl.loss import IGNORED

SECONDS_FOR_A_BATCH = 60  # then a worker must have lost it
MOST_OVERFLOWS = 24  # steps in a row; a loss scale of 65,536 is down to 1 after 16


@dataclass(frozen=True)
class WarmupRate:
    """The released scripts' learning rate, as a share of the peak: logarithmic warm-up, then constant.

    published: the first update runs at the full rate and the second at 0, because DeepSpeed's WarmupLR first sets the
    rate after the first update.

    Attributes:
        warmup: Updates of the warm-up; at least 2.
    """

    warmup: int

    def __call__(self, update: int) -> float:
        return 1.0 if update == 0 or update > self.warmup else math.log(update) / math.log(self.warmup)


class StopWithSave(TrainerCallback):
    """Ends training after a step, with a checkpoint, if one of the processes got a signal to stop."""

    def __init__(self, trainer: SupervisedTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        asked = torch.tensor(int(self.trainer.stop_asked), device=args.device)
        if self.trainer.accelerator.reduce(asked, reduction="sum").item() and state.global_step < state.max_steps:
            self.trainer.stopped = control.should_save = control.should_training_stop = True
        return control


class EarlyStopping(EarlyStoppingCallback):
    """Ends training after some evaluations without a lower loss; a resumed run goes on counting them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        before = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.early_stopping_patience_counter = before.get("early_stopping_patience_counter", 0)


class EpochEnds(TrainerCallback):
    """Saves, evaluates and logs at the ends of the stream's epochs, and saves checkpoints to resume from.

    transformers' own epochs are not used: the whole stream is one to it.

    Args:
        order: The order of the stream.
        resume_save_steps: Updates between checkpoints to resume from; 0 for none.
    """

    def __init__(self, order: Order, resume_save_steps: int) -> None:
        self.order = order
        self.resume_save_steps = resume_save_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.num_train_epochs = math.ceil(self.order.updates * self.order.step / self.order.filled)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        done = state.global_step
        state.epoch = done * self.order.step / self.order.filled
        if self.order.ends_epoch(done):
            control.should_save |= args.save_strategy == "epoch"
            control.should_evaluate |= args.eval_strategy == "epoch" and args.eval_delay <= state.epoch
            control.should_log |= args.logging_strategy == "epoch"
        control.should_save |= self.resume_save_steps > 0 and done % self.resume_save_steps == 0
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save = control.should_evaluate = control.should_log = False  # done at the last step
        return control


@dataclass
class _Meter:
    """Counts of this process, which stay on the device until they are read."""

    began: float | None = None
    paused: float = 0.0
    waiting: float = 0.0
    steps: int = 0
    samples: int = 0
    counts: torch.Tensor | None = None

    def add(self, batch: Mapping[str, Any], ids: list[str]) -> None:
        """Counts a micro-batch: tokens, positions, supervised tokens, squares of lengths, pictures."""
        ids_, device = batch["input_ids"], batch["input_ids"].device
        mask = batch.get("attention_mask")
        lengths = torch.tensor(batch["segments"], device=device) if mask is None else mask.sum(-1)
        counts = torch.stack(
            [
                lengths.sum(),
                torch.tensor(ids_.numel(), device=device),
                (batch["labels"][:, 1:] != IGNORED).sum(),
                (lengths**2).sum(),
                torch.tensor(len(batch.get("pixel_values", ())), device=device),
            ]
        )
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
        facts: Facts about the run for `training.json`.
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
        self.order = arguments.order(len(dataset))
        self.padded = PaddedCollator(tokenizer.eod_id)
        collator = StreamCollator(PackedCollator() if arguments.packing else self.padded)
        self.stop_asked = False  # set by a signal
        self.stopped = False
        self._staging: Path | None = None
        self._overflows = 0
        self._dtype: torch.dtype | None = None
        self._meter = _Meter()
        self._logged = Throughput()
        self._step_ids: list[str] = []
        arguments.max_steps = self.order.updates  # otherwise transformers counts the whole stream as one epoch
        if eval_dataset is not None:
            at_once = arguments.per_device_eval_batch_size * arguments.world_size
            eval_dataset = FilledDataset(eval_dataset, at_once)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=Stream(dataset, self.order),
            eval_dataset=eval_dataset,
            callbacks=[EpochEnds(self.order, arguments.resume_save_steps), StopWithSave(self)],
        )
        if arguments.early_stopping_patience:
            self.add_callback(EarlyStopping(arguments.early_stopping_patience))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Returns the released scripts' schedule, or one of transformers'."""
        if self.args.lr_scheduler_type != WARMUP_LR:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            rate = WarmupRate(max(2, self.args.get_warmup_steps(num_training_steps)))
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the names of the weights that decay."""
        if self.args.decay_all:  # published: the released AdamW block makes one group of all
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """transformers' optimizer without empty groups."""
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Returns the loader; its workers survive a signal to all processes, and are not waited for forever."""
        return self._watched(super().get_train_dataloader())

    def _watched(self, loader: DataLoader) -> DataLoader:
        if self.args.dataloader_num_workers:
            loader.base_dataloader.timeout = SECONDS_FOR_A_BATCH
            loader.base_dataloader.worker_init_fn = partial(_begin_worker, loader.base_dataloader.worker_init_fn)
        return loader

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains.

        Raises:
            MMRoleError: One of the loader's workers was killed, or no batch has come from them for a minute.
        """
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            fix = "look for a lack of memory, or a disk that hangs; give --dataloader_num_workers 0"
            where = f"step {self.state.global_step + 1}"
            raise MMRoleError("the loader's workers have lost a batch", str(error), where, fix) from error

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Evaluation pads: positions decide there (dynamic NTK, log-n), each row's own."""
        kept, self.data_collator = self.data_collator, self.padded
        try:
            return self._watched(super().get_eval_dataloader(eval_dataset))
        finally:
            self.data_collator = kept

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the micro-batches of a step with their loss divisors; this counts as time waiting for data."""
        began = time.perf_counter()
        if self._meter.began is None:
            self._meter.began = began
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._meter.waiting += time.perf_counter() - began
        self._step_ids = [name for batch in batches for name in batch["ids"]]
        self._weigh(batches)
        self._meter.steps += 1
        return batches, count

    def _weigh(self, batches: list[dict[str, Any]]) -> None:
        """Adds each sample's loss divisor to its batch.

        Raises:
            MMRoleError: The first step has no supervised token: a sign of wrong data or a wrong length.
        """
        divisors = loss_divisors(
            batches,
            step=self.order.step,
            group=self.args.group_size,
            sum_over_processes=lambda counts: self.accelerator.reduce(counts, reduction="sum"),
        )
        learned = torch.zeros((), dtype=torch.long, device=self.args.device)
        for batch, one in zip(batches, divisors, strict=True):
            batch["divisors"] = one
            learned += batch.pop("supervised").sum()
            del batch["positions"]
        if self._meter.steps:
            return
        if not self.accelerator.reduce(learned, reduction="sum").item():
            fix = "look at these samples; raise --model_max_length"
            with report_once():
                what = "the first step has no supervised token"
                raise MMRoleError(what, self._step_ids, "these samples", fix)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Returns this micro-batch's part of the step's loss; in evaluation the mean over its supervised tokens.

        Raises:
            MMRoleError: It is not finite; names the samples, before anything is updated with it.
        """
        batch = dict(inputs)
        ids, divisors = batch.pop("ids"), batch.pop("divisors", None)
        if divisors is not None:
            batch["loss_divisors"] = _spread(divisors, batch)
        outputs = model(**batch, loss_only=True, use_cache=False)
        if divisors is not None:
            # The trainer divides by the accumulation, and gradients are averaged over the processes.
            outputs.loss = outputs.loss * (self.current_gradient_accumulation_steps * self.args.world_size)
        if model.training:
            self._meter.add(batch, ids)
            if not torch.isfinite(outputs.loss):
                raise _not_finite("loss", outputs.loss.item(), ids, self.state.global_step + 1)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Returns the mean loss over all supervised tokens of the evaluation set; logits are never made."""
        model = self._wrap_model(self.model, training=False, dataloader=dataloader).eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
            tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
            sums += torch.stack([loss.double() * tokens, tokens.double()])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / max(tokens, 1)}
        samples = len(dataloader.dataset.dataset)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=samples)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates; this time does not count in the throughput of training."""
        began = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if self._meter.began is not None:  # not before the first step, with --eval_on_start
                self._meter.paused += time.perf_counter() - began

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if grad_norm is not None and not math.isfinite(grad_norm):
            self._overflows += 1
            if not self.step_was_skipped() or self._overflows > MOST_OVERFLOWS:
                raise _not_finite("gradient norm", float(grad_norm), self._step_ids, self.state.global_step)
            grad_norm = None  # nothing was updated with it, and JSON has no infinity
        else:
            self._overflows = 0
        # published: the learning rate in the log is the one after the scheduler's step.
        kwargs["learning_rate"] = None
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def step_was_skipped(self) -> bool:
        """Returns whether float16's loss scale was too large and is now halved: normal in the first steps."""
        return self.args.fp16 and self.accelerator.optimizer_step_was_skipped

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads them, and removes what was made of a checkpoint for another number of processes."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and universal.is_needed(Path(checkpoint), self.args):
            universal.mend(self.model_wrapped.optimizer.optimizer)
            self.accelerator.wait_for_everyone()  # all have loaded it
            if self.args.should_save:
                universal.remove(Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restores the random states (of LoRA's dropout); for another number of processes makes new ones."""
        if checkpoint and processes_of(Path(checkpoint), self.args.world_size) != self.args.world_size:
            set_seed(self.args.seed + self.state.global_step)
        else:
            super()._load_rng_state(checkpoint)

    @property
    def output_dir(self) -> Path:
        """The folder of checkpoints and, at the end, of the model."""
        return Path(self.args.output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.output_dir)
            save_model(self.model, self.tokenizer, folder, state_dict=state_dict, dtype=self._dtype)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint into the staging folder, checks it, renames it and prunes older ones."""
        began = time.perf_counter()
        newest = self.output_dir / f"checkpoint-{self.state.global_step}"
        throughput = self.throughput()
        with self._staged() as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.args.should_save:
                staged = staging / newest.name
                check_saved(staged, expected_tensors(self.model))
                if self.best_checkpoint:  # transformers has named it in the staging folder
                    self.state.best_model_checkpoint = str(self.best_checkpoint)
                    self.state.save_to_json(str(staged / "trainer_state.json"))
                facts = self._facts("running", throughput) | {"kept": self._is_kept()}
                write_report([staged, self.output_dir], facts, self.state.log_history)
            self.accelerator.wait_for_everyone()  # all shards are written
            if self.args.should_save:
                publish_folder(staged, newest)
                prune(
                    self.output_dir,
                    self.args.save_total_limit,
                    newest,
                    resume_state_of_newest_only=self.args.resume_save_steps > 0,
                    best=self.best_checkpoint,
                )
        self._meter.paused += time.perf_counter() - began

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the lowest evaluation loss, if the run will end with it."""
        step = self.state.best_global_step
        return self.output_dir / f"checkpoint-{step}" if self.args.load_best_model_at_end and step else None

    def _load_best_model(self) -> None:
        """Loads nothing: `save_finished` copies the best checkpoint's files, which works for sharded models too."""
        if self.stopped:
            # With --save_total_limit 1 transformers would now delete all but the best, and so the one to resume from.
            self.state.best_model_checkpoint = None

    def _is_kept(self) -> bool:
        """Returns whether the checkpoint of this step is kept after newer ones."""
        done = self.state.global_step
        if self.args.save_strategy == "epoch":
            return self.order.ends_epoch(done)
        return self.args.save_strategy == "steps" and done % self.state.save_steps == 0

    def save_finished(self) -> None:
        """Writes the trained model, the trainer's state and the report into the output folder itself."""
        throughput = self.throughput()
        if self.args.bf16 and not self.args.deepspeed and not self.args.use_lora:
            # Trained in float32 under autocast; checkpoints keep it for resuming.
            self._dtype = torch.bfloat16
        with self._staged() as staging:
            staged, best = staging / "model", self.best_checkpoint
            if best is None:
                self.save_model(str(staged), _internal_call=True)
            elif self.args.should_save:
                copy_model(best, staged)
            if self.args.should_save:
                check_saved(staged, expected_tensors(self.model, None if best else self._dtype))
                self.state.save_to_json(str(staged / "trainer_state.json"))
                write_report([staged], self._facts("finished", throughput), self.state.log_history)
                publish_files(staged, self.output_dir)

    def _facts(self, state: str, throughput: Throughput) -> dict[str, Any]:
        """Returns the report; its throughput is the checkpoint's if the run had nothing left to train."""
        peak = round(peak_bytes(self.args.device) / 2**30, 3)  # of the first process
        facts = {**self.facts, "state": state, "peak_memory_gib": peak}
        if self.best_checkpoint:
            facts |= {"best_step": self.state.best_global_step, "best_loss": self.state.best_metric}
        if state == "finished" and self.state.global_step < self.state.max_steps:
            facts["stopped_early"] = True
        return facts | {"throughput": throughput.summary()} if throughput.steps or "throughput" not in facts else facts

    def throughput(self) -> Throughput:
        """Returns the totals so far; all processes must call it."""
        meter = self._meter
        now = time.perf_counter()
        seconds = now - (meter.began or now) - meter.paused
        counts = meter.counts if meter.counts is not None else torch.zeros(5, dtype=torch.long)
        local = torch.cat([counts.to(self.args.device), torch.tensor([meter.samples], device=self.args.device)])
        tokens, positions, supervised, squares, images, samples = self.accelerator.reduce(local, "sum").tolist()
        lora = self.args.use_lora
        flops = model_flops(
            self.model.config, tokens=tokens, squares=squares, supervised=supervised, images=images, lora=lora
        )
        return Throughput(meter.steps, seconds, meter.waiting, samples, tokens, positions, supervised, flops)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, with each step's loss, its throughput and the time left."""
        if "loss" in logs:
            so_far = self.throughput()
            last, self._logged = so_far.since(self._logged), so_far
            logs["tokens_per_second"] = round(last.tokens / max(last.seconds, 1e-9), 1)
            device = torch.cuda.get_device_name(self.args.device) if self.args.device.type == "cuda" else None
            utilisation = last.utilisation(device, self.args.world_size)
            if utilisation is not None:
                logs["mfu"] = round(utilisation, 4)
            left = self.state.max_steps - self.state.global_step
            logs["hours_left"] = round(left * so_far.seconds / max(so_far.steps, 1) / 3600, 3)
        super().log(logs, *args, **kwargs)

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """Yields an empty folder to write a save into; all processes enter and leave together."""
        staging = self.output_dir / STAGING
        with writing(staging):
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed in a save
                staging.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            yield staging
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()


def _begin_worker(begin: Callable[[int], None] | None, worker: int) -> None:
    """Lets a worker end on its trainer's SIGTERM alone: launchers send it to all processes in mid-step."""
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_trainer, daemon=True).start()
    if begin is not None:
        begin(worker)


def _end_with_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _spread(divisors: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Returns the divisors of tokens (B, T) from those of samples."""
    if "segments" in batch:
        return divisors.repeat_interleave(torch.tensor(batch["segments"], device=divisors.device))[None]
    return divisors[:, None].expand(batch["input_ids"].shape)


def _not_finite(what: str, value: float, ids: list[str], step: int) -> MMRoleError:
    fix = "look at these samples; lower the learning rate; the checkpoints so far are untouched"
    return MMRoleError(f"the {what} is not finite ({value}) at step {step}", ids, "these samples", fix)
