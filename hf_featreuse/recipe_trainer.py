"""A Trainer with Mixup, CutMix and an average of the weights; no feature reuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from hf_featreuse.averaging import AVERAGE_FILE, WeightAverage
from hf_featreuse.engine_trainer import EngineTrainer
from hf_featreuse.errors import ConfigurationError
from hf_featreuse.mixing import BatchMixer, classification_loss, mix_losses
from hf_featreuse.recipe import RecipeArguments

logger = logging.get_logger(__name__)


class RecipeTrainer(EngineTrainer):
    """`EngineTrainer` that mixes training images and averages weights; base of [`FeatureReuseTrainer`].

    Attributes:
        weight_average (`WeightAverage`, *optional*): with `ema_decay`, once `train()` has begun.

    Raises:
        ConfigurationError: Mixup or CutMix for a model that does not classify with one label an image, or in training
            with a `compute_loss` that does without that of the base class, or with batches without images or labels
            under their names; EMA with weights in shards, or with the best of checkpoints that do not hold it.
    """

    weight_average: WeightAverage | None = None
    _mixer: BatchMixer | None = None
    # Share of each mixed image that is its own, of the batch whose loss is computed now.
    _share = 1.0
    _has_mixed = False
    # Optimizer step that is open, and index of its micro-batch.
    _micro_batch: tuple[int, int] = (-1, 0)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._take_up_recipe()
        # Before all others: what a tracker logs at the end of training is the model that was evaluated.
        self.callback_handler.callbacks.insert(0, _FollowWeights(self))

    def _take_up_recipe(self) -> None:
        """Check the options as they are now, and mix or stop mixing; a search changes them between two runs."""
        recipe = self.recipe_args
        recipe.check_recipe()
        if recipe.mixes:
            _check_problem(self.model)
        if recipe.ema_decay is not None:
            self._check_average()
        # One that was set since the last time is the user's.
        if self.compute_loss_func != self._mixed_loss:
            self._loss_of_one_label = self.compute_loss_func
        self._mixer = BatchMixer(recipe.mixup_alpha, recipe.cutmix_alpha, self.args.seed) if recipe.mixes else None
        # Trainer asks it for the loss in evaluation as well, where nothing is mixed.
        self.compute_loss_func = self._loss_of_one_label if self._mixer is None else self._mixed_loss

    @property
    def recipe_args(self) -> RecipeArguments:
        """The options of the recipe: those of `args`, or the defaults where it is a plain `TrainingArguments`."""
        return self.args if isinstance(self.args, RecipeArguments) else RecipeArguments()

    # Mixing

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward of a micro-batch, mixed where that is asked for."""
        self._has_mixed = False
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._mixer is not None and not self._has_mixed:
            raise ConfigurationError(
                f"`mixup_alpha` and `cutmix_alpha` need the loss of the base class, but `{type(self).__name__}."
                "compute_loss` does without. Pass your loss as `compute_loss_func`, which is then called with both "
                "labels of a mixed image, or set both options to 0."
            )
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as `Trainer.compute_loss`; in training on mixed images, against both of their labels."""
        if self._mixer is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        images = getattr(self.model, "main_input_name", "pixel_values")
        if images not in inputs or "labels" not in inputs:
            raise ConfigurationError(
                f"`mixup_alpha` and `cutmix_alpha` mix `{images}`, the `main_input_name` of the model, and `labels`, "
                f"but the batch has {sorted(inputs)}. Name them so in the data collator, set `main_input_name` on the "
                "model where its images go by another name, or set both options to 0."
            )
        mixed, self._share = self._mixer(inputs[images], self.state.global_step, self._batch_of_step)
        self._has_mixed = True
        try:
            return super().compute_loss(model, {**inputs, images: mixed}, *args, **kwargs)
        finally:
            self._share = 1.0

    def _mixed_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        def loss(labels: torch.Tensor) -> torch.Tensor:
            if self._loss_of_one_label is not None:
                return self._loss_of_one_label(outputs, labels, num_items_in_batch=num_items_in_batch)
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
            return classification_loss(logits, labels, num_items_in_batch, self.args.label_smoothing_factor)

        return mix_losses(loss, labels, self._share)

    def _count_micro_batch(self) -> None:
        """Note that a micro-batch of the current optimizer step begins."""
        opened, micro_batch = self._micro_batch
        step = self.state.global_step
        self._micro_batch = (step, micro_batch + 1 if opened == step else 0)

    @property
    def _batch_of_step(self) -> int:
        """Number of the open micro-batch among those of the optimizer step on all ranks."""
        return self._micro_batch[1] * self.accelerator.num_processes + self.accelerator.process_index

    # Averaging

    def _check_average(self) -> None:
        if self._shards:
            raise ConfigurationError(
                "`ema_decay` averages whole weights, and this engine keeps them in shards. Leave `ema_decay` unset, "
                "or train with DistributedDataParallel."
            )
        if self.args.save_only_model and self.args.load_best_model_at_end:
            raise ConfigurationError(
                "`load_best_model_at_end` would look for averaged weights, which checkpoints of `save_only_model` do "
                "not hold. Set `save_only_model=False`, or leave `ema_decay` unset."
            )

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        self._take_up_recipe()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        decay, self.weight_average = self.recipe_args.ema_decay, None
        if decay is not None:
            assert self.model is not None
            self.weight_average = WeightAverage(self.model, decay)
            folder = resume_from_checkpoint
            if folder is not None and not self.weight_average.load(folder):
                logger.warning(f"{folder} holds no {AVERAGE_FILE}: the average starts at the weights it holds.")
        return prepared

    def _save_rng_state(self, output_dir: str) -> None:
        # Before the files that close a checkpoint and name the ones it must have.
        if self.weight_average is not None and self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            self.weight_average.save(output_dir)
        super()._save_rng_state(output_dir)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        average, folder = self.weight_average, self.state.best_model_checkpoint
        if average is None or folder is None or not Path(folder).is_dir() or average.load(folder):
            return
        logger.warning(
            f"{folder}, the best checkpoint, holds no {AVERAGE_FILE}: it was written without `ema_decay`. The model "
            "gets the weights that it holds."
        )
        # It is given to the model when training ends.
        self.weight_average = WeightAverage(average.model, average.decay)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict as `Trainer.evaluation_loop`, while training with the averaged weights if there are."""
        # After training the model itself has them.
        if self.weight_average is None or not self.is_in_train:
            return super().evaluation_loop(*args, **kwargs)
        with self.weight_average.applied():
            return super().evaluation_loop(*args, **kwargs)


class _FollowWeights(TrainerCallback):
    """Moves the average after every optimizer step, and gives it to the model when training ends."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.weight_average is not None:
            self.trainer.weight_average.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.weight_average is not None:
            self.trainer.weight_average.copy_to_model()


def _check_problem(model: nn.Module | None) -> None:
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if kind not in (None, "single_label_classification"):
        raise ConfigurationError(
            f"`mixup_alpha` and `cutmix_alpha` mix images of one label each, and this model has `problem_type="
            f"{kind!r}`. Set both to 0."
        )
