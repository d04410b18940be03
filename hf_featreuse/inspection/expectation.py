"""Expected cost of each kind of step over the schedule, exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hf_featreuse.cost import StepCosts
from hf_featreuse.schedule import FeatureReuseSchedule, StepKind, StepPlan


def step_shares(schedule: FeatureReuseSchedule, trunk_trains: bool) -> dict[str, float]:
    """Expected share of the steps that each kind takes; a cycle that draws no block is vanilla."""
    if not schedule.steps_per_cycle:
        return {"vanilla": 1.0, "stochastic_depth": 0.0, "masked_freeze": 0.0}
    vanilla = _vanilla_probability(schedule.rates, trunk_trains)
    depth = (1 - vanilla) * schedule.stochastic_depth_steps / schedule.steps_per_cycle
    return {"vanilla": vanilla, "stochastic_depth": depth, "masked_freeze": 1 - vanilla - depth}


def _vanilla_probability(rates: Sequence[float], trunk_trains: bool) -> float:
    return math.prod(1 - rate for rate in rates) + (0.0 if trunk_trains else math.prod(rates))


def expected_costs(
    costs: StepCosts, rates: Sequence[float], step_shares: Mapping[str, float], trunk_trains: bool
) -> dict[str, float]:
    expected = {"vanilla": 1.0}
    for kind in (StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE):
        expected[kind.value] = expected_share(costs, kind, rates, trunk_trains)
    return {**expected, "mean": sum(share * expected[kind] for kind, share in step_shares.items())}


def expected_share(costs: StepCosts, kind: StepKind, rates: Sequence[float], trunk_trains: bool = True) -> float:
    """Give the exact expectation of `costs.share` over the sets D that make a step of this kind.

    Given the lowest block that trains, the cost of a step is a sum over the blocks above it: their expectations add.

    Args:
        costs (`StepCosts`): of the model.
        kind (`StepKind`): stochastic depth or masked freeze.
        rates (`Sequence[float]`): drop probability of each block.
        trunk_trains (`bool`, defaults to `True`): whether the trunk can train; if not, dropping all blocks is vanilla.
    """
    everything = range(len(rates))
    depth = kind is StepKind.STOCHASTIC_DEPTH
    training = [1 - rate if depth else rate for rate in rates]

    def share(*trains: int) -> float:
        dropped = tuple(block for block in everything if (block in trains) != depth)
        return costs.share(StepPlan(kind, dropped))

    total, none_below = 0.0, 1.0
    for lowest in everything:
        alone = share(lowest)
        above = sum(training[block] * (share(lowest, block) - alone) for block in range(lowest + 1, len(rates)))
        total += none_below * training[lowest] * (alone + above)
        none_below *= 1 - training[lowest]
    total += none_below * share()
    # Cycles that are vanilla are none of this kind.
    total -= math.prod(1 - rate for rate in rates) * costs.share(StepPlan(kind, ()))
    total -= 0.0 if trunk_trains else math.prod(rates) * costs.share(StepPlan(kind, tuple(everything)))
    steps = 1 - _vanilla_probability(rates, trunk_trains)
    return total / steps if steps else 1.0
