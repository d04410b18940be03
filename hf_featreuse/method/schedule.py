"""Plan the kind of each step, and which residual blocks it drops or trains.

The schedule is a pure function of (seed, optimizer step). Nothing is saved or communicated: a resumed run, every
micro-batch of an accumulated step and every rank compute the same plan.

Sources: the two kinds of step, arXiv 2411.09475 (abstract); linear survival probabilities, Huang et al. 2016
(arXiv 1603.09382, section 3); rates that fall or rise over training, Liu et al. 2023 (arXiv 2303.01500) and
progressive layer dropping (arXiv 2010.13369).
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.method.draws import GROUP, draw_batch, draw_samples, sixteenths

DropRateSchedule = Literal["linear", "uniform"]
DropRateOverTime = Literal["constant", "falling", "rising"]
DropGranularity = Literal["batch", "sample"]
TrainTrunk = Literal["all", "head", "none"]


class StepKind(enum.StrEnum):
    """Kind of one optimizer step.

    Example:
        >>> from hf_featreuse import StepKind
        >>> StepKind.MASKED_FREEZE.value
        'masked_freeze'
    """

    VANILLA = "vanilla"
    STOCHASTIC_DEPTH = "stochastic_depth"
    MASKED_FREEZE = "masked_freeze"


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The plan of one optimizer step.

    Args:
        kind (`StepKind`): plain training, stochastic depth or masked freeze.
        dropped (`tuple[int, ...]`): the set D in ascending order, as indices into the list of blocks. A
            stochastic-depth step skips these blocks, a masked-freeze step trains only these. Empty in a vanilla step,
            in a stochastic-depth step that drops nothing, and if every sample has its own set.
        sample_masks (`numpy.ndarray`, *optional*): the set D of each sample of a micro-batch, of shape (samples, L),
            `True` where the sample drops the block; `None` if all samples share `dropped`.
        survival (`tuple[float, ...]`, *optional*): survival probability of each of the L blocks, by which a
            stochastic-depth step divides the increments of the kept ones; `None` leaves them as they are.
        frozen_below (`int`, defaults to 0): blocks of a lower index, and all of the trunk that comes before the last
            block, do not train in this step, whatever its kind. 0 freezes nothing.

    Example:
        >>> from hf_featreuse import FeatureReuseSchedule
        >>> plan = FeatureReuseSchedule(4, drop_rate=0.5, drop_rate_schedule="uniform", seed=0).plan(0)
        >>> plan.dropped, plan.survival
        ((0, 1, 2), (0.5, 0.5, 0.5, 0.5))
    """

    kind: StepKind
    dropped: tuple[int, ...] = ()
    sample_masks: np.ndarray | None = None
    survival: tuple[float, ...] | None = None
    frozen_below: int = 0

    @property
    def mean_dropped(self) -> float:
        """Mean size of the set D over the samples."""
        return float(len(self.dropped) if self.sample_masks is None else self.sample_masks.sum(1).mean())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepPlan) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple:
        masks = self.sample_masks
        drawn = None if masks is None else (masks.shape, masks.tobytes())
        return self.kind, self.dropped, drawn, self.survival, self.frozen_below


VANILLA_PLAN = StepPlan(StepKind.VANILLA)
# The steps of a cycle, and the micro-batches of a step, have the same sets.
_draw_batch = functools.lru_cache(maxsize=64)(draw_batch)
_draw_samples = functools.lru_cache(maxsize=64)(draw_samples)
_CHOICES = {
    "drop_rate_schedule": DropRateSchedule,
    "drop_rate_over_time": DropRateOverTime,
    "drop_granularity": DropGranularity,
}


class FeatureReuseSchedule:
    """Alternate stochastic-depth and masked-freeze steps over random sets of blocks.

    A cycle is `vanilla_steps` plain steps, then `stochastic_depth_steps` and `masked_freeze_steps`. One set D is drawn
    per cycle: block l is in D with probability `rates[l]`, independently of the others. If D is empty, the
    stochastic-depth steps of the cycle compute and scale every block, and its masked-freeze steps are vanilla.
    Without steps of another kind, a cycle is one stochastic-depth step, so that every step draws its own set.

    Args:
        num_blocks (`int`): number of residual blocks L that can be dropped.
        drop_rate (`float`, defaults to 0.5): probability, from 0 to below 1, of dropping a block in a cycle; 0 is
            plain training.
        drop_rate_schedule (`"linear"` or `"uniform"`, defaults to `"linear"`): block l of 0..L-1 gets
            `drop_rate * (l + 1) / L` ("linear", Huang et al. 2016) or `drop_rate` ("uniform").
        stochastic_depth_steps (`int`, defaults to 3): optimizer steps of the first kind in a cycle.
        masked_freeze_steps (`int`, defaults to 1): optimizer steps of the second kind in a cycle. 3 and 0 is only
            stochastic depth, 0 and 1 only masked freeze, 0 and 0 plain training.
        vanilla_steps (`int`, defaults to 0): plain optimizer steps at the start of each cycle.
        seed (`int`, defaults to 0): from 0 to 2**64 - 1.
        first_step (`int`, defaults to 0): first optimizer step of the window; cycles are counted from it.
        last_step (`int`, *optional*): last optimizer step of the window, included; `None` means no end. Steps outside
            the window are vanilla.
        drop_granularity (`"batch"` or `"sample"`, defaults to `"batch"`): whether all samples of a step share one set
            D, or each has its own. The set of a sample follows from its position in the global batch of the optimizer
            step, so it does not depend on how this is divided into micro-batches and ranks. Rates are rounded to
            sixteenths, and of 16 consecutive samples exactly that many drop a block.
        drop_rate_over_time (`"constant"`, `"falling"` or `"rising"`, defaults to `"constant"`): within the window, the
            rates are constant, fall linearly to 0 at `last_step`, or rise linearly from 0 at `first_step`. All steps
            of a cycle have the rates of its first step.
        unfreeze_steps (`int`, defaults to 0): gradual unfreezing: at first only what follows the last block trains,
            then the blocks from the last one down at even intervals, and from this step on everything. In
            masked-freeze steps only those blocks of D train that are already unfrozen. 0 turns it off.

    Attributes:
        rates (`tuple[float, ...]`): highest drop probability of each block over time, shape (L,).

    Raises:
        ConfigurationError: an argument is out of range, rates fall or rise in a window without an end, or blocks are
            unfrozen while every sample has its own set.

    Source: gradual unfreezing, Howard and Ruder 2018 (arXiv 1801.06146).

    Example:
        >>> from hf_featreuse import FeatureReuseSchedule
        >>> schedule = FeatureReuseSchedule(4, drop_rate=0.5, seed=0)
        >>> schedule.rates
        (0.125, 0.25, 0.375, 0.5)
        >>> [schedule.plan(step).kind.value for step in range(4)]
        ['stochastic_depth', 'stochastic_depth', 'stochastic_depth', 'masked_freeze']
        >>> schedule.plan(0).dropped == schedule.plan(3).dropped
        True
    """

    # For subclasses that do not call `__init__`.
    unfreeze_steps: int = 0

    def __init__(
        self,
        num_blocks: int,
        drop_rate: float = 0.5,
        drop_rate_schedule: DropRateSchedule = "linear",
        stochastic_depth_steps: int = 3,
        masked_freeze_steps: int = 1,
        seed: int = 0,
        first_step: int = 0,
        last_step: int | None = None,
        drop_granularity: DropGranularity = "batch",
        vanilla_steps: int = 0,
        drop_rate_over_time: DropRateOverTime = "constant",
        unfreeze_steps: int = 0,
    ) -> None:
        check_options(
            drop_rate=drop_rate,
            drop_rate_schedule=drop_rate_schedule,
            drop_rate_over_time=drop_rate_over_time,
            drop_granularity=drop_granularity,
            stochastic_depth_steps=stochastic_depth_steps,
            masked_freeze_steps=masked_freeze_steps,
            vanilla_steps=vanilla_steps,
        )
        self.num_blocks = _whole_number("num_blocks", num_blocks)
        self.drop_rate = float(drop_rate)
        self.drop_rate_schedule: DropRateSchedule = drop_rate_schedule
        # Later steps of a cycle share its set, so that masked freeze trains what was dropped.
        holds_set = masked_freeze_steps or vanilla_steps
        self.stochastic_depth_steps = int(stochastic_depth_steps if holds_set else min(stochastic_depth_steps, 1))
        self.masked_freeze_steps = int(masked_freeze_steps)
        self.seed = check_seed("seed", seed)
        self.first_step = _whole_number("first_step", first_step)
        self.last_step = None if last_step is None else _whole_number("last_step", last_step)
        self.drop_granularity: DropGranularity = drop_granularity
        self.vanilla_steps = int(vanilla_steps)
        self.drop_rate_over_time: DropRateOverTime = drop_rate_over_time
        self.unfreeze_steps = _whole_number("unfreeze_steps", unfreeze_steps)
        check_unfreezing(self.unfreeze_steps, self.alternates, drop_granularity)
        if self.num_blocks == 0 and (self.alternates or self.unfreeze_steps):
            raise ConfigurationError(
                f"`num_blocks=0` leaves nothing to {'drop' if self.alternates else 'unfreeze'}. Pass the number of "
                "residual blocks, or set `drop_rate=0`, without unfreezing, for plain training."
            )
        if drop_rate_over_time != "constant" and last_step is None:
            raise ConfigurationError(
                f"`drop_rate_over_time={drop_rate_over_time!r}` needs the end of the window. Pass `last_step`, the "
                "last optimizer step of the window."
            )
        self.rates = self._rates(1.0)

    @property
    def alternates(self) -> bool:
        """Whether any step differs from plain training."""
        return self.drop_rate > 0 and self.stochastic_depth_steps + self.masked_freeze_steps > 0

    @property
    def unfreezes(self) -> bool:
        """Whether blocks are frozen at first."""
        return self.unfreeze_steps > 0 and self.num_blocks > 0

    def frozen_below(self, global_step: int) -> int:
        """Return the index of the lowest block that trains in an optimizer step; L if none does yet.

        Args:
            global_step (`int`): number of optimizer steps taken before this one.

        Example:
            >>> from hf_featreuse import FeatureReuseSchedule
            >>> schedule = FeatureReuseSchedule(2, drop_rate=0, unfreeze_steps=4)
            >>> [schedule.frozen_below(step) for step in range(6)]
            [2, 2, 1, 1, 0, 0]
        """
        if not self.unfreezes or global_step >= self.unfreeze_steps:
            return 0
        return self.num_blocks - global_step * self.num_blocks // self.unfreeze_steps

    @property
    def steps_per_cycle(self) -> int:
        """Number of optimizer steps in a cycle."""
        return self.vanilla_steps + self.stochastic_depth_steps + self.masked_freeze_steps

    def rates_at(self, global_step: int) -> tuple[float, ...]:
        """Return the drop probability of each block in the cycle of an optimizer step in the window.

        Args:
            global_step (`int`): from `first_step` to `last_step`.

        Example:
            >>> from hf_featreuse import FeatureReuseSchedule
            >>> schedule = FeatureReuseSchedule(2, last_step=20, drop_rate_over_time="falling")
            >>> schedule.rates_at(0), schedule.rates_at(8), schedule.rates_at(20)
            ((0.25, 0.5), (0.15, 0.3), (0.0, 0.0))
        """
        return self._cycle_rates((global_step - self.first_step) // max(self.steps_per_cycle, 1))

    def _cycle_rates(self, cycle: int) -> tuple[float, ...]:
        if self.drop_rate_over_time == "constant" or self.last_step is None:
            return self.rates
        passed = min(cycle * self.steps_per_cycle / max(self.last_step - self.first_step, 1), 1.0)
        return self._rates(1 - passed if self.drop_rate_over_time == "falling" else passed)

    def _rates(self, factor: float) -> tuple[float, ...]:
        """Return the drop probability of each block at a fraction of the drop rate."""
        rate = self.drop_rate * factor
        if self.drop_rate_schedule == "uniform":
            rates = (rate,) * self.num_blocks
        else:
            rates = tuple(rate * (block + 1) / self.num_blocks for block in range(self.num_blocks))
        return tuple(sixteenths(rate) / GROUP for rate in rates) if self.drop_granularity == "sample" else rates

    def plan(self, global_step: int, *, batch_size: int | None = None, position: int = 0) -> StepPlan:
        """Return the plan of an optimizer step or, with one set per sample, of one micro-batch of it.

        Args:
            global_step (`int`): number of optimizer steps taken before this one, as `TrainerState.global_step`.
            batch_size (`int`, *optional*): samples in the micro-batch; required, and used, only if every sample has
                its own set.
            position (`int`, defaults to 0): position of the first sample in the global batch of the optimizer step.

        Returns:
            `StepPlan`: the kind of step and the set D.

        Raises:
            ConfigurationError: `batch_size` is missing, or it or `position` is not a whole number.

        Example:
            >>> from hf_featreuse import FeatureReuseSchedule
            >>> FeatureReuseSchedule(4, first_step=10).plan(3).kind.value
            'vanilla'
            >>> schedule = FeatureReuseSchedule(4, drop_granularity="sample")
            >>> schedule.plan(0, batch_size=8).sample_masks.shape
            (8, 4)
        """
        plan, frozen = self._cycle_plan(global_step, batch_size, position), self.frozen_below(global_step)
        if not frozen:
            return plan
        if plan.kind is not StepKind.MASKED_FREEZE:
            return replace(plan, frozen_below=frozen)
        dropped = tuple(index for index in plan.dropped if index >= frozen)
        kind = StepKind.MASKED_FREEZE if dropped else StepKind.VANILLA
        return StepPlan(kind, dropped, frozen_below=frozen)

    def _cycle_plan(self, global_step: int, batch_size: int | None, position: int) -> StepPlan:
        """Return the plan without unfreezing."""
        after_end = self.last_step is not None and global_step > self.last_step
        if not self.alternates or global_step < self.first_step or after_end:
            return VANILLA_PLAN
        cycle, step_of_cycle = divmod(global_step - self.first_step, self.steps_per_cycle)
        if step_of_cycle < self.vanilla_steps:
            return VANILLA_PLAN
        is_depth_step = step_of_cycle < self.vanilla_steps + self.stochastic_depth_steps
        kind = StepKind.STOCHASTIC_DEPTH if is_depth_step else StepKind.MASKED_FREEZE
        rates = self._cycle_rates(cycle)
        survival = tuple(1 - rate for rate in rates) if is_depth_step else None
        if self.drop_granularity == "sample":
            return StepPlan(kind, (), self._draw_samples(cycle, rates, batch_size, position), survival)
        dropped = _draw_batch(self.seed, cycle, rates)
        return StepPlan(kind, dropped, None, survival) if dropped or is_depth_step else VANILLA_PLAN

    def _draw_samples(self, cycle: int, rates: tuple[float, ...], batch_size: int | None, position: int) -> np.ndarray:
        if batch_size is None:
            raise ConfigurationError(
                '`drop_granularity="sample"` draws one set per sample and needs the number of samples. Pass '
                "`batch_size`, the samples in this micro-batch, and `position`, that of the first sample in the "
                "global batch."
            )
        count, first = _whole_number("batch_size", batch_size), _whole_number("position", position)
        return _draw_samples(self.seed, cycle, rates, count, first).copy()

    def settings(self) -> dict[str, object]:
        """Return the arguments that create an equal schedule."""
        return {name: value for name, value in vars(self).items() if name != "rates"}

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"FeatureReuseSchedule({values})"


def sample_position(
    micro_batch: int, rank: int, num_ranks: int, samples: int, *, dispatched: int | None = None
) -> int:
    """Return the position of the first sample of a micro-batch in the global batch of its optimizer step.

    Args:
        micro_batch (`int`): index of the micro-batch in the optimizer step.
        rank (`int`): rank of this process.
        num_ranks (`int`): number of processes.
        samples (`int`): samples in a full micro-batch of one rank, also if this one is smaller, as the last one of an
            epoch may be.
        dispatched (`int`, *optional*): samples on this rank now, if one process loads a batch for all and divides it
            evenly, as accelerate's `dispatch_batches` does: a smaller batch then gives smaller slices.

    Example:
        >>> from hf_featreuse.method.schedule import sample_position
        >>> sample_position(1, 1, 2, 8), sample_position(1, 1, 2, 8, dispatched=3)
        (24, 19)
    """
    return micro_batch * num_ranks * samples + rank * (samples if dispatched is None else dispatched)


def check_options(*, drop_rate: object, **options: object) -> None:
    """Raise `ConfigurationError` for invalid options that can be checked without a model."""
    if isinstance(drop_rate, bool) or not isinstance(drop_rate, (int, float)) or not 0 <= drop_rate < 1:
        raise ConfigurationError(
            f"`drop_rate={drop_rate!r}` is not a probability. Pass a value in [0, 1), such as 0.5; 0 is plain "
            "training."
        )
    for name, value in options.items():
        if name not in _CHOICES:
            _whole_number(name, value)
        elif value not in get_args(_CHOICES[name]):
            raise ConfigurationError(f"`{name}={value!r}` is unknown. Pass one of {get_args(_CHOICES[name])}.")


def check_unfreezing(unfreezes: object, alternates: bool, drop_granularity: str) -> None:
    """Raise `ConfigurationError` for gradual unfreezing with one set per sample."""
    if unfreezes and alternates and drop_granularity == "sample":
        raise ConfigurationError(
            'Gradual unfreezing does not work with `drop_granularity="sample"`, which freezes each block for a part '
            'of the batch. Set `drop_granularity="batch"`, or leave `unfreeze_at` and `unfreeze_steps` unset.'
        )


def trunk_option(train_trunk: object) -> TrainTrunk:
    """Return the option `train_trunk` as a string; `True` is `"all"` and `False` is `"none"`."""
    if isinstance(train_trunk, bool):
        return "all" if train_trunk else "none"
    for word in get_args(TrainTrunk):
        if train_trunk == word:
            return word
    raise ConfigurationError(f"`train_trunk={train_trunk!r}` is unknown. Pass one of {get_args(TrainTrunk)}.")


def check_seed(name: str, seed: object) -> int:
    """Return the seed as an int that fits a key word of Philox, or raise `ConfigurationError`."""
    value = _whole_number(name, seed)
    if value >= 2**64:
        raise ConfigurationError(f"`{name}={seed!r}` does not fit 64 bits. Pass a whole number from 0 to 2**64 - 1.")
    return value


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise ConfigurationError(
            f"`{name}={value!r}` is not an integer of at least 0. Pass a value such as `{name}=1`."
        )
    return int(value)
