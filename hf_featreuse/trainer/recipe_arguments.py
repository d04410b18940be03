"""Options of the recipe, which work with any method of training."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.recipe.losses import check_loss
from hf_featreuse.recipe.mixing import check_alpha
from hf_featreuse.recipe.weight_average import check_decay
from hf_featreuse.trainer.class_weights import check_class_weights
from hf_featreuse.trainer.layer_decay import check_layer_decay


class OneOrMany(argparse.Action):
    """One value on the command line is a string, several are a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


@dataclass
class RecipeArguments:
    """Options for any method of training; see [`FeatureReuseConfig`] for each.

    Raises:
        ConfigurationError: an option has a value that cannot be used.
    """

    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Mixup with shares drawn from Beta(alpha, alpha), in training only. 0 is off."}
    )
    cutmix_alpha: float = field(
        default=0.0,
        metadata={"help": "CutMix, the same way. With both, each batch takes one of the two, drawn evenly."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Evaluate and save an exponential moving average of the weights with this decay, which warms up."
        },
    )
    loss: str | None = field(
        default=None,
        metadata={
            "help": "'cross_entropy', 'bce' (binary cross-entropy of each class), 'focal', or 'mse' for regression; "
            "by default the model's own."
        },
    )
    focal_gamma: float | None = field(
        default=None, metadata={"help": "Exponent of the focal loss, from 0 up; by default 2. For loss 'focal' only."}
    )
    class_weights: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Weights of the classes in the loss: 'balanced', a JSON file with a list or with an object from "
            "class names to numbers, or one number for each class.",
            "nargs": "+",
            "action": OneOrMany,
        },
    )
    layer_decay: float | None = field(
        default=None,
        metadata={
            "help": "Multiply the learning rate by this factor from each layer to the one below it: the head has "
            "learning_rate, the last block layer_decay times that, and so on down to the stem."
        },
    )
    head_lr_multiplier: float = field(
        default=1.0,
        metadata={"help": "Multiply the learning rate of what follows the last block (final norm, head) by this."},
    )
    channels_last: bool | None = field(
        default=None,
        metadata={
            "help": "Keep the model and its activations in the memory format channels last; by default for "
            "convolutional models on a CUDA device."
        },
    )

    def check_recipe(self) -> None:
        """Raise `ConfigurationError` unless every option is usable."""
        check_alpha("mixup_alpha", self.mixup_alpha)
        check_alpha("cutmix_alpha", self.cutmix_alpha)
        if self.ema_decay is not None:
            check_decay(self.ema_decay)
        if self.loss is not None or self.focal_gamma is not None:
            check_loss("cross_entropy" if self.loss is None else self.loss, self.focal_gamma)
        check_class_weights(self.class_weights)
        if self.loss == "mse" and (self.class_weights is not None or self.mixes):
            raise ConfigurationError(
                '`loss="mse"` is for regression, which has no classes to weigh and no labels to mix. Leave '
                "`class_weights`, `mixup_alpha` and `cutmix_alpha` unset, or choose another loss."
            )
        check_layer_decay(self.layer_decay, self.head_lr_multiplier)
        if self.channels_last is not None and not isinstance(self.channels_last, bool):
            raise ConfigurationError(
                f"`channels_last={self.channels_last!r}` is not a boolean. Pass True, False, or None to choose by "
                "device and model."
            )

    @property
    def scales_learning_rates(self) -> bool:
        """Whether layers have different learning rates."""
        return self.layer_decay is not None or self.head_lr_multiplier != 1

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed."""
        return bool(self.mixup_alpha or self.cutmix_alpha)
