"""A Trainer that resumes exactly: fixes of Trainer itself, independent of feature reuse.

Delete each fix once upstream has it. Needed for transformers 5.23; strict weights: huggingface/transformers#43701.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput
from transformers.utils import logging

from hf_featreuse.checkpoints.changed_training import describe_changed_training, training_settings
from hf_featreuse.checkpoints.completeness import checkpoint_fault, resolve_checkpoint
from hf_featreuse.checkpoints.failures import (
    check_writable,
    describe_last_whole,
    describe_ranks,
    find_not_finite,
    loading,
    open_checkpoint,
    refuse_not_finite,
)
from hf_featreuse.checkpoints.optimizer_state import (
    check_optimizer_state,
    check_same_optimizer,
    check_scheduler_state,
    optimizer_name,
)
from hf_featreuse.checkpoints.output_lock import output_lock
from hf_featreuse.checkpoints.resume_state import (
    RESUME_STATE_NAME,
    flush_checkpoint,
    read_resume_state,
    trainer_state_digest,
    write_resume_state,
)
from hf_featreuse.checkpoints.weights import load_exactly
from hf_featreuse.distributed import find_lone_launch
from hf_featreuse.errors import CheckpointError, FeatureReuseError
from hf_featreuse.trainer.backends import plain_optimizer
from hf_featreuse.trainer.private_names import check_attributes, check_names
from hf_featreuse.trainer.train_loader import TrainLoader, resumed_pass

logger = logging.get_logger(__name__)

# Before a class is defined whose overrides Trainer might not call.
check_names()


class ResumableTrainer(Trainer):
    """A `transformers.Trainer` whose resumed runs equal uninterrupted ones, for any model, without feature reuse.

    It takes every argument of `Trainer`, and is the base of [`FeatureReuseTrainer`]. The stock Trainer of transformers
    5.23 restores ViT, DeiT, BEiT, Swin and DINOv2 only partly, with only a warning (huggingface/transformers#43701).
    Here:

    - Weights are restored bitwise or not at all, also by `load_best_model_at_end`.
    - A checkpoint that was cut short or changed is skipped with a warning, and the last complete one before it is
      used. If its path was passed, it is refused.
    - Training options that changed since the checkpoint are reported, with their effect or that they have none.
    - A second process that trains into the same `output_dir` is refused.
    - Data sets with `set_epoch` are told the epoch after a resume, so that random transforms draw the same.
    - Logs after a resume are those of the uninterrupted run, including `train_loss` and except for times. A run that
      is resumed at its last step takes no further one. An evaluation that was due between checkpoint and stop is done.
    - NaN or infinite weights stop training instead of being saved. A run that fails reports where to resume.

    Raises:
        CheckpointError: in `train()`, no checkpoint is complete, one does not fit, or none can be written.
        ConfigurationError: in `train()`, another optimizer wrote the checkpoint.
        StepError: in `train()`, the weights are NaN or infinite when a checkpoint is due.

    Source: `transformers/trainer.py`, whose private methods it overrides.

    Example:
        >>> import tempfile, torch
        >>> from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import ResumableTrainer
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=8, patch_size=4)
        >>> data = [{"pixel_values": torch.rand(3, 8, 8), "labels": i % 2} for i in range(8)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for steps in (1, 2):  # The second run resumes from the checkpoint of the first.
        ...         args = TrainingArguments(folder, max_steps=steps, save_steps=1, use_cpu=True, disable_tqdm=True,
        ...                                  report_to="none")
        ...         trainer = ResumableTrainer(ViTForImageClassification(config), args, train_dataset=data)
        ...         result = trainer.train(resume_from_checkpoint=steps > 1)  # doctest: +ELLIPSIS
        {...}
        {...}
        >>> result.global_step
        2
    """

    # What the checkpoint holds in addition to Trainer's files, until the first epoch restores it.
    _resumed: dict[str, Any] | None = None
    _resumed_from: str | None = None
    # Whether the random state of the checkpoint has been restored.
    _rng_is_loaded = False
    # Whether the sums behind `train_loss` cover every step of the run.
    _sums_are_whole = False
    _finalizing = False
    # The step, gradient norm and learning rate after which logs, evaluation and checkpoints were last due.
    _due: tuple[int, float | None, float | None] = (-1, None, None)
    _at_epoch_end = False
    # The first pass over the data, and the loader if its passes are counted.
    _first_pass = 0
    _stream: TrainLoader | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does. Of the checkpoints in `output_dir`, the newest complete one is used."""
        folder = str(self.args.output_dir)
        if self.args.should_save and self.args.save_strategy != SaveStrategy.NO:
            check_writable(folder)
        with contextlib.ExitStack() as held:
            self._hold_output_dir(held)
            return self._train(resolve_checkpoint(resume_from_checkpoint, folder), *args, **kwargs)

    def _hold_output_dir(self, held: contextlib.ExitStack) -> None:
        """Lock the folder in the first rank; if another process holds it, raise `CheckpointError` on every rank."""
        refusals: list[CheckpointError | None] = [None]
        if self.args.process_index == 0:
            try:
                held.enter_context(output_lock(str(self.args.output_dir)))
            except CheckpointError as error:
                alone = find_lone_launch(os.environ, self.args.world_size)
                refusals = [error if alone is None else CheckpointError(f"{alone} {error}")]
        if self.args.world_size > 1:
            refusals = gather_object(refusals)
        if (refusal := next(filter(None, refusals), None)) is not None:
            raise refusal

    def _train(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        folder = str(self.args.output_dir)
        try:
            return super().train(checkpoint, *args, **kwargs)
        except (KeyboardInterrupt, OSError, RuntimeError) as error:
            if not isinstance(error, FeatureReuseError):  # Our own errors already name the checkpoint.
                cause = f"{type(error).__name__} stopped training after {self.state.global_step} optimizer steps."
                logger.warning(f"{cause} {self._describe_ranks()}{describe_last_whole(folder)}")
            raise
        finally:
            # Trainer leaves it on if training is interrupted, and would then evaluate as if training continued.
            self.is_in_train = False

    def _describe_ranks(self) -> str:
        return describe_ranks(self.args.process_index, self.args.world_size)

    def _resume_state(self) -> dict[str, Any]:
        """Return the sums behind the logs, as JSON holds them exactly."""
        step, grad_norm, learning_rate = self._due
        return {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar if self._sums_are_whole else None,
            "last_logged": self._globalstep_last_logged,
            "at_epoch_end": self._at_epoch_end,
            "stream": None if self._stream is None else self._stream.position(self._train_batch_size),
            "due": [step, None if grad_norm is None else float(grad_norm), learning_rate],
            "step": self.state.global_step,
            "optimizer": optimizer_name(plain_optimizer(self.optimizer)),
            "training": training_settings(self.args),
            # The log may differ on the other ranks.
            **({"trainer_state": trainer_state_digest(vars(self.state))} if self.args.should_save else {}),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Restore the sums that `_resume_state` returned."""
        self._tr_loss = torch.full_like(self._tr_loss, state["loss"])
        self._globalstep_last_logged = state["last_logged"]
        self._sums_are_whole = state["total_loss"] is not None
        self._total_loss_scalar = state["total_loss"] or 0.0

    def _save_rng_state(self, output_dir: str) -> None:
        # The last of the files that every rank writes; `trainer_state.json` follows and completes the checkpoint.
        super()._save_rng_state(output_dir)
        # Digests need the files of every rank.
        self.accelerator.wait_for_everyone()
        rank, ranks = self.args.process_index, self.args.world_size
        write_resume_state(output_dir, self._resume_state(), rank, ranks, saves=self.args.should_save)
        # Rank 0 completes a checkpoint only after every rank has written its files.
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, run_folder = self.state.global_step, self._get_output_dir(trial)
        folder = os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        self._check_finite()
        try:
            if self.args.should_save:
                open_checkpoint(folder)
                with flush_checkpoint(self.state):
                    return super()._save_checkpoint(model, trial)
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            fault = checkpoint_fault(folder)
            if fault is None:  # The checkpoint is complete; something after it failed.
                raise
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {folder}: {error} The incomplete checkpoint "
                f"is skipped on resume ({fault}). {self._describe_ranks()}{describe_last_whole(run_folder)} Free "
                "space or pass another `output_dir` first; `save_total_limit` keeps fewer checkpoints."
            ) from error

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        with loading(TRAINER_STATE_NAME, resume_from_checkpoint):
            begun = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
            )
        folder = resume_from_checkpoint
        self._resumed, self._sums_are_whole, self._due = None, folder is None, (-1, None, None)
        self._resumed_from, self._rng_is_loaded = folder, False
        if folder is not None:
            self._resumed = read_resume_state(folder, self.args.process_index, self.args.world_size)
            if self._resumed is None:
                logger.warning(
                    f"{folder} holds no {RESUME_STATE_NAME}: it was written by an older version, by the stock "
                    "Trainer, with `save_only_model`, or by another number of processes. Training continues, but "
                    f"`train_loss` and the first logged `loss` count only the steps from {self.state.global_step} on, "
                    "and changed settings go unnoticed."
                )
            elif said := describe_changed_training(self._resumed.get("training"), training_settings(self.args)):
                logger.warning(said)
            if num_train_epochs == sys.maxsize:  # A stream, whose passes Trainer does not count.
                passes, batches = resumed_pass(folder, self._resumed, self.args.gradient_accumulation_steps)
                begun = passes, 0 if self.args.ignore_data_skip else batches
        self._first_pass = begun[0]
        return begun

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        loader = train_dataloader
        if not isinstance(loader, TrainLoader):
            loader = TrainLoader(train_dataloader, self._first_pass)
        model, prepared = super()._prepare_for_training(max_steps, loader.batches.loader, resume_from_checkpoint)
        prepared = loader.for_training(prepared, resumes=resume_from_checkpoint is not None)
        self._stream = loader if prepared is loader else None
        if self._resumed is not None and self._resumed.get("stream") and not self.args.ignore_data_skip:
            loader.expect(self._resumed["stream"], self._train_batch_size)
        return model, prepared

    def _take_up(self, trial: Any, epoch: int, ignore_keys_for_eval: Any, start_time: float) -> None:
        """Restore the sums once, and do what was still due at the end of an epoch when the checkpoint was written."""
        check_attributes(self)
        state, self._resumed = self._resumed, None
        if state is None:
            return
        with loading(RESUME_STATE_NAME, self._resumed_from):
            self._restore(state)
        ended = self.state.epoch == int(self.state.epoch or 0) or self.state.global_step >= self.state.max_steps
        if ended and not state["at_epoch_end"]:
            _, grad_norm, learning_rate = self._due = tuple(state["due"])
            # An evaluation uses the random state, so it must take place between the checkpoint and the next epoch.
            self._load_rng_state(self._resumed_from)
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            # The checkpoint exists already and is not due again.
            self._maybe_log_save_evaluate(
                self._tr_loss,
                grad_norm,
                self.model_wrapped,
                trial,
                epoch,
                ignore_keys_for_eval,
                start_time,
                learning_rate=learning_rate,
            )
            self._rng_is_loaded = True

    def _load_rng_state(self, checkpoint: str | None) -> None:
        loaded, self._rng_is_loaded = self._rng_is_loaded, False
        if not loaded:
            with loading("random state", checkpoint):
                super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = plain_optimizer(self.optimizer)
        if checkpoint is not None and not self._shards:
            assert self.model is not None
            check_same_optimizer((self._resumed or {}).get("optimizer"), optimizer)
            check_optimizer_state(Path(checkpoint, OPTIMIZER_NAME), self.model, optimizer)
            check_scheduler_state(Path(checkpoint, SCHEDULER_NAME), self.lr_scheduler)
        with loading("optimizer and scheduler", checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        # With another precision there is no scaler.
        if self.accelerator.scaler is not None:
            with loading("gradient scaler", checkpoint):
                super()._load_scaler(checkpoint)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        step = self.state.global_step
        # A second call after the same step comes from the end of an epoch.
        self._at_epoch_end = self._due[0] == step
        self._due = (step, grad_norm, kwargs.get("learning_rate"))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._take_up(kwargs["trial"], kwargs["epoch"] - 1, kwargs["ignore_keys_for_eval"], kwargs["start_time"])
        if self.state.global_step >= self.state.max_steps:
            # Resumed at the last step, in the middle of an epoch: Trainer would take one more step.
            self.control.should_training_stop = True
            return
        # accelerate 1.15 sets the epoch of a data set, but neither with several processes nor in the resumed epoch.
        dataset = kwargs["train_dataloader"].dataset
        if callable(set_epoch := getattr(dataset, "set_epoch", None)):
            set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> TrainOutput:
        self._take_up(trial, int(self.state.epoch or 0) - 1, None, start_time)
        self._check_finite()
        self._finalizing = True
        try:
            output = super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self._finalizing = False
        return output._replace(training_loss=output.metrics["train_loss"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, but `train_loss` after a resume is the mean over the whole run."""
        if self._finalizing and self._sums_are_whole and "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)

    def _check_finite(self) -> None:
        """Raise `StepError` if a weight is NaN or infinite; if weights are sharded, on every rank."""
        names = [None if self.model is None else find_not_finite(self.model)]
        if self._shards:
            names = gather_object(names)
        if (name := next(filter(None, names), None)) is not None:
            refuse_not_finite(name, self.state.global_step, str(self.args.output_dir))

    @property
    def _shards(self) -> bool:
        """Whether an engine keeps the weights in shards and loads them itself."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with loading("weights", resume_from_checkpoint):
            if self._shards or not load_exactly(self.model if model is None else model, resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        if folder is not None and (fault := checkpoint_fault(folder)) is not None:
            raise CheckpointError(
                f"The best checkpoint {folder} cannot be loaded: {fault}. The model has the weights of the last step. "
                "Load another checkpoint with `from_pretrained`."
            )
        with loading("weights", folder):
            if folder is None or self._shards or not load_exactly(self.model, folder):
                super()._load_best_model()
            else:
                logger.info(f"Loaded the best model from {folder} (score: {self.state.best_metric}).")
