"""Means by kind of step between two logs."""

import math

import pytest
import torch

from hf_featreuse import StepKind, StepPlan
from hf_featreuse.trainer.step_log import StepLog

PLAIN = StepPlan(StepKind.VANILLA)
DEPTH = StepPlan(StepKind.STOCHASTIC_DEPTH, (0, 2, 3))
FREEZE = StepPlan(StepKind.MASKED_FREEZE, (0, 2, 3))


def made(**options: bool) -> StepLog:
    return StepLog(torch.device("cpu"), **options)


def here(values: torch.Tensor) -> torch.Tensor:
    """The mean over one rank."""
    return values


def test_means_are_by_kind_and_absent_kinds_are_left_out():
    log = made()
    log.add(0, DEPTH, 0.5, torch.tensor(2.0))
    log.add(1, FREEZE, 0.75, torch.tensor(4.0))
    log.add(2, DEPTH, 0.5, torch.tensor(3.0))
    logs = log.drain(here)
    assert logs == {
        "loss/stochastic_depth": 2.5,
        "loss/masked_freeze": 4.0,
        "dropped_blocks": 3.0,
        "compute_share": pytest.approx(1.75 / 3),
    }


@pytest.mark.parametrize("plan", [PLAIN, DEPTH, FREEZE])
def test_one_kind_alone(plan):
    log = made()
    log.add(0, plan, 0.5, torch.tensor(2.0))
    assert log.drain(here) == {
        f"loss/{plan.kind.value}": 2.0,
        "dropped_blocks": float(len(plan.dropped)),
        "compute_share": 0.5,
    }


def test_micro_batches_add_up_to_one_step():
    """Trainer divides each loss by the number of micro-batches, so their sum is the step's loss."""
    log = made()
    for loss in (1.0, 2.0, 3.0, 4.0):
        log.add(7, DEPTH, 0.5, torch.tensor(loss / 4))
    for loss in (5.0, 5.0, 5.0, 5.0):
        log.add(8, PLAIN, 1.0, torch.tensor(loss / 4))
    assert log.drain(here) == {
        "loss/vanilla": 5.0,
        "loss/stochastic_depth": 2.5,
        "dropped_blocks": 1.5,
        "compute_share": 0.75,
    }


def test_steps_of_one_kind_in_a_row_are_counted_each():
    log = made()
    for step in range(4):
        log.add(step, FREEZE, 0.5, torch.tensor(float(step)))
    assert log.drain(here)["loss/masked_freeze"] == 1.5


def test_values_are_plain_floats():
    log = made()
    log.add(0, DEPTH, 0.5, torch.tensor(2.0))
    assert {type(value) for value in log.drain(here).values()} == {float}


def test_drain_starts_anew():
    log = made()
    assert log.drain(here) == {}
    log.add(0, DEPTH, 0.5, torch.tensor(2.0))
    assert log.drain(here)
    assert log.drain(here) == {}
    log.add(1, PLAIN, 1.0, torch.tensor(5.0))
    assert log.drain(here) == {"loss/vanilla": 5.0, "dropped_blocks": 0.0, "compute_share": 1.0}


def test_loss_that_is_added_is_not_changed():
    log = made()
    loss = torch.tensor(2.0)
    log.add(0, DEPTH, 0.5, loss)
    log.add(1, DEPTH, 0.5, loss)
    assert loss == 2.0
    assert log.drain(here)["loss/stochastic_depth"] == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_losses_of_any_floating_type_are_taken(dtype):
    log = made()
    log.add(0, DEPTH, 0.5, torch.tensor(2.5, dtype=dtype))
    assert log.drain(here)["loss/stochastic_depth"] == 2.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_kept_by_default(bad):
    log = made()
    log.add(0, DEPTH, 0.5, torch.tensor(2.0))
    log.add(1, DEPTH, 0.5, torch.tensor(bad))
    log.add(2, FREEZE, 0.5, torch.tensor(1.0))
    logs = log.drain(here)
    assert not math.isfinite(logs["loss/stochastic_depth"])
    assert logs["loss/masked_freeze"] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_can_be_left_out(bad):
    log = made(skip_non_finite=True)
    log.add(0, DEPTH, 0.5, torch.tensor(2.0))
    log.add(1, FREEZE, 0.5, torch.tensor(bad))
    log.add(2, DEPTH, 0.5, torch.tensor(bad))
    log.add(3, FREEZE, 0.5, torch.tensor(1.0))
    logs = log.drain(here)
    # As Trainer does: the sum so far divided by the number of steps, this one included, stands in for the loss.
    assert logs["loss/stochastic_depth"] == (2.0 + 2.0 / 2) / 2
    assert logs["loss/masked_freeze"] == (0.0 + 1.0) / 2
    log.add(4, DEPTH, 0.5, torch.tensor(3.0))
    assert log.drain(here)["loss/stochastic_depth"] == 3.0


def test_mean_over_ranks_is_asked_once_a_log_with_the_losses_of_all_kinds():
    """Ranks agree on the plans, so the shape is that of all kinds on every one."""
    log, asked = made(), []

    def mean(values: torch.Tensor) -> torch.Tensor:
        asked.append(values.clone())
        return values + 1

    log.add(0, DEPTH, 0.5, torch.tensor(2.0))
    log.add(1, DEPTH, 0.5, torch.tensor(4.0))
    assert log.drain(mean)["loss/stochastic_depth"] == 3.5
    assert [tuple(values.shape) for values in asked] == [(4,)]
    assert asked[0].sum() == 6.0


def test_losses_that_are_not_finite_are_counted_since_the_last_log():
    log = made()
    log.add(0, PLAIN, 1.0, torch.tensor(math.nan))
    log.drain(here)
    assert log.not_finite == 1
    log.add(1, PLAIN, 1.0, torch.tensor(1.0))
    log.drain(here)
    assert log.not_finite == 0
