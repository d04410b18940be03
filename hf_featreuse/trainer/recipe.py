"""The recipe of a Trainer: mixed images, their loss, and an average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.recipe.losses import ImageLoss
from hf_featreuse.recipe.mixing import BatchMixer, mix_losses
from hf_featreuse.recipe.weight_average import AVERAGE_FILE, WeightAverage
from hf_featreuse.trainer.recipe_arguments import RecipeArguments

logger = logging.get_logger(__name__)

_CLASS_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Recipe:
    """Mixup, CutMix and a weight average, according to the options of a run.

    Args:
        options (`RecipeArguments`): of the run.
        seed (`int`, defaults to 0): of Mixup and CutMix.
        label_smoothing (`float`, defaults to 0.0): in the loss of mixed images.

    Attributes:
        average (`WeightAverage`, *optional*): with `ema_decay`, after `start_average` was called.

    Raises:
        ConfigurationError: an option has a value that cannot be used.

    Example:
        >>> import torch
        >>> from hf_featreuse.trainer.recipe import Recipe
        >>> from hf_featreuse.trainer.recipe_arguments import RecipeArguments
        >>> recipe = Recipe(RecipeArguments(mixup_alpha=0.8))
        >>> batch = {"pixel_values": torch.rand(2, 3, 4, 4), "labels": torch.tensor([0, 1])}
        >>> with recipe.mixed(batch, "pixel_values", step=0, position=0) as mixed:
        ...     torch.equal(mixed["pixel_values"], batch["pixel_values"])
        False
    """

    average: WeightAverage | None = None

    def __init__(self, options: RecipeArguments, *, seed: int = 0, label_smoothing: float = 0.0) -> None:
        options.check_recipe()
        self.options, self.label_smoothing = options, label_smoothing
        self.mixer = BatchMixer(options.mixup_alpha, options.cutmix_alpha, seed) if options.mixes else None
        # Share of the original image in each mixed image of the current batch.
        self._share = 1.0
        self._has_mixed = False
        # Whether the options choose the loss, and whether it was computed in the current step.
        self._chooses_loss = self._has_loss = False

    def check(
        self, model: nn.Module | None, *, in_shards: bool, save_only_model: bool, load_best_model_at_end: bool
    ) -> None:
        """Raise `ConfigurationError` if the options do not fit a model or how it is saved.

        Args:
            model (`torch.nn.Module`, *optional*): the model that trains.
            in_shards (`bool`): whether each process holds a part of the weights.
            save_only_model (`bool`): as in `TrainingArguments`.
            load_best_model_at_end (`bool`): as in `TrainingArguments`.
        """
        kind = getattr(getattr(model, "config", None), "problem_type", None)
        if self.mixer is not None and kind not in (None, "single_label_classification"):
            raise ConfigurationError(
                "`mixup_alpha` and `cutmix_alpha` mix images with one label each, but this model has `problem_type="
                f"{kind!r}`. Set both to 0."
            )
        if self.options.ema_decay is None:
            return
        if in_shards:
            raise ConfigurationError(
                "`ema_decay` averages whole weights, but this backend shards them. Leave `ema_decay` unset, or train "
                "with DistributedDataParallel."
            )
        if save_only_model and load_best_model_at_end:
            raise ConfigurationError(
                "`load_best_model_at_end` needs averaged weights, but checkpoints with `save_only_model` do not "
                "contain them. Set `save_only_model=False`, or leave `ema_decay` unset."
            )

    # Mixing

    @contextlib.contextmanager
    def mixed(self, inputs: dict[str, Any], images: str, *, step: int, position: int) -> Iterator[dict[str, Any]]:
        """Mix the images of a micro-batch, and weigh its loss inside the context.

        Args:
            inputs (`dict[str, torch.Tensor]`): with the images and `"labels"`; not changed.
            images (`str`): key of the images.
            step (`int`): number of optimizer steps taken before this one.
            position (`int`): number of the micro-batch among those of the optimizer step on all ranks.

        Raises:
            ConfigurationError: the batch lacks one of the two keys, or has other labels than one integer per image.
        """
        assert self.mixer is not None
        if images not in inputs or "labels" not in inputs:
            raise ConfigurationError(
                f"`mixup_alpha` and `cutmix_alpha` mix `{images}`, the `main_input_name` of the model, and `labels`, "
                f"but the batch has {sorted(inputs)}. Use these names in the data collator, set `main_input_name` on "
                "the model if its images have another name, or set both options to 0."
            )
        _check_labels(inputs["labels"], len(inputs[images]))
        mixed, self._share = self.mixer(inputs[images], step, position)
        self._has_mixed = True
        try:
            yield {**inputs, images: mixed}
        finally:
            self._share = 1.0

    def loss_function(self, own: Callable | None, chosen: Callable[[], ImageLoss] | None = None) -> Callable | None:
        """Return the `compute_loss_func` for a Trainer, with both labels if images are mixed.

        Args:
            own (`Callable`, *optional*): the user's own loss function.
            chosen (`Callable`, *optional*): returns the loss that the options choose, from
                [`hf_featreuse.trainer.chosen_loss.chosen_loss`].
        """
        self._chooses_loss = chosen is not None
        if self.mixer is None and chosen is None:
            return own
        plain = ImageLoss(label_smoothing=self.label_smoothing)

        def mixed_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            self._has_loss = True

            def loss(labels: torch.Tensor) -> torch.Tensor:
                if own is not None:
                    return own(outputs, labels, num_items_in_batch=num_items_in_batch)
                logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
                return (plain if chosen is None else chosen())(logits, labels, num_items_in_batch)

            return mix_losses(loss, labels, self._share)

        return mixed_loss

    @contextlib.contextmanager
    def expecting_mixed(self, trainer: str) -> Iterator[None]:
        """Raise `ConfigurationError` if an overridden `compute_loss` did not mix images or use the chosen loss.

        Args:
            trainer (`str`): class name of the trainer, for the error.
        """
        self._has_mixed = self._has_loss = False
        yield
        if self._chooses_loss and not self._has_loss:
            raise ConfigurationError(
                f"`loss` and `class_weights` need the loss of the base class, but `{trainer}.compute_loss` does not "
                "call it. Leave both unset, or call `super().compute_loss`."
            )
        if self.mixer is not None and not self._has_mixed:
            raise ConfigurationError(
                f"`mixup_alpha` and `cutmix_alpha` need the loss of the base class, but `{trainer}.compute_loss` does "
                "not call it. Pass your loss as `compute_loss_func`, which is then called with both labels of a mixed "
                "image, or set both options to 0."
            )

    # Averaging

    def start_average(self, model: nn.Module, checkpoint: str | None) -> None:
        """Start the average at the weights of the model, or at the average of a checkpoint."""
        decay, self.average = self.options.ema_decay, None
        if decay is None:
            return
        self.average = WeightAverage(model, decay)
        if checkpoint is not None and not self.average.load(checkpoint):
            logger.warning(
                f"{checkpoint} has no {AVERAGE_FILE}, so the average starts at the weights of the checkpoint."
            )

    def save_average(self, folder: str | Path) -> None:
        """Save the average, if there is one, in a checkpoint folder."""
        if self.average is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.average.save(folder)

    def load_best_average(self, folder: str | None) -> None:
        """Load the average of the best checkpoint; the model gets it when training ends."""
        average = self.average
        if average is None or folder is None or not Path(folder).is_dir() or average.load(folder):
            return
        logger.warning(
            f"The best checkpoint, {folder}, has no {AVERAGE_FILE}: it was written without `ema_decay`. The model "
            "gets the weights of that checkpoint."
        )
        self.average = WeightAverage(average.model, average.decay)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return the model the averaged weights, if there are any, inside the context."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()


def _check_labels(labels: Any, images: int) -> None:
    """Raise `ConfigurationError` unless every image of a batch has one class."""
    is_tensor = isinstance(labels, torch.Tensor)
    if is_tensor and labels.dtype in _CLASS_DTYPES and tuple(labels.shape) == (images,):
        return
    found = f"{labels.dtype} of shape {tuple(labels.shape)}" if is_tensor else type(labels).__name__
    raise ConfigurationError(
        f"`mixup_alpha` and `cutmix_alpha` need one integer per image as `labels`, but those of a batch of {images} "
        f"images are {found}, as for several labels per image or regression. Set both options to 0."
    )


class FollowWeights(TrainerCallback):
    """Updates the average after every optimizer step, and copies it to the model when training ends.

    Args:
        recipe (`Callable`): returns the recipe of the run.
    """

    def __init__(self, recipe: Callable[[], Recipe]) -> None:
        self.recipe = recipe

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the average."""
        if (average := self.recipe().average) is not None:
            average.update(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the average to the model."""
        if (average := self.recipe().average) is not None:
            average.copy_to_model()
