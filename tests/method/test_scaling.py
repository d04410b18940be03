"""Kept blocks in stochastic-depth steps are divided by their survival probability, in every architecture."""

import dataclasses

import numpy as np
import pytest
import tiny_models
import torch
from architecture_checks import each, objective
from sample_checks import assert_same_gradients, gradients
from scaling_reference import drop_path_around
from tiny_architectures import SKIPPABLE, WITH_BLOCKS, Architecture
from torch import nn

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, StepKind, StepPlan, find_residual_blocks

SAMPLES = 4


class Planned(FeatureReuseSchedule):
    """One plan for every step."""

    def __init__(self, num_blocks: int, plan: StepPlan, granularity: str = "batch") -> None:
        super().__init__(num_blocks, drop_granularity=granularity)
        self.given = plan

    def plan(self, global_step, **samples):
        return self.given


def reuse_with(case: Architecture, model: nn.Module, plan: StepPlan, granularity: str = "batch") -> FeatureReuse:
    blocks = find_residual_blocks(model, case.batch())
    schedule = Planned(len(blocks), plan, granularity)
    return FeatureReuse(model, blocks, schedule, allow_inexact_skip=True)


def survival_of(count: int) -> tuple[float, ...]:
    """A different probability for each block; 1 for the first."""
    return tuple(1 - 0.6 * index / count for index in range(count))


def assert_step_is(case: Architecture, plan: StepPlan, masks: np.ndarray, granularity: str) -> None:
    """A step of the package against the reference: logits, loss, gradients, and what is left behind."""
    model, case = case.build().double(), in_double(case)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # The reference computes more, and would draw other numbers after it.
    reuse = reuse_with(case, model, plan, granularity)
    before = tiny_models.snapshot(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with drop_path_around(reuse.blocks, masks, plan.survival, case.branch):
        expected_logits, loss = objective(case, model)
        loss.backward()
    expected = gradients(model)
    model.load_state_dict(state)
    with reuse.step(0, batch_size=SAMPLES):
        logits, loss = objective(case, model)
        loss.backward()
    torch.testing.assert_close(logits, expected_logits, rtol=1e-9, atol=1e-9)
    assert_same_gradients(gradients(model), expected)
    assert tiny_models.snapshot(model) == before


def in_double(case: Architecture) -> Architecture:
    """The case with inputs in double precision, in which rounding cannot hide a wrong formula."""

    def make_batch(size, side, generator):
        batch = case.make_batch(size, side, generator)
        return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}

    return dataclasses.replace(case, make_batch=make_batch)


@each(WITH_BLOCKS)
def test_a_step_is_drop_path_around_the_blocks(case):
    count = len(case.blocks)
    # A dropped block whose shortcut is inexact is left out with its activation, which drop path would keep.
    dropped = tuple(range(1, count, 2)) if case.exact else ()
    plan = StepPlan(StepKind.STOCHASTIC_DEPTH, dropped, survival=survival_of(count))
    # One row for all samples: not every stream has the batch first.
    masks = np.zeros((1, count), dtype=bool)
    masks[:, list(dropped)] = True
    assert_step_is(case, plan, masks, "batch")


@each(SKIPPABLE)
def test_a_step_with_sets_per_sample_is_drop_path_around_the_blocks(case):
    count = len(case.blocks)
    masks = np.random.default_rng(0).random((SAMPLES, count)) < 0.5
    masks[0], masks[1] = True, False
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in case.build().modules()):
        pytest.skip("BatchNorm computes the samples of a batch together")
    plan = StepPlan(StepKind.STOCHASTIC_DEPTH, sample_masks=masks, survival=survival_of(count))
    assert_step_is(case, plan, masks, "sample")
