"""Which kind of step comes when, and which residual blocks it drops or trains.

The schedule is a pure function of (seed, optimizer step). Nothing is saved and nothing is communicated: a resumed
run, every micro-batch of an accumulated step and every rank compute the same plan.

Sources: the two kinds of step, arXiv 2411.09475 (abstract); linear survival probabilities, Huang et al. 2016
(arXiv 1603.09382, section 3); the counter-based generator Philox 4x64, Salmon et al. 2011, from numpy.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from hf_featreuse.errors import ConfigurationError

DropRateSchedule = Literal["linear", "uniform"]
DropGranularity = Literal["batch", "sample"]


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
    """What one optimizer step does.

    Args:
        kind (`StepKind`): plain training, stochastic depth or masked freeze.
        dropped (`tuple[int, ...]`): the set D in rising order, as indices into the list of blocks. A stochastic-depth
            step leaves these blocks out, a masked-freeze step trains only these. Empty in a vanilla step, and where
            every sample has its own set.
        sample_masks (`numpy.ndarray`, *optional*): the set D of each sample of a micro-batch, of shape (samples, L),
            `True` where the sample drops the block; `None` where all samples share `dropped`.

    Example:
        >>> from hf_featreuse import FeatureReuseSchedule
        >>> FeatureReuseSchedule(4, drop_rate=0.5, drop_rate_schedule="uniform", seed=0).plan(0).dropped
        (0, 1, 2)
    """

    kind: StepKind
    dropped: tuple[int, ...] = ()
    sample_masks: np.ndarray | None = None

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
        return self.kind, self.dropped, None if masks is None else (masks.shape, masks.tobytes())


VANILLA_PLAN = StepPlan(StepKind.VANILLA)


class FeatureReuseSchedule:
    """Alternate stochastic-depth and masked-freeze steps over random sets of blocks.

    A cycle is `stochastic_depth_steps` steps of the first kind, then `masked_freeze_steps` of the second. One set D
    is drawn a cycle: block l is in D with probability `rates[l]`, independently of the others. A cycle whose D is
    empty is vanilla throughout.

    Args:
        num_blocks (`int`): number of residual blocks L that can be dropped.
        drop_rate (`float`, defaults to 0.5): probability, above 0 and below 1, of dropping a block in a cycle.
        drop_rate_schedule (`"linear"` or `"uniform"`, defaults to `"linear"`): block l of 0..L-1 gets
            `drop_rate * (l + 1) / L` ("linear", Huang et al. 2016) or `drop_rate` ("uniform").
        stochastic_depth_steps (`int`, defaults to 1): optimizer steps of the first kind in a cycle.
        masked_freeze_steps (`int`, defaults to 1): optimizer steps of the second kind in a cycle. 1 and 0 is plain
            stochastic depth, 0 and 1 masked freeze alone, 0 and 0 plain training.
        seed (`int`, defaults to 0): from 0 to 2**64 - 1.
        first_step (`int`, defaults to 0): first optimizer step of the window; cycles are counted from it.
        last_step (`int`, *optional*): last optimizer step of the window, included; `None` means no end. Steps outside
            the window are vanilla.
        drop_granularity (`"batch"` or `"sample"`, defaults to `"batch"`): whether all samples of a step share one set
            D, or each has its own. The set of a sample follows from its position in the global batch of the optimizer
            step: how this is cut into micro-batches and ranks changes nothing.

    Attributes:
        rates (`tuple[float, ...]`): drop probability of each block, shape (L,).

    Raises:
        ConfigurationError: an argument is out of range.

    Example:
        >>> from hf_featreuse import FeatureReuseSchedule
        >>> schedule = FeatureReuseSchedule(4, drop_rate=0.5, seed=0)
        >>> schedule.rates
        (0.125, 0.25, 0.375, 0.5)
        >>> [schedule.plan(step).kind.value for step in range(2)]
        ['stochastic_depth', 'masked_freeze']
        >>> schedule.plan(0).dropped == schedule.plan(1).dropped
        True
    """

    def __init__(
        self,
        num_blocks: int,
        drop_rate: float = 0.5,
        drop_rate_schedule: DropRateSchedule = "linear",
        stochastic_depth_steps: int = 1,
        masked_freeze_steps: int = 1,
        seed: int = 0,
        first_step: int = 0,
        last_step: int | None = None,
        drop_granularity: DropGranularity = "batch",
    ) -> None:
        check_options(drop_rate, drop_rate_schedule, stochastic_depth_steps, masked_freeze_steps)
        check_granularity(drop_granularity)
        self.num_blocks = _whole_number("num_blocks", num_blocks)
        self.drop_rate = float(drop_rate)
        self.drop_rate_schedule = drop_rate_schedule
        self.stochastic_depth_steps = int(stochastic_depth_steps)
        self.masked_freeze_steps = int(masked_freeze_steps)
        self.seed = check_seed("seed", seed)
        self.first_step = _whole_number("first_step", first_step)
        self.last_step = None if last_step is None else _whole_number("last_step", last_step)
        self.drop_granularity = drop_granularity
        if self.num_blocks == 0 and self.steps_per_cycle:
            raise ConfigurationError(
                "`num_blocks=0` leaves nothing to drop. Pass the number of residual blocks, or set "
                "`stochastic_depth_steps=0` and `masked_freeze_steps=0` for plain training."
            )
        self.rates = _rates(self.num_blocks, self.drop_rate, drop_rate_schedule)

    @property
    def steps_per_cycle(self) -> int:
        """Number of optimizer steps in a cycle; 0 means plain training."""
        return self.stochastic_depth_steps + self.masked_freeze_steps

    def plan(self, global_step: int, *, batch_size: int | None = None, position: int = 0) -> StepPlan:
        """Give the plan of an optimizer step or, with sets drawn by sample, of one micro-batch of it.

        Args:
            global_step (`int`): number of optimizer steps taken before this one, as `TrainerState.global_step`.
            batch_size (`int`, *optional*): samples in the micro-batch; needed, and used, where every sample has its
                own set.
            position (`int`, defaults to 0): of the first of them in the global batch of the optimizer step.

        Returns:
            `StepPlan`: the kind of step and the set D.

        Raises:
            ConfigurationError: `batch_size` is missing, or it or `position` is no whole number.

        Example:
            >>> from hf_featreuse import FeatureReuseSchedule
            >>> FeatureReuseSchedule(4, first_step=10).plan(3).kind.value
            'vanilla'
            >>> schedule = FeatureReuseSchedule(4, drop_granularity="sample")
            >>> schedule.plan(0, batch_size=8).sample_masks.shape
            (8, 4)
        """
        after_end = self.last_step is not None and global_step > self.last_step
        if not self.steps_per_cycle or global_step < self.first_step or after_end:
            return VANILLA_PLAN
        cycle, step_of_cycle = divmod(global_step - self.first_step, self.steps_per_cycle)
        is_depth_step = step_of_cycle < self.stochastic_depth_steps
        kind = StepKind.STOCHASTIC_DEPTH if is_depth_step else StepKind.MASKED_FREEZE
        if self.drop_granularity == "sample":
            return StepPlan(kind, sample_masks=self._draw_samples(cycle, batch_size, position))
        dropped = self._draw(cycle)
        return StepPlan(kind, dropped) if dropped else VANILLA_PLAN

    def _draw(self, cycle: int) -> tuple[int, ...]:
        """The set D of a cycle, from Philox raw words, whose stream numpy keeps the same on every platform."""
        # One counter word for the cycle: streams of different cycles never overlap (each has 2**64 blocks of 4 words).
        words = np.random.Philox(key=self.seed, counter=[0, cycle, 0, 0]).random_raw(self.num_blocks)
        return tuple(np.flatnonzero(_uniforms(words) < self.rates).tolist())

    def _draw_samples(self, cycle: int, batch_size: int | None, position: int) -> np.ndarray:
        """The sets D of consecutive samples in a cycle, of shape (batch_size, L)."""
        if batch_size is None:
            raise ConfigurationError(
                '`drop_granularity="sample"` draws a set for every sample and needs their number. Pass '
                "`batch_size=...`, the samples of this micro-batch, and `position=...`, that of the first of them."
            )
        count, first = _whole_number("batch_size", batch_size), _whole_number("position", position)
        # Each sample takes whole blocks of 4 words, so that the stream can be entered at any position. The third
        # counter word keeps these streams apart from those of whole batches.
        blocks_each = -(-self.num_blocks // 4)
        generator = np.random.Philox(key=self.seed, counter=[first * blocks_each, cycle, 1, 0])
        words = generator.random_raw(count * blocks_each * 4).reshape(count, blocks_each * 4)[:, : self.num_blocks]
        return _uniforms(words) < self.rates

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name != "rates")
        return f"FeatureReuseSchedule({values})"


def check_options(drop_rate: object, drop_rate_schedule: object, depth_steps: object, freeze_steps: object) -> None:
    """Raise `ConfigurationError` unless the options that need no model are usable."""
    if isinstance(drop_rate, bool) or not isinstance(drop_rate, (int, float)) or not 0 < drop_rate < 1:
        raise ConfigurationError(
            f"`drop_rate={drop_rate!r}` is not a probability above 0 and below 1. Pass for instance `drop_rate=0.5`; "
            "to drop nothing, set `stochastic_depth_steps=0` and `masked_freeze_steps=0`."
        )
    if drop_rate_schedule not in get_args(DropRateSchedule):
        raise ConfigurationError(
            f"`drop_rate_schedule={drop_rate_schedule!r}` is not known. Pass one of {get_args(DropRateSchedule)}."
        )
    _whole_number("stochastic_depth_steps", depth_steps)
    _whole_number("masked_freeze_steps", freeze_steps)


def check_granularity(drop_granularity: object) -> None:
    """Raise `ConfigurationError` unless the granularity is known."""
    if drop_granularity not in get_args(DropGranularity):
        raise ConfigurationError(
            f"`drop_granularity={drop_granularity!r}` is unknown. Pass one of {get_args(DropGranularity)}."
        )


def check_seed(name: str, seed: object) -> int:
    """The seed as an int that fits one key word of Philox, or `ConfigurationError`."""
    value = _whole_number(name, seed)
    if value >= 2**64:
        raise ConfigurationError(f"`{name}={seed!r}` does not fit 64 bits. Pass a whole number from 0 to 2**64 - 1.")
    return value


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise ConfigurationError(f"`{name}={value!r}` is not a whole number from 0 on. Pass for instance `{name}=1`.")
    return int(value)


def _rates(num_blocks: int, drop_rate: float, drop_rate_schedule: str) -> tuple[float, ...]:
    if drop_rate_schedule == "uniform":
        return (drop_rate,) * num_blocks
    return tuple(drop_rate * (block + 1) / num_blocks for block in range(num_blocks))


def _uniforms(words: np.ndarray) -> np.ndarray:
    """Raw words of 64 bits as uniform numbers from 0 up to, not including, 1."""
    return (words >> np.uint64(11)) * 2.0**-53
