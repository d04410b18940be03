"""Options of training recipes that Trainer lacks: Mixup, CutMix and an average of the weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_featreuse.recipe.weight_average import check_decay
from hf_featreuse.recipe.mixing import check_alpha


@dataclass
class RecipeArguments:
    """Options that go with any method of training; see [`FeatureReuseConfig`] for each.

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
        metadata={"help": "Evaluate and save an exponential moving average of the weights with this decay."},
    )

    def check_recipe(self) -> None:
        """Raise `ConfigurationError` unless every option is usable."""
        check_alpha("mixup_alpha", self.mixup_alpha)
        check_alpha("cutmix_alpha", self.cutmix_alpha)
        if self.ema_decay is not None:
            check_decay(self.ema_decay)

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed."""
        return bool(self.mixup_alpha or self.cutmix_alpha)
