"""The expected cost of a schedule, compared with the sum over all sets D and with drawn plans."""

import functools
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from tiny_models import build

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    StepCosts,
    StepKind,
    StepPlan,
    find_residual_blocks,
    inspect_model,
    measure_step_costs,
)
from hf_featreuse.inspection.expectation import expected_costs, expected_share, step_shares
from hf_featreuse.trainer.console import opening_summary

VANILLA, DEPTH, FREEZE = StepKind.VANILLA, StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE


def model_with(name: str, freeze: str):
    """A model on the meta device with a frozen part, and its blocks."""
    model = build(name).to("meta")
    blocks = find_residual_blocks(model)
    inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    for parameter_name, parameter in model.named_parameters():
        is_trunk = id(parameter) not in inside
        parameter.requires_grad_(not (is_trunk and (freeze == "trunk" or freeze in parameter_name)))
    return model, blocks


@functools.cache
def costs_of(name: str, freeze: str = "nothing", train_trunk: str = "all") -> StepCosts:
    return measure_step_costs(*model_with(name, freeze), train_trunk=train_trunk)


def steps_of_a_cycle(schedule: FeatureReuseSchedule, dropped: tuple[int, ...], trunk_trains: bool) -> list[StepPlan]:
    """The steps of a cycle that draws a set D."""
    total = schedule.vanilla_steps + schedule.stochastic_depth_steps + schedule.masked_freeze_steps
    if not trunk_trains and len(dropped) == schedule.num_blocks:
        return [StepPlan(VANILLA)] * total
    freeze = StepPlan(FREEZE, dropped) if dropped else StepPlan(VANILLA)
    return [
        *[StepPlan(VANILLA)] * schedule.vanilla_steps,
        *[StepPlan(DEPTH, dropped)] * schedule.stochastic_depth_steps,
        *[freeze] * schedule.masked_freeze_steps,
    ]


def by_enumeration(costs: StepCosts, schedule: FeatureReuseSchedule, trunk_trains: bool):
    """Shares and costs of the kinds of step, from every set D of every cycle of the window."""
    share = functools.cache(costs.share)
    cycles = 1
    if schedule.last_step is not None:
        cycles = (schedule.last_step - schedule.first_step + 1) // schedule.steps_per_cycle
    weights, spent = Counter(), Counter()
    for cycle in range(cycles):
        rates = schedule.rates_at(schedule.first_step + cycle * schedule.steps_per_cycle)
        for drawn in itertools.product([False, True], repeat=len(rates)):
            factors = [rate if is_drawn else 1 - rate for rate, is_drawn in zip(rates, drawn, strict=True)]
            for plan in steps_of_a_cycle(schedule, tuple(np.flatnonzero(drawn)), trunk_trains):
                weights[plan.kind.value] += math.prod(factors)
                spent[plan.kind.value] += math.prod(factors) * share(plan)
    total = cycles * schedule.steps_per_cycle
    shares = {kind.value: weights[kind.value] / total for kind in StepKind}
    means = {kind: spent[kind] / weights[kind] for kind in weights if weights[kind]}
    return shares, {**means, "mean": sum(spent.values()) / total}


SCHEDULES = {
    "default": {},
    "uniform": {"drop_rate": 0.7, "drop_rate_schedule": "uniform"},
    "plain steps": {"vanilla_steps": 2, "stochastic_depth_steps": 2},
    "only stochastic depth": {"masked_freeze_steps": 0},
    "only masked freeze": {"stochastic_depth_steps": 0, "drop_rate": 0.2},
    # 20 whole cycles.
    "falling": {"drop_rate_over_time": "falling", "first_step": 7, "last_step": 46},
    "rising": {"drop_rate_over_time": "rising", "drop_rate": 0.9, "last_step": 59, "vanilla_steps": 1},
}


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("train_trunk", ["all", "head", "none"])
@pytest.mark.parametrize(("name", "freeze"), [("vit", "nothing"), ("vit", "trunk"), ("resnet", "nothing")])
def test_shares_and_costs_are_sums_over_all_sets(name, freeze, train_trunk, options):
    costs, trunk_trains = costs_of(name, freeze, train_trunk), freeze != "trunk"
    schedule = FeatureReuseSchedule(len(costs.blocks), **options)
    shares, expected = by_enumeration(costs, schedule, trunk_trains)
    assert step_shares(schedule, trunk_trains) == pytest.approx(shares, rel=1e-9)
    found = expected_costs(costs, schedule, trunk_trains)
    assert {kind: found[kind] for kind in expected} == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("train_trunk", ["all", "head", "none"])
@pytest.mark.parametrize(
    "name, freeze",
    [("vit", "nothing"), ("vit", "embeddings"), ("vit", "trunk"), ("resnet", "nothing"), ("swin", "trunk")],
)
def test_the_report_has_these_costs(name, freeze, train_trunk):
    model, blocks = model_with(name, freeze)
    costs, trunk_trains = measure_step_costs(model, blocks, train_trunk=train_trunk), freeze != "trunk"
    for rates in ("linear", "uniform"):
        schedule = FeatureReuseSchedule(len(blocks), drop_rate=0.6, drop_rate_schedule=rates)
        report = inspect_model(model, drop_rate=0.6, drop_rate_schedule=rates, train_trunk=train_trunk)
        shares, expected = by_enumeration(costs, schedule, trunk_trains)
        assert report.step_shares == pytest.approx(shares, rel=1e-9)
        assert {kind: report.costs[kind] for kind in expected} == pytest.approx(expected, rel=1e-9)
        for kind in (DEPTH, FREEZE):
            share = expected_share(costs, kind, schedule.rates, trunk_trains)
            assert share == pytest.approx(expected[kind.value], rel=1e-9)


# Drawn plans

# Without masked freeze the cost is linear in the rates, so that a mean over the wrong cycles shows.
THINNED = {"drop_rate": 0.9, "masked_freeze_steps": 0, "last_step": 119}
SIMULATED = {
    "constant": {},
    "vanilla steps": {"vanilla_steps": 1},
    # 60 and 120 cycles, of which the estimate looks at 32.
    "falling": {"drop_rate_over_time": "falling", "drop_rate": 0.8, "last_step": 119},
    "rising": {"drop_rate_over_time": "rising", **THINNED},
    "per sample": {"drop_granularity": "sample"},
    "per sample, falling": {"drop_granularity": "sample", "drop_rate_over_time": "falling", **THINNED},
    "a window": {"first_step": 40, "last_step": 79},
    "per sample, a window": {"drop_granularity": "sample", "first_step": 40, "last_step": 79},
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trunk", "frozen trunk"])
@pytest.mark.parametrize("options", SIMULATED.values(), ids=SIMULATED)
def test_the_opening_summary_expects_the_mean_of_the_plans_of_a_run(options, frozen):
    freeze = "trunk" if frozen else "nothing"
    model, blocks = model_with("vit", freeze)
    costs, per_sample = costs_of("vit", freeze), "drop_granularity" in options
    runs, share = [], functools.cache(costs.share)
    for seed in range(4 if per_sample else 60):
        reuse = FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks), seed=seed, **options))
        runs.append(np.mean([share(reuse.plan(step, batch_size=64)) for step in range(120)]))
    text = opening_summary(reuse, costs, max_steps=120)
    expected = float(re.search(r"cost    share of arithmetic (\S+) of a plain", text)[1])
    # Two decimals are printed; the mean over the seeds has a standard error; per sample, few cycles are looked at.
    bound = 0.005 + 5 * np.std(runs) / math.sqrt(len(runs)) + 0.01 * per_sample
    assert bound < 0.03
    assert abs(np.mean(runs) - expected) < bound


def test_the_mean_of_a_report_is_that_of_a_long_run():
    model = build("resnet").to("meta")
    blocks = find_residual_blocks(model)
    schedule = FeatureReuseSchedule(len(blocks), drop_rate=0.5, seed=1)
    reuse, share = FeatureReuse(model, blocks, schedule), functools.cache(measure_step_costs(model, blocks).share)
    plans = [reuse.plan(step) for step in range(8000)]
    report = inspect_model(model)
    assert report.costs["mean"] == pytest.approx(sum(map(share, plans)) / len(plans), abs=0.01)
    for kind, expected in report.step_shares.items():
        assert expected == pytest.approx(sum(plan.kind == kind for plan in plans) / len(plans), abs=0.02)
