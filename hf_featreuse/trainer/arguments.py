"""Options of the method, in addition to TrainingArguments, in Python and on the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from transformers import TrainingArguments

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.method.freezing import FrozenBatchNorm
from hf_featreuse.method.schedule import (
    FeatureReuseSchedule,
    check_options,
    check_seed,
    check_unfreezing,
    trunk_option,
)
from hf_featreuse.trainer.recipe_arguments import OneOrMany, RecipeArguments

# Options that are passed to the schedule unchanged.
_OF_SCHEDULE = (
    *("drop_rate", "drop_rate_schedule", "drop_rate_over_time", "drop_granularity"),
    *("vanilla_steps", "stochastic_depth_steps", "masked_freeze_steps"),
)


@dataclass
class FeatureReuseArguments:
    """The options of feature reuse, without those of training; see [`FeatureReuseConfig`].

    Raises:
        ConfigurationError: an option has a value that cannot be used.

    Example:
        >>> from hf_featreuse import FeatureReuseArguments
        >>> FeatureReuseArguments(drop_rate=0.3).schedule(num_blocks=3, max_steps=100, seed=0).rates[-1]
        0.3
    """

    drop_rate: float = field(
        default=0.5,
        metadata={"help": "Probability, in [0, 1), of dropping a residual block in a cycle. 0 is plain training."},
    )
    # A plain string, not a Literal, so that errors name the option as in Python.
    drop_rate_schedule: str = field(
        default="linear",
        metadata={
            "help": "'linear': increasing with depth up to drop_rate at the last block; 'uniform': drop_rate for all."
        },
    )
    drop_rate_over_time: str = field(
        default="constant",
        metadata={
            "help": "From reuse_start to reuse_end, drop rates are 'constant', 'falling' linearly to 0, or 'rising' "
            "linearly from 0."
        },
    )
    drop_granularity: str = field(
        default="batch",
        metadata={
            "help": "'batch': all samples of a step share one drawn set of blocks; 'sample': each has its own, as in "
            "drop path, and rates are rounded to sixteenths. Models with BatchNorm support only 'batch'."
        },
    )
    vanilla_steps: int = field(default=0, metadata={"help": "Plain optimizer steps at the start of each cycle."})
    stochastic_depth_steps: int = field(
        default=3,
        metadata={
            "help": "Optimizer steps per cycle in which the drawn blocks are skipped; 0 for none. Without steps of "
            "another kind, every step draws its own set."
        },
    )
    masked_freeze_steps: int = field(
        default=1,
        metadata={"help": "Optimizer steps per cycle in which, of the blocks, only the drawn ones train; 0 for none."},
    )
    scale_kept: bool = field(
        default=True,
        metadata={
            "help": "In stochastic-depth steps, divide the residual increment of each kept block by its survival "
            "probability."
        },
    )
    train_trunk: str = field(
        default="all",
        metadata={
            "help": "Parameters outside the residual blocks that train in masked-freeze steps: 'all' (stem, norms, "
            "head), only the 'head' after the last block, or 'none'."
        },
    )
    frozen_batch_norm: str = field(
        default="batch",
        metadata={
            "help": "In masked-freeze steps frozen BatchNorm layers use 'batch' statistics, as in plain training, or "
            "those of 'inference'. Their running statistics do not change either way."
        },
    )
    allow_inexact_skip: bool = field(
        default=False,
        metadata={"help": "Also drop blocks whose shortcut is not an identity, as with GELU after the addition."},
    )
    target_blocks: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Which residual blocks to use; by default all. One value is a regular expression that must match "
            "a block's whole name; several values are names or dotted suffixes of names.",
            "nargs": "+",
            "action": OneOrMany,
        },
    )
    reuse_start: float = field(
        default=0.0, metadata={"help": "Fraction of training, from 0 to 1, before which steps are vanilla."}
    )
    reuse_end: float = field(
        default=1.0, metadata={"help": "Fraction of training, from 0 to 1, after which steps are vanilla."}
    )
    unfreeze_at: float | None = field(
        default=None,
        metadata={
            "help": "Gradual unfreezing: at first only what follows the last block trains, then the blocks from the "
            "last one down, and from this fraction of training on, above 0 and up to 1, everything. Off by default."
        },
    )
    reuse_seed: int | None = field(
        default=None, metadata={"help": "Seed of the schedule; by default the training seed. 0 is valid."}
    )

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise `ConfigurationError` for an invalid option."""
        check_options(**{name: getattr(self, name) for name in _OF_SCHEDULE})
        self.train_trunk = trunk_option(self.train_trunk)
        if self.reuse_seed is not None:
            check_seed("reuse_seed", self.reuse_seed)
        if self.frozen_batch_norm not in get_args(FrozenBatchNorm):
            raise ConfigurationError(
                f"`frozen_batch_norm={self.frozen_batch_norm!r}` is unknown. Pass one of {get_args(FrozenBatchNorm)}."
            )
        for name in ("scale_kept", "allow_inexact_skip"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"`{name}={getattr(self, name)!r}` is not a boolean. Pass True or False.")
        self._check_window()
        self._check_unfreezing()
        self._check_target()

    def _check_window(self) -> None:
        for name in ("reuse_start", "reuse_end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigurationError(
                    f"`{name}={value!r}` is not a fraction of training. Pass a value from 0 to 1."
                )
        if self.reuse_start >= self.reuse_end:
            raise ConfigurationError(
                f"The window from `reuse_start={self.reuse_start!r}` to `reuse_end={self.reuse_end!r}` is empty. Pass "
                "a start below the end, for instance 0 and 0.5."
            )

    def _check_unfreezing(self) -> None:
        value = self.unfreeze_at
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise ConfigurationError(
                f"`unfreeze_at={value!r}` is not a fraction of training. Pass a value above 0 and up to 1, such as "
                "0.3, or None to train everything from the start."
            )
        check_unfreezing(value, self.alternates, self.drop_granularity)

    def _check_target(self) -> None:
        target = self.target_blocks
        if target is None or (isinstance(target, str) and target):
            return
        is_list = isinstance(target, Sequence) and not isinstance(target, str)
        if not is_list or not target or not all(isinstance(name, str) and name for name in target):
            raise ConfigurationError(
                f"`target_blocks={target!r}` selects nothing. Pass a regular expression as a string, a list of block "
                "names, or None for all blocks."
            )

    @property
    def alternates(self) -> bool:
        """Whether any step differs from plain training."""
        return self.drop_rate > 0 and bool(self.stochastic_depth_steps or self.masked_freeze_steps)

    @property
    def uses_blocks(self) -> bool:
        """Whether any step drops or freezes blocks."""
        return self.alternates or self.unfreeze_at is not None

    def schedule(self, num_blocks: int, max_steps: int, seed: int) -> FeatureReuseSchedule:
        """Build the schedule of a run.

        Args:
            num_blocks (`int`): number of residual blocks.
            max_steps (`int`): optimizer steps of the whole run; the window's fractions are of this.
            seed (`int`): used if `reuse_seed` is `None`.

        Raises:
            ConfigurationError: an option has a value that cannot be used.
        """
        self.check()
        first_step, last_step = window_steps(self.reuse_start, self.reuse_end, max_steps)
        if self.drop_rate_over_time != "constant" and last_step is None:
            last_step = max_steps
        return FeatureReuseSchedule(
            num_blocks,
            seed=seed if self.reuse_seed is None else self.reuse_seed,
            first_step=first_step,
            last_step=last_step,
            unfreeze_steps=0 if self.unfreeze_at is None else math.ceil(round(self.unfreeze_at * max_steps, 6)),
            **{name: getattr(self, name) for name in _OF_SCHEDULE},
        )

    def settings(self) -> dict[str, Any]:
        """Return the options by name."""
        return {option.name: getattr(self, option.name) for option in fields(FeatureReuseArguments)}


@dataclass
class FeatureReuseConfig(FeatureReuseArguments, RecipeArguments, TrainingArguments):
    """`TrainingArguments` with the options of feature reuse and of a recipe, and with unchanged defaults.

    Args:
        drop_rate (`float`, defaults to 0.5): probability, in [0, 1), of dropping a block in a cycle. 0 is plain
            training, for which the model needs no residual block.
        drop_rate_schedule (`"linear"` or `"uniform"`, defaults to `"linear"`): drop probability that increases
            linearly with depth up to `drop_rate` at the last block (Huang et al. 2016), or the same for every block.
        drop_rate_over_time (`"constant"`, `"falling"` or `"rising"`, defaults to `"constant"`): from `reuse_start` to
            `reuse_end`, drop rates are constant, fall linearly to 0, or rise linearly from 0.
        drop_granularity (`"batch"` or `"sample"`, defaults to `"batch"`): whether all samples of a step share one set
            of blocks, or each has its own, as in drop path: a block is computed on the samples that keep it, and
            trains on those that dropped it. Rates are then rounded to sixteenths. Not for models with BatchNorm.
        vanilla_steps (`int`, defaults to 0): plain optimizer steps at the start of each cycle.
        stochastic_depth_steps (`int`, defaults to 3): optimizer steps of the first kind in a cycle.
        masked_freeze_steps (`int`, defaults to 1): optimizer steps of the second kind in a cycle. 3 and 0 is only
            stochastic depth, with a new set of blocks in every step, 0 and 1 only masked freeze, 0 and 0 plain
            training, as with `drop_rate=0`.
        scale_kept (`bool`, defaults to `True`): in stochastic-depth steps, divide the residual increment of each kept
            block by its survival probability, so that it has the same mean as in the whole network.
        train_trunk (`"all"`, `"head"` or `"none"`, defaults to `"all"`): parameters outside the blocks that train in
            masked-freeze steps: all (stem, norms, head), only those after the last block, or none. `True` and `False`
            mean `"all"` and `"none"`.
        frozen_batch_norm (`"batch"` or `"inference"`, defaults to `"batch"`): statistics with which frozen BatchNorm
            layers normalize in masked-freeze steps; their running statistics do not change either way.
        allow_inexact_skip (`bool`, defaults to `False`): also drop blocks whose shortcut is not a bitwise identity,
            such as those with GELU after the addition, or named ones that cannot be shown to be residual.
        target_blocks (`str` or `list[str]`, *optional*): which residual blocks to use: a regular expression that
            matches the whole name, or a list of names or dotted suffixes of names. The others belong to the trunk. An
            entry that matches none of the blocks found may name another module, as in [`find_residual_blocks`].
        reuse_start (`float`, defaults to 0.0): fraction of training before which steps are vanilla.
        reuse_end (`float`, defaults to 1.0): fraction of training after which steps are vanilla.
        unfreeze_at (`float`, *optional*): gradual unfreezing, with or without the other kinds of step: only what
            follows the last block trains at first, then the blocks from the last one down, and from this fraction of
            training on, above 0 and up to 1, everything. Not with `drop_granularity="sample"`.
        reuse_seed (`int`, *optional*): seed of the schedule, unchanged; `None` takes `seed`.
        mixup_alpha (`float`, defaults to 0.0): Mixup, in training only, with shares drawn from Beta(alpha, alpha); 0
            is off.
        cutmix_alpha (`float`, defaults to 0.0): CutMix, the same way. With both above 0, each batch takes one of the
            two, drawn evenly.
        ema_decay (`float`, *optional*): above 0 and below 1: evaluate, and save at the end, an exponential moving
            average of the weights, as in [`WeightAverage`].
        loss (`"cross_entropy"`, `"bce"`, `"focal"` or `"mse"`, *optional*): as in [`ImageLoss`], in training and in
            evaluation; by default that of the model, which is cross-entropy for one label per image.
        focal_gamma (`float`, *optional*): exponent of the focal loss; by default 2. Only with `loss="focal"`.
        class_weights (`str` or `list[float]`, *optional*): `"balanced"` by the training labels, a JSON file, or one
            number per class. Without `loss`, the loss is cross-entropy, or `"bce"` for several labels per image.
        layer_decay (`float`, *optional*): above 0 and at most 1: factor of the learning rate from each layer to the
            one below it, as in [`layer_decay_groups`]. The layers are all residual blocks of the model.
        head_lr_multiplier (`float`, defaults to 1.0): factor of the learning rate of what follows the last block.
        channels_last (`bool`, *optional*): use the memory format channels last, in which convolutions on a GPU are
            fast; by default on CUDA for models of which more than a quarter of the layers with weights are
            two-dimensional convolutions. Results differ by rounding.

    Raises:
        ConfigurationError: an option has a value that cannot be used.

    Source: the two kinds of step, arXiv 2411.09475 (abstract); rates, schedule, ratio, window, scaling and trunk are
    choices of this package, not of the paper.

    Example:
        >>> from hf_featreuse import FeatureReuseConfig
        >>> args = FeatureReuseConfig(output_dir="outputs/run", drop_rate=0.2, report_to="none")
        >>> args.masked_freeze_steps
        1
    """

    def __post_init__(self) -> None:
        self.check()
        self.check_recipe()
        TrainingArguments.__post_init__(self)


def window_steps(start: float, end: float, max_steps: int) -> tuple[int, int | None]:
    """Return the first and last optimizer step of the window [start, end], given as fractions of `max_steps`.

    A step s is in the window if `start <= s / max_steps <= end`. An end of 1 has no last step, so that training can be
    extended.
    """
    # A whole number of steps can have a rounding error: 0.07 * 100 is 7.000000000000001.
    first = math.ceil(round(start * max_steps, 6))
    return first, None if end == 1 else math.floor(round(end * max_steps, 6))
