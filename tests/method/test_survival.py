"""Kept blocks are divided by the probability that they are kept: over many steps, every block counts once per step."""

import itertools
import math

import numpy as np
import pytest
import torch
from engine_checks import engine
from tiny_models import batch, build, snapshot
from torch import nn

from hf_featreuse import (
    ConfigurationError,
    FeatureReuse,
    FeatureReuseSchedule,
    StepKind,
    StepPlan,
    find_residual_blocks,
    skip_blocks,
)
from hf_featreuse.method.feature_reuse import logger
from hf_featreuse.method.schedule import VANILLA_PLAN

VANILLA, DEPTH, FREEZE = StepKind.VANILLA, StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE
# Rates that rarely drop nothing and often everything, and the default.
RATES = [
    {"drop_rate": 0.8, "drop_rate_schedule": "uniform"},
    {"drop_rate": 0.2, "drop_rate_schedule": "uniform"},
    {"drop_rate": 0.7},
]


def vit(frozen_trunk: bool = False) -> tuple[nn.Module, list]:
    model = build("vit")
    blocks = find_residual_blocks(model)
    if frozen_trunk:
        inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in inside)
    return model, blocks


class EverySet(FeatureReuseSchedule):
    """Plans each of the 2**L sets D once, so that the expectation is a sum."""

    def __init__(self, num_blocks: int, **options) -> None:
        super().__init__(num_blocks, **options)
        self.sets = [np.flatnonzero(drops) for drops in itertools.product([False, True], repeat=num_blocks)]

    def plan(self, global_step: int, **samples) -> StepPlan:
        dropped = tuple(self.sets[global_step].tolist())
        return StepPlan(DEPTH, dropped, survival=tuple(1 - rate for rate in self.rates))

    def probability(self, dropped: tuple[int, ...]) -> float:
        rates = enumerate(self.rates)
        return math.prod(rate if block in dropped else 1 - rate for block, rate in rates)


def weight(plan: StepPlan, num_blocks: int) -> np.ndarray:
    """By how much each block counts in a step, or on average over its samples."""
    masks = plan.sample_masks
    if masks is None:
        masks = np.zeros((1, num_blocks), dtype=bool)
        masks[0, list(plan.dropped)] = True
    return (~masks / np.array(plan.survival)).mean(0)


# The expectation


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("frozen_trunk", [False, True])
def test_over_all_sets_every_block_counts_once(rates, frozen_trunk):
    model, blocks = vit(frozen_trunk)
    schedule = EverySet(len(blocks), **rates)
    reuse = FeatureReuse(model, blocks, schedule)
    assert reuse.trunk_trains is not frozen_trunk
    total, probability = np.zeros(len(blocks)), 0.0
    for step, dropped in enumerate(schedule.sets):
        plan = reuse.plan(step)
        if frozen_trunk and len(dropped) == len(blocks):
            assert plan == VANILLA_PLAN
            continue
        assert plan.dropped == tuple(dropped)
        total += schedule.probability(plan.dropped) * weight(plan, len(blocks))
        probability += schedule.probability(plan.dropped)
    assert probability == pytest.approx(1 - frozen_trunk * math.prod(schedule.rates))
    # In the steps of stochastic depth; a vanilla one counts every block once anyway.
    assert total / probability == pytest.approx(np.ones(len(blocks)), rel=1e-12)


def test_with_a_frozen_trunk_survival_is_conditioned_on_a_block_that_is_kept():
    model, blocks = vit(frozen_trunk=True)
    schedule = FeatureReuseSchedule(4, drop_rate=0.8, stochastic_depth_steps=1)
    rates = (0.2, 0.4, 0.6, 0.8)
    assert schedule.rates == pytest.approx(rates)
    reuse = FeatureReuse(model, blocks, schedule)
    plan = next(plan for plan in map(reuse.plan, range(0, 99, 2)) if plan.kind is DEPTH)
    assert plan.survival == pytest.approx([(1 - rate) / (1 - 0.2 * 0.4 * 0.6 * 0.8) for rate in rates])
    # A model of one block keeps it whenever the step is one of stochastic depth: nothing is divided.
    single = FeatureReuse(model, blocks[:1], FeatureReuseSchedule(1, drop_rate=0.3, stochastic_depth_steps=1))
    assert single.trunk_trains  # The other blocks are trunk, and train.
    for block in blocks[1:]:
        block.module.requires_grad_(False)
    single = FeatureReuse(model, blocks[:1], FeatureReuseSchedule(1, drop_rate=0.3, stochastic_depth_steps=1))
    plans = [single.plan(step) for step in range(0, 40, 2)]
    assert {plan.kind for plan in plans} == {DEPTH, VANILLA}
    assert {plan.survival for plan in plans if plan.kind is DEPTH} == {(1.0,)}


@pytest.mark.parametrize("frozen_trunk", [False, True])
@pytest.mark.parametrize("over_time", ["constant", "falling"])
@pytest.mark.parametrize("rates", RATES)
def test_over_many_cycles_every_block_counts_once_per_batch(rates, over_time, frozen_trunk):
    cycles, model_and_blocks = 2000, vit(frozen_trunk)
    schedule = FeatureReuseSchedule(
        4, **rates, stochastic_depth_steps=1, seed=3, drop_rate_over_time=over_time, last_step=2 * cycles
    )
    reuse = FeatureReuse(*model_and_blocks, schedule)
    plans = [reuse.plan(2 * cycle) for cycle in range(cycles)]
    steps = [plan for plan in plans if plan.kind is DEPTH]
    assert {plan.kind for plan in plans} <= {DEPTH, VANILLA}
    assert frozen_trunk or len(steps) == cycles
    # The variance of kept / survival is (1 - survival) / survival.
    variance = sum(1 / np.array(plan.survival) - 1 for plan in steps)
    means = sum(weight(plan, 4) for plan in steps) / len(steps)
    assert np.all(np.abs(means - 1) < 5 * np.sqrt(variance) / len(steps))


@pytest.mark.parametrize("frozen_trunk", [False, True])
@pytest.mark.parametrize("over_time", ["constant", "rising"])
def test_in_every_group_of_samples_every_block_counts_once(over_time, frozen_trunk):
    """Of 16 samples exactly as many drop a block as its rate says: no expectation is needed."""
    model, blocks = vit(frozen_trunk)
    options = {"drop_granularity": "sample", "drop_rate_over_time": over_time, "last_step": 60}
    reuse = FeatureReuse(model, blocks, FeatureReuseSchedule(4, drop_rate=0.7, seed=3, **options))
    for step in range(0, 60, 2):
        plan = reuse.plan(step, batch_size=48, position=16)
        assert plan.kind is DEPTH
        assert weight(plan, 4) == pytest.approx(np.ones(4), rel=1e-12)


def test_every_place_in_the_batch_counts_once_per_sample():
    schedule = FeatureReuseSchedule(3, drop_rate=0.6, drop_granularity="sample", stochastic_depth_steps=1)
    masks = np.stack([schedule.plan(2 * cycle, batch_size=16).sample_masks for cycle in range(2000)])
    survival = np.array(schedule.plan(0, batch_size=1).survival)
    errors = np.abs((~masks / survival).mean(0) - 1)
    assert np.all(errors < 5 * np.sqrt((1 / survival - 1) / len(masks)))


# An empty set, and everything dropped


def losses_and_gradients(model: nn.Module) -> list[torch.Tensor]:
    loss = model.train()(**batch()).loss
    loss.backward()
    return [loss.detach(), *[parameter.grad for parameter in model.parameters() if parameter.grad is not None]]


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_a_step_that_drops_nothing_scales_every_block(architecture):
    model, reference, plain = (build(architecture) for _ in range(3))
    reuse = engine(model, scale_kept=True, drop_rate=0.4, drop_rate_schedule="linear")
    cycle = next(cycle for cycle in range(99) if not reuse.plan(2 * cycle).dropped)
    with reuse.step(2 * cycle) as plan:
        found = losses_and_gradients(model)
    assert (plan.kind, plan.dropped) == (DEPTH, ())
    blocks = find_residual_blocks(reference)
    survival = [1 - 0.4 * (index + 1) / len(blocks) for index in range(len(blocks))]
    with skip_blocks([], kept=blocks, survival=survival):
        expected = losses_and_gradients(reference)
    whole = losses_and_gradients(plain)
    assert len(found) == len(expected) == len(whole)
    assert all(map(torch.equal, found, expected))
    assert abs(found[0] - whole[0]) > 1e-3
    # The masked-freeze step of the cycle would train no block: it is a plain step.
    model.zero_grad(set_to_none=True)
    with reuse.step(2 * cycle + 1) as plan:
        found = losses_and_gradients(model)
    assert plan == VANILLA_PLAN
    model.zero_grad(set_to_none=True)
    assert all(map(torch.equal, found, losses_and_gradients(model)))


def test_a_cycle_that_drops_everything_above_a_frozen_trunk_is_plain():
    model, blocks = vit(frozen_trunk=True)
    schedule = FeatureReuseSchedule(4, drop_rate=0.9, drop_rate_schedule="uniform", stochastic_depth_steps=1)
    reuse = FeatureReuse(model, blocks, schedule)
    step = next(step for step in range(0, 99, 2) if len(schedule.plan(step).dropped) == 4)
    for kind, number in ((DEPTH, step), (FREEZE, step + 1)):
        assert schedule.plan(number).kind is kind
        with reuse.step(number) as plan:
            found = losses_and_gradients(model)
        assert plan == VANILLA_PLAN
        model.zero_grad(set_to_none=True)
        assert all(map(torch.equal, found, losses_and_gradients(model)))
        model.zero_grad(set_to_none=True)


# Custom schedules


class Custom(FeatureReuseSchedule):
    """Drops one block after the other; says nothing of survival unless told to."""

    survival: tuple[float, ...] | None = None

    def plan(self, global_step: int, **samples) -> StepPlan:
        dropped = (global_step // 2 % self.num_blocks,)
        return StepPlan(FREEZE, dropped) if global_step % 2 else StepPlan(DEPTH, dropped, survival=self.survival)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(logger, "warning", found.append)
    return found


def test_plans_without_survival_are_not_scaled_and_that_is_reported_once(said):
    model, blocks = vit()
    reuse = FeatureReuse(model, blocks, Custom(4))
    for step in (0, 1, 2):
        with reuse.step(step) as plan:
            found = losses_and_gradients(model)
        model.zero_grad(set_to_none=True)
        if plan.kind is DEPTH:
            with skip_blocks([blocks[plan.dropped[0]]]):
                assert all(map(torch.equal, found, losses_and_gradients(model)))
            model.zero_grad(set_to_none=True)
    assert len(said) == 1
    assert all(word in said[0] for word in ("Custom", "`survival`", "`scale_kept=False`"))


@pytest.mark.parametrize("scale_kept", [True, False])
def test_plans_that_fill_survival_are_scaled_by_it_without_a_word(scale_kept, said):
    model, blocks = vit()
    schedule = Custom(4)
    schedule.survival = (0.9, 0.8, 0.7, 0.6)
    with FeatureReuse(model, blocks, schedule, scale_kept=scale_kept).step(2):
        found = losses_and_gradients(model)
    model.zero_grad(set_to_none=True)
    kept = {"kept": [blocks[0], *blocks[2:]], "survival": [0.9, 0.7, 0.6]} if scale_kept else {}
    with skip_blocks([blocks[1]], **kept):
        assert all(map(torch.equal, found, losses_and_gradients(model)))
    assert said == []


def test_no_warning_without_scaling(said):
    model, blocks = vit()
    with FeatureReuse(model, blocks, Custom(4), scale_kept=False).step(0):
        losses_and_gradients(model)
    assert said == []


class Rising(FeatureReuseSchedule):
    """A drop rate that rises in stages, as a user would write it: each stage is a schedule of the package."""

    def plan(self, global_step: int, **samples) -> StepPlan:
        rate = min(0.2 * (1 + global_step // 10), 0.8)
        return FeatureReuseSchedule(self.num_blocks, rate, seed=self.seed, stochastic_depth_steps=1).plan(global_step)


def test_a_custom_schedule_with_a_rising_rate_is_scaled_by_the_rate_of_the_step(said):
    model, blocks = vit()
    reuse = FeatureReuse(model, blocks, Rising(4, drop_rate=0.8, seed=1))
    for step, rate in ((0, 0.2), (18, 0.4), (36, 0.8)):
        with reuse.step(step) as plan:
            found = losses_and_gradients(model)
        model.zero_grad(set_to_none=True)
        kept = [index for index in range(4) if index not in plan.dropped]
        survival = [1 - rate * (index + 1) / 4 for index in kept]
        with skip_blocks(
            [blocks[index] for index in plan.dropped], kept=[blocks[index] for index in kept], survival=survival
        ):
            assert all(map(torch.equal, found, losses_and_gradients(model)))
        model.zero_grad(set_to_none=True)
    assert said == []


@pytest.mark.parametrize("survival", [(0.9,), (0.9,) * 5, (0.9, 0.0, 0.9, 0.9), (0.9, 1.1, 0.9, 0.9)])
def test_a_plan_whose_survival_does_not_fit_is_refused(survival):
    model, blocks = vit()
    schedule = Custom(4)
    schedule.survival = survival
    before = snapshot(model)
    reuse = FeatureReuse(model, blocks, schedule)
    with pytest.raises(ConfigurationError, match="`survival`"), reuse.step(4):
        raise AssertionError("entered")
    assert snapshot(model) == before
    assert reuse.current_plan is None
