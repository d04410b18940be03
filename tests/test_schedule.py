"""Rates, draws, kinds of step and the window of the schedule."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_featreuse import ConfigurationError, FeatureReuseSchedule, StepKind, StepPlan
from hf_featreuse.schedule import VANILLA_PLAN

VANILLA, DEPTH, FREEZE = StepKind.VANILLA, StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE


def drawn(schedule: FeatureReuseSchedule, cycles: int) -> list[tuple[int, ...]]:
    """The set D of the first cycles; empty where the cycle is vanilla."""
    first, length = schedule.first_step, schedule.steps_per_cycle
    return [schedule.plan(first + cycle * length).dropped for cycle in range(cycles)]


def kinds(schedule: FeatureReuseSchedule, steps: int) -> list[StepKind]:
    return [schedule.plan(step).kind for step in range(steps)]


# Rates


def test_linear_rates_rise_to_drop_rate_at_the_last_block():
    schedule = FeatureReuseSchedule(5, drop_rate=0.4, drop_rate_schedule="linear")
    assert schedule.rates == pytest.approx((0.08, 0.16, 0.24, 0.32, 0.4), abs=0, rel=1e-15)
    assert schedule.rates[-1] == 0.4


def test_uniform_rates_are_drop_rate_for_every_block():
    assert FeatureReuseSchedule(3, drop_rate=0.4, drop_rate_schedule="uniform").rates == (0.4, 0.4, 0.4)


def test_default_is_linear_one_to_one_from_the_first_step_without_end():
    schedule = FeatureReuseSchedule(4)
    assert schedule.rates == (0.125, 0.25, 0.375, 0.5)
    assert (schedule.stochastic_depth_steps, schedule.masked_freeze_steps) == (1, 1)
    assert (schedule.seed, schedule.first_step, schedule.last_step) == (0, 0, None)


def test_single_block_has_the_full_rate_in_both_schedules():
    for name in ("linear", "uniform"):
        assert FeatureReuseSchedule(1, drop_rate=0.3, drop_rate_schedule=name).rates == (0.3,)


# The drawn stream. These sets are part of the interface: a run that is resumed with a later version must see the same.


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, [(0, 1, 2, 5), (0, 1, 5, 6), (2, 5, 7), (0, 1, 3, 5, 7), (0, 5), (0, 1, 6)]),
        (
            7,
            [
                (1, 2, 3, 4, 6),
                (2, 4, 6, 7),
                (1, 3, 7),
                (0, 1, 3, 4, 5, 6),
                (0, 1, 2, 3, 5, 6, 7),
                (0, 1, 4, 6, 7),
            ],
        ),
    ],
)
def test_uniform_draws_are_pinned(seed, expected):
    schedule = FeatureReuseSchedule(8, drop_rate=0.5, drop_rate_schedule="uniform", seed=seed)
    assert drawn(schedule, 6) == expected


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, [(0, 2, 8, 9, 11), (9,), (8, 11), (5, 8, 11), (5, 8, 9, 11), (8, 9)]),
        (7, [(4, 8), (2, 7), (3, 7, 10), (5, 6, 10), (7, 10, 11), (6, 7, 11)]),
    ],
)
def test_linear_draws_are_pinned(seed, expected):
    assert drawn(FeatureReuseSchedule(12, drop_rate=0.5, seed=seed), 6) == expected


def test_draws_of_the_largest_seed_and_of_a_late_cycle_are_pinned():
    schedule = FeatureReuseSchedule(6, drop_rate=0.5, seed=2**64 - 1)
    assert [schedule.plan(step).dropped for step in (0, 2, 4, 2_000_000)] == [(4,), (4, 5), (), (2,)]


def philox_4x64_words(seed: int, cycle: int) -> list[int]:
    """The first four words of the cycle's stream, from the algorithm as published (Salmon et al. 2011)."""
    mask = 2**64 - 1
    # numpy counts up before it generates.
    c0, c1, c2, c3, k0, k1 = 1, cycle, 0, 0, seed, 0
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (product1 >> 64) ^ c1 ^ k0, product1 & mask, (product0 >> 64) ^ c3 ^ k1, product0 & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**64 - 1])
def test_draws_follow_the_published_generator(seed):
    schedule = FeatureReuseSchedule(4, drop_rate=0.6, seed=seed)
    expected = [
        tuple(
            block
            for block, word in enumerate(philox_4x64_words(seed, cycle))
            if Fraction(word >> 11, 2**53) < Fraction(schedule.rates[block])
        )
        for cycle in range(40)
    ]
    assert drawn(schedule, 40) == expected


def test_draw_does_not_depend_on_the_number_of_blocks_drawn_with_it():
    few = FeatureReuseSchedule(5, drop_rate=0.5, drop_rate_schedule="uniform", seed=3)
    many = FeatureReuseSchedule(9, drop_rate=0.5, drop_rate_schedule="uniform", seed=3)
    assert drawn(few, 50) == [tuple(block for block in dropped if block < 5) for dropped in drawn(many, 50)]


def test_different_seeds_draw_differently():
    sets = [drawn(FeatureReuseSchedule(12, seed=seed), 20) for seed in range(10)]
    assert all(a != b for a, b in itertools.combinations(sets, 2))


def test_plan_leaves_global_random_states_alone_and_ignores_them():
    schedule = FeatureReuseSchedule(8, drop_rate=0.5, seed=3)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    plans = [schedule.plan(step) for step in range(40)]
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1][0] == after[1][0]
    assert np.array_equal(before[1][1], after[1][1])
    assert before[1][2:] == after[1][2:]
    assert before[2] == after[2]
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    assert [schedule.plan(step) for step in range(40)] == plans


def test_plan_is_a_function_of_the_step_alone():
    schedule, other = FeatureReuseSchedule(8, seed=5), FeatureReuseSchedule(8, seed=5)
    in_order = [schedule.plan(step) for step in range(60)]
    backwards = [other.plan(step) for step in reversed(range(60))]
    assert in_order == backwards[::-1]


def test_plans_of_one_cycle_are_drawn_once_for_both_kinds():
    schedule = FeatureReuseSchedule(10, drop_rate=0.5, seed=1, stochastic_depth_steps=2, masked_freeze_steps=3)
    for cycle in range(30):
        sets = {schedule.plan(5 * cycle + step).dropped for step in range(5)}
        assert len(sets) == 1, f"cycle {cycle} drew more than one set"
    assert len(set(drawn(schedule, 30))) > 20


@pytest.mark.slow
@pytest.mark.parametrize("rate_schedule", ["linear", "uniform"])
def test_rates_are_exact_and_blocks_independent(rate_schedule):
    cycles, blocks = 20_000, 6
    schedule = FeatureReuseSchedule(blocks, drop_rate=0.4, drop_rate_schedule=rate_schedule, seed=11)
    hits = np.zeros((cycles, blocks))
    for cycle, dropped in enumerate(drawn(schedule, cycles)):
        hits[cycle, list(dropped)] = 1
    rates = np.array(schedule.rates)
    sigma = np.sqrt(rates * (1 - rates) / cycles)
    assert np.all(np.abs(hits.mean(0) - rates) < 5 * sigma)
    for i, j in itertools.combinations(range(blocks), 2):
        both = rates[i] * rates[j]
        assert abs((hits[:, i] * hits[:, j]).mean() - both) < 5 * math.sqrt(both * (1 - both) / cycles), (i, j)
    # Nor does a cycle say anything about the next one.
    for block, rate in enumerate(rates):
        both = rate**2
        found = (hits[1:, block] * hits[:-1, block]).mean()
        assert abs(found - both) < 5 * 2 * math.sqrt(both * (1 - both) / cycles)


def test_very_small_and_very_large_rates_are_honoured():
    rare = FeatureReuseSchedule(4, drop_rate=1e-9, drop_rate_schedule="uniform")
    assert set(drawn(rare, 500)) == {()}
    frequent = FeatureReuseSchedule(4, drop_rate=1 - 1e-9, drop_rate_schedule="uniform")
    assert set(drawn(frequent, 500)) == {(0, 1, 2, 3)}


# Kinds


@pytest.mark.parametrize(
    ("depth_steps", "freeze_steps", "expected"),
    [
        (1, 1, [DEPTH, FREEZE] * 6),
        (2, 1, [DEPTH, DEPTH, FREEZE] * 4),
        (1, 3, [DEPTH, FREEZE, FREEZE, FREEZE] * 3),
        (3, 2, ([DEPTH] * 3 + [FREEZE] * 2) * 3),
        (1, 0, [DEPTH] * 12),
        (0, 1, [FREEZE] * 12),
        (0, 4, [FREEZE] * 12),
        (0, 0, [VANILLA] * 12),
    ],
)
def test_kinds_of_a_cycle(depth_steps, freeze_steps, expected):
    schedule = FeatureReuseSchedule(
        16,
        drop_rate=0.9,
        drop_rate_schedule="uniform",
        stochastic_depth_steps=depth_steps,
        masked_freeze_steps=freeze_steps,
    )
    assert kinds(schedule, len(expected)) == expected
    assert schedule.steps_per_cycle == depth_steps + freeze_steps


@pytest.mark.parametrize(("depth_steps", "freeze_steps"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_freeze_steps_train_what_the_depth_steps_of_their_cycle_dropped(depth_steps, freeze_steps):
    schedule = FeatureReuseSchedule(
        8, drop_rate=0.5, seed=2, stochastic_depth_steps=depth_steps, masked_freeze_steps=freeze_steps
    )
    length = depth_steps + freeze_steps
    for cycle in range(30):
        plans = [schedule.plan(cycle * length + step) for step in range(length)]
        dropped = {plan.dropped for plan in plans if plan.kind is DEPTH}
        trained = {plan.dropped for plan in plans if plan.kind is FREEZE}
        assert dropped == trained


def test_depth_alone_draws_a_set_a_step():
    schedule = FeatureReuseSchedule(8, drop_rate=0.5, seed=2, masked_freeze_steps=0)
    assert len({schedule.plan(step).dropped for step in range(10)}) > 5


def test_without_steps_of_either_kind_everything_is_vanilla_and_no_block_is_needed():
    schedule = FeatureReuseSchedule(0, stochastic_depth_steps=0, masked_freeze_steps=0)
    assert schedule.rates == ()
    assert [schedule.plan(step) for step in range(5)] == [StepPlan(VANILLA, ())] * 5


def test_cycle_with_an_empty_set_is_vanilla_throughout():
    schedule = FeatureReuseSchedule(2, drop_rate=0.3, seed=0, stochastic_depth_steps=2, masked_freeze_steps=2)
    cycles = [[schedule.plan(4 * cycle + step) for step in range(4)] for cycle in range(50)]
    empty = [plans for plans in cycles if any(not plan.dropped for plan in plans)]
    assert 10 < len(empty) < 50
    assert all(plan == VANILLA_PLAN for plans in empty for plan in plans)
    assert all(plan.kind is not VANILLA for plans in cycles if plans not in empty for plan in plans)


def test_set_of_all_blocks_occurs():
    schedule = FeatureReuseSchedule(3, drop_rate=0.6, drop_rate_schedule="uniform")
    assert (0, 1, 2) in drawn(schedule, 50)


def test_dropped_holds_plain_ints_in_rising_order():
    schedule = FeatureReuseSchedule(12, drop_rate=0.5, seed=4)
    for dropped in drawn(schedule, 50):
        assert list(dropped) == sorted(set(dropped))
        assert all(type(block) is int for block in dropped)


# The window


def test_steps_outside_the_window_are_vanilla_and_its_ends_are_inside():
    schedule = FeatureReuseSchedule(32, drop_rate=0.9, drop_rate_schedule="uniform", first_step=3, last_step=6)
    assert kinds(schedule, 10) == [VANILLA] * 3 + [DEPTH, FREEZE, DEPTH, FREEZE] + [VANILLA] * 3


def test_window_may_end_within_a_cycle():
    schedule = FeatureReuseSchedule(32, drop_rate=0.9, drop_rate_schedule="uniform", last_step=2)
    assert kinds(schedule, 5) == [DEPTH, FREEZE, DEPTH, VANILLA, VANILLA]


@pytest.mark.parametrize("first_step", [1, 2, 7, 100])
def test_cycles_are_counted_from_the_first_step(first_step):
    plain, shifted = FeatureReuseSchedule(6, seed=9), FeatureReuseSchedule(6, seed=9, first_step=first_step)
    assert [shifted.plan(first_step + step) for step in range(30)] == [plain.plan(step) for step in range(30)]
    assert all(shifted.plan(step) == VANILLA_PLAN for step in range(first_step))


# Bad values


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("drop_rate", value) for value in (0, 0.0, 1, 1.0, -0.1, 1.5, math.nan, math.inf, True, "0.5", None)),
        *(("drop_rate_schedule", value) for value in ("cosine", "Linear", None, 1)),
        *(
            (option, value)
            for option in ("stochastic_depth_steps", "masked_freeze_steps")
            for value in (-1, 0.5, 1.0, True, "1", None)
        ),
        *(("seed", value) for value in (-1, 2**64, 0.0, True, None)),
        *(("first_step", value) for value in (-1, 1.5, False)),
        *(("last_step", value) for value in (-1, 1.5, True)),
        *(("num_blocks", value) for value in (-1, 0, 2.0, True)),
    ],
)
def test_bad_value_is_named(option, value):
    with pytest.raises(ConfigurationError) as caught:
        FeatureReuseSchedule(**{"num_blocks": 4, option: value})
    assert isinstance(caught.value, ValueError)
    assert f"`{option}={value!r}`" in str(caught.value)


@pytest.mark.parametrize(("depth_steps", "freeze_steps"), [(1, 0), (0, 1), (1, 1)])
def test_no_block_with_steps_to_take_is_refused(depth_steps, freeze_steps):
    with pytest.raises(ConfigurationError, match="num_blocks=0"):
        FeatureReuseSchedule(0, stochastic_depth_steps=depth_steps, masked_freeze_steps=freeze_steps)


def test_numpy_integers_are_whole_numbers():
    schedule = FeatureReuseSchedule(np.int64(4), seed=np.int64(7), first_step=np.int32(2))
    assert schedule.plan(np.int64(2)) == FeatureReuseSchedule(4, seed=7).plan(0)


def test_largest_seed_is_taken():
    assert FeatureReuseSchedule(4, seed=2**64 - 1).seed == 2**64 - 1


def test_plan_cannot_be_changed():
    plan = FeatureReuseSchedule(4).plan(0)
    with pytest.raises(AttributeError):
        plan.dropped = ()


def test_repr_names_every_argument():
    text = repr(FeatureReuseSchedule(4, drop_rate=0.3, seed=5, first_step=1, last_step=9))
    assert text == (
        "FeatureReuseSchedule(num_blocks=4, drop_rate=0.3, drop_rate_schedule='linear', stochastic_depth_steps=1, "
        "masked_freeze_steps=1, seed=5, first_step=1, last_step=9, drop_granularity='batch')"
    )


# Sets drawn by sample


def by_sample(num_blocks: int = 5, **changed) -> FeatureReuseSchedule:
    return FeatureReuseSchedule(num_blocks, **{"seed": 7, "drop_granularity": "sample", **changed})


def test_sets_of_samples_are_pinned():
    # These follow from Philox 4x64 alone; a change here would change every run.
    masks = by_sample(drop_rate_schedule="uniform").plan(2, batch_size=3, position=1).sample_masks
    assert masks.astype(int).tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 0], [1, 1, 1, 1, 0]]


def test_both_kinds_of_step_of_a_cycle_have_the_same_sets():
    schedule = by_sample(stochastic_depth_steps=2, masked_freeze_steps=1)
    plans = [schedule.plan(step, batch_size=16) for step in range(6)]
    assert [plan.kind.value for plan in plans] == (["stochastic_depth"] * 2 + ["masked_freeze"]) * 2
    masks = [plan.sample_masks for plan in plans]
    assert all(np.array_equal(masks[0], masks[step]) for step in (1, 2))
    assert not np.array_equal(masks[0], masks[3])
    assert plans[0] != plans[2]
    assert plans[0] == plans[1]
    assert hash(plans[0]) == hash(plans[1])


@pytest.mark.parametrize("num_blocks", [1, 3, 4, 5, 12])
def test_sets_follow_from_the_position_alone(num_blocks: int):
    schedule = by_sample(num_blocks)
    whole = schedule.plan(4, batch_size=20).sample_masks
    for size in (1, 3, 7, 20):
        parts = [
            schedule.plan(4, batch_size=min(size, 20 - first), position=first).sample_masks
            for first in range(0, 20, size)
        ]
        assert np.array_equal(np.concatenate(parts), whole)


def test_sets_of_samples_have_the_rates_and_are_independent():
    schedule = by_sample(6, drop_rate=0.6)
    masks = np.concatenate([schedule.plan(2 * cycle, batch_size=512).sample_masks for cycle in range(40)])
    assert masks.mean(0) == pytest.approx(schedule.rates, abs=0.015)
    assert np.abs(np.corrcoef(masks.T) - np.eye(6)).max() < 0.03
    # Neighbouring samples too.
    assert abs(np.corrcoef(masks[:-1, 5], masks[1:, 5])[0, 1]) < 0.03
    assert schedule.plan(0, batch_size=512).mean_dropped == pytest.approx(sum(schedule.rates), rel=0.05)


def test_sets_of_samples_have_nothing_to_do_with_those_of_batches():
    per_sample, shared = (
        by_sample(64, drop_rate_schedule="uniform"),
        FeatureReuseSchedule(64, seed=7, drop_rate_schedule="uniform"),
    )
    for step in (0, 2, 4):
        first = per_sample.plan(step, batch_size=1).sample_masks[0]
        assert tuple(np.flatnonzero(first)) != shared.plan(step).dropped


def test_steps_outside_the_window_need_no_number_of_samples():
    assert by_sample(first_step=3).plan(2).kind is StepKind.VANILLA
    assert by_sample(stochastic_depth_steps=0, masked_freeze_steps=0).plan(0).kind is StepKind.VANILLA


@pytest.mark.parametrize(
    "given", [{}, {"batch_size": -1}, {"batch_size": 2.0}, {"batch_size": 2, "position": -1}, {"batch_size": True}]
)
def test_the_number_of_samples_is_checked(given: dict):
    with pytest.raises(ConfigurationError, match=r"batch_size|position"):
        by_sample().plan(0, **given)


def test_unknown_granularity():
    with pytest.raises(ConfigurationError, match="drop_granularity='block'"):
        FeatureReuseSchedule(3, drop_granularity="block")
