"""Expected cost of each kind of step over the schedule: exact, or from up to 32 cycles if rates change over time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_featreuse.method.cost import StepCosts
from hf_featreuse.method.schedule import FeatureReuseSchedule, StepKind, StepPlan

# Cycles to count if the rates change over time.
_MOST_CYCLES = 32


def step_shares(schedule: FeatureReuseSchedule, trunk_trains: bool) -> dict[str, float]:
    """Return the expected share of each kind among the steps of the window.

    A masked-freeze step that drew no block is vanilla; with a frozen trunk, so is a whole cycle that drew all.
    """
    shares = [_shares(schedule, rates, trunk_trains) for rates in _rates_over_time(schedule)]
    return {kind: sum(share[kind] for share in shares) / len(shares) for kind in shares[0]}


def expected_costs(costs: StepCosts, schedule: FeatureReuseSchedule, trunk_trains: bool) -> dict[str, float]:
    """Return the expected arithmetic of each kind of step and of the mean step, as shares of a vanilla step's."""
    over_time = [(rates, _shares(schedule, rates, trunk_trains)) for rates in _rates_over_time(schedule)]
    expected = {"vanilla": 1.0}
    mean = sum(shares["vanilla"] for _, shares in over_time)
    for kind in (StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE):
        weighted = [(shares[kind], expected_share(costs, kind, rates, trunk_trains)) for rates, shares in over_time]
        total, weight = sum(w * cost for w, cost in weighted), sum(w for w, _ in weighted)
        # For a kind that does not occur, the cost that it would have.
        expected[kind.value] = total / weight if weight else sum(cost for _, cost in weighted) / len(weighted)
        mean += total
    return {**expected, "mean": mean / len(over_time)}


def _rates_over_time(schedule: FeatureReuseSchedule) -> list[tuple[float, ...]]:
    """Return the rates of the cycles of the window, or of some of them, evenly spread."""
    if schedule.drop_rate_over_time == "constant" or schedule.last_step is None or not schedule.alternates:
        return [schedule.rates]
    cycles = -(-(schedule.last_step - schedule.first_step + 1) // schedule.steps_per_cycle)
    count = min(cycles, _MOST_CYCLES)
    chosen = [cycle * (cycles - 1) // max(count - 1, 1) for cycle in range(count)]
    return [schedule.rates_at(schedule.first_step + cycle * schedule.steps_per_cycle) for cycle in chosen]


def _shares(schedule: FeatureReuseSchedule, rates: Sequence[float], trunk_trains: bool) -> dict[str, float]:
    if not schedule.alternates:
        return {"vanilla": 1.0, "stochastic_depth": 0.0, "masked_freeze": 0.0}
    differs = 1 - _all_dropped(rates, trunk_trains)
    depth = schedule.stochastic_depth_steps / schedule.steps_per_cycle * differs
    freeze = schedule.masked_freeze_steps / schedule.steps_per_cycle * (differs - _none_dropped(rates))
    return {"vanilla": 1 - depth - freeze, "stochastic_depth": depth, "masked_freeze": freeze}


def _none_dropped(rates: Sequence[float]) -> float:
    return math.prod(1 - rate for rate in rates)


def _all_dropped(rates: Sequence[float], trunk_trains: bool) -> float:
    """Return the probability that a cycle is vanilla because it drops every block; 0 if the trunk trains."""
    return 0.0 if trunk_trains else math.prod(rates)


def expected_share(costs: StepCosts, kind: StepKind, rates: Sequence[float], trunk_trains: bool = True) -> float:
    """Return the exact expectation of `costs.share` over the sets D that make a step of this kind.

    Given the lowest block that trains, the cost of a step is a sum over the blocks above it, so expectations add up.

    Args:
        costs (`StepCosts`): costs of the model.
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
    # Remove the sets that make the step vanilla instead.
    none, all_dropped = 0.0 if depth else _none_dropped(rates), _all_dropped(rates, trunk_trains)
    total -= none * costs.share(StepPlan(kind, ()))
    total -= all_dropped * costs.share(StepPlan(kind, tuple(everything)))
    steps = 1 - none - all_dropped
    return total / steps if steps > 1e-12 else 1.0
