"""What the steps of a cycle are: their kinds and order, empty sets, and rates that change over time."""

import itertools

import numpy as np
import pytest

from hf_featreuse import ConfigurationError, FeatureReuseArguments, FeatureReuseSchedule, StepKind, StepPlan
from hf_featreuse.method.schedule import VANILLA_PLAN

VANILLA, DEPTH, FREEZE = StepKind.VANILLA, StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE
# Sets that are never empty in the cycles looked at.
NEVER_EMPTY = {"num_blocks": 16, "drop_rate": 0.9, "drop_rate_schedule": "uniform"}


def kinds(schedule: FeatureReuseSchedule, steps: int) -> list[StepKind]:
    return [schedule.plan(step, batch_size=16).kind for step in range(steps)]


# Kinds


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize(
    ("steps", "cycle"),
    [
        ((0, 1, 1), [DEPTH, FREEZE]),
        ((0, 2, 1), [DEPTH, DEPTH, FREEZE]),
        ((0, 1, 3), [DEPTH, FREEZE, FREEZE, FREEZE]),
        ((0, 3, 2), [DEPTH] * 3 + [FREEZE] * 2),
        ((0, 1, 0), [DEPTH]),
        ((0, 0, 1), [FREEZE]),
        ((0, 0, 4), [FREEZE] * 4),
        ((0, 0, 0), [VANILLA]),
        ((1, 1, 1), [VANILLA, DEPTH, FREEZE]),
        ((2, 1, 1), [VANILLA, VANILLA, DEPTH, FREEZE]),
        ((1, 2, 3), [VANILLA, *[DEPTH] * 2, *[FREEZE] * 3]),
        ((1, 1, 0), [VANILLA, DEPTH]),
        ((1, 0, 1), [VANILLA, FREEZE]),
        ((3, 0, 0), [VANILLA]),
    ],
)
def test_kinds_of_a_cycle(steps, cycle, granularity):
    names = ("vanilla_steps", "stochastic_depth_steps", "masked_freeze_steps")
    schedule = FeatureReuseSchedule(
        **NEVER_EMPTY, drop_granularity=granularity, **dict(zip(names, steps, strict=True))
    )
    assert kinds(schedule, 4 * len(cycle)) == 4 * cycle
    assert schedule.steps_per_cycle == sum(steps)
    assert schedule.alternates == (set(cycle) != {VANILLA})


def test_plain_steps_of_a_cycle_drop_and_scale_nothing():
    schedule = FeatureReuseSchedule(**NEVER_EMPTY, vanilla_steps=2, stochastic_depth_steps=1)
    assert [schedule.plan(step) for step in (0, 1, 4, 5)] == [VANILLA_PLAN] * 4


def test_plain_steps_do_not_change_the_sets_of_the_cycles():
    without, with_plain = (
        FeatureReuseSchedule(12, seed=3, stochastic_depth_steps=1),
        FeatureReuseSchedule(12, seed=3, vanilla_steps=3, stochastic_depth_steps=1),
    )
    for cycle in range(20):
        for step in range(2):
            assert with_plain.plan(5 * cycle + 3 + step) == without.plan(2 * cycle + step)


@pytest.mark.parametrize(("depth_steps", "freeze_steps"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_freeze_steps_train_what_the_depth_steps_of_their_cycle_dropped(depth_steps, freeze_steps):
    schedule = FeatureReuseSchedule(
        8, drop_rate=0.5, seed=2, stochastic_depth_steps=depth_steps, masked_freeze_steps=freeze_steps
    )
    length = depth_steps + freeze_steps
    seen = set()
    for cycle in range(30):
        plans = [schedule.plan(cycle * length + step) for step in range(length)]
        (dropped,) = {plan.dropped for plan in plans[:depth_steps]}
        (trained,) = {(plan.kind, plan.dropped) for plan in plans[depth_steps:]}
        assert trained == ((FREEZE, dropped) if dropped else (VANILLA, ()))
        seen.add(bool(dropped))
    assert seen == {True, False}


def test_depth_alone_draws_a_set_per_step():
    schedules = [
        FeatureReuseSchedule(8, seed=2, masked_freeze_steps=0, stochastic_depth_steps=steps) for steps in (1, 3)
    ]
    one, three = ([schedule.plan(step) for step in range(10)] for schedule in schedules)
    assert one == three
    assert len({plan.dropped for plan in one}) > 5
    assert schedules[1].steps_per_cycle == 1


# Survival


def test_only_stochastic_depth_steps_have_survival_probabilities():
    for granularity in ("batch", "sample"):
        schedule = FeatureReuseSchedule(4, drop_granularity=granularity, vanilla_steps=1, stochastic_depth_steps=1)
        plans = [schedule.plan(step, batch_size=16) for step in range(3)]
        assert [plan.kind for plan in plans] == [VANILLA, DEPTH, FREEZE]
        assert [plan.survival for plan in plans] == [None, tuple(1 - rate for rate in schedule.rates), None]


def test_plans_that_differ_in_survival_differ():
    first, second = StepPlan(DEPTH, (0,), survival=(0.5, 0.5)), StepPlan(DEPTH, (0,), survival=(0.5, 0.25))
    assert first == StepPlan(DEPTH, (0,), survival=(0.5, 0.5)) != second != StepPlan(DEPTH, (0,))
    assert len({first, second, StepPlan(DEPTH, (0,))}) == 3


# An empty set


def test_depth_steps_of_an_empty_set_stay_and_its_freeze_steps_are_vanilla():
    schedule = FeatureReuseSchedule(2, drop_rate=0.3, seed=0, stochastic_depth_steps=2, masked_freeze_steps=2)
    cycles = [[schedule.plan(4 * cycle + step) for step in range(4)] for cycle in range(50)]
    survival = tuple(1 - rate for rate in schedule.rates)
    empty = [plans for plans in cycles if not plans[0].dropped]
    assert 10 < len(empty) < 50
    for plans in empty:
        assert plans == [StepPlan(DEPTH, (), survival=survival)] * 2 + [VANILLA_PLAN] * 2
    for plans in cycles:
        if plans not in empty:
            assert [plan.kind for plan in plans] == [DEPTH, DEPTH, FREEZE, FREEZE]


def test_a_cycle_of_freeze_steps_alone_with_an_empty_set_is_vanilla():
    schedule = FeatureReuseSchedule(2, drop_rate=0.3, seed=0, stochastic_depth_steps=0)
    plans = [schedule.plan(step) for step in range(50)]
    assert {plan.kind for plan in plans} == {VANILLA, FREEZE}
    assert all((plan.kind is FREEZE) == bool(plan.dropped) for plan in plans)


def test_sets_per_sample_of_which_all_are_empty_keep_their_kind():
    schedule = FeatureReuseSchedule(1, drop_rate=1e-9, drop_granularity="sample", stochastic_depth_steps=1)
    kept = [position for position in range(16) if not schedule.plan(0, batch_size=1, position=position).mean_dropped]
    assert len(kept) == 15
    assert [schedule.plan(step, batch_size=1, position=kept[0]).kind for step in (0, 1)] == [DEPTH, FREEZE]


# Plain training


@pytest.mark.parametrize("plain", [{"drop_rate": 0}, {"stochastic_depth_steps": 0, "masked_freeze_steps": 0}])
@pytest.mark.parametrize("num_blocks", [0, 3])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_rate_of_zero_and_no_steps_are_plain_training(plain, num_blocks, granularity):
    schedule = FeatureReuseSchedule(num_blocks, vanilla_steps=1, drop_granularity=granularity, **plain)
    assert not schedule.alternates
    assert len(schedule.rates) == num_blocks
    # It needs no number of samples either.
    assert [schedule.plan(step) for step in range(6)] == [VANILLA_PLAN] * 6
    assert not FeatureReuseArguments(drop_granularity=granularity, **plain).alternates


# Rates over time


def over_time(name: str, **changed) -> FeatureReuseSchedule:
    options = {"num_blocks": 4, "drop_rate": 0.6, "first_step": 10, "last_step": 110, "seed": 2, **changed}
    return FeatureReuseSchedule(drop_rate_over_time=name, **{"stochastic_depth_steps": 1, **options})


def fractions(schedule: FeatureReuseSchedule, steps: range) -> list[float]:
    """The rate of the last block at some steps as a fraction of the drop rate, read off the survival probability."""
    plans = [schedule.plan(step, batch_size=1) for step in steps]
    return [(1 - plan.survival[-1]) / schedule.drop_rate for plan in plans]


def test_rates_fall_or_rise_linearly_within_the_window():
    starts = range(10, 111, 2)
    expected = [(step - 10) / 100 for step in starts]
    assert fractions(over_time("rising"), starts) == pytest.approx(expected)
    assert fractions(over_time("falling"), starts) == pytest.approx([1 - fraction for fraction in expected])
    assert fractions(over_time("constant"), starts) == pytest.approx([1.0] * 51)
    for name, (first, last) in {"rising": (0.0, 0.6), "falling": (0.6, 0.0)}.items():
        assert over_time(name).rates_at(10)[-1] == first
        assert over_time(name).rates_at(110)[-1] == last
        assert over_time(name).rates == over_time("constant").rates
        assert [over_time(name).plan(step) for step in (9, 111)] == [VANILLA_PLAN] * 2


@pytest.mark.parametrize("schedule", ["linear", "uniform"])
def test_over_time_the_rates_of_all_blocks_keep_their_ratio(schedule):
    falling = over_time("falling", drop_rate_schedule=schedule)
    for step in range(10, 110, 8):
        fraction = 1 - (step - 10) / 100
        assert falling.rates_at(step) == pytest.approx([rate * fraction for rate in falling.rates])
        assert falling.plan(step).survival == tuple(1 - rate for rate in falling.rates_at(step))


@pytest.mark.parametrize("name", ["falling", "rising"])
def test_all_steps_of_a_cycle_have_the_rates_of_its_first(name):
    schedule = over_time(name, vanilla_steps=1, stochastic_depth_steps=3, masked_freeze_steps=1)
    for cycle in range(20):
        first = 10 + 5 * cycle
        assert {schedule.rates_at(step) for step in range(first, first + 5)} == {schedule.rates_at(first)}
        plans = [schedule.plan(step) for step in range(first, first + 5)]
        assert len(set(plans[1:4])) == 1
        assert plans[1].survival == tuple(1 - rate for rate in schedule.rates_at(first))
        assert plans[4].dropped == plans[1].dropped
    assert len({schedule.rates_at(10 + 5 * cycle) for cycle in range(20)}) == 20


def test_what_is_drawn_follows_the_rates_of_the_cycle():
    """The draws are those of constant rates with another threshold: a falling rate drops a subset of them."""
    constant, falling = (over_time(name, num_blocks=32, last_step=2010) for name in ("constant", "falling"))
    counts = []
    for step in range(10, 2010, 2):
        assert set(falling.plan(step).dropped) <= set(constant.plan(step).dropped)
        counts.append(len(falling.plan(step).dropped))
    expected = [sum(falling.rates_at(step)) for step in range(10, 2010, 2)]
    for quarter in range(4):
        part = slice(250 * quarter, 250 * (quarter + 1))
        # Five standard errors; the variance of a count is at most its mean.
        assert abs(np.mean(counts[part]) - np.mean(expected[part])) < 5 * np.sqrt(np.mean(expected[part]) / 250)


@pytest.mark.parametrize("name", ["falling", "rising"])
def test_rates_over_time_are_rounded_per_sample(name):
    schedule = over_time(name, drop_granularity="sample")
    seen = set()
    for step in range(10, 111, 2):
        plan = schedule.plan(step, batch_size=32)
        assert plan.sample_masks.mean(0).tolist() == list(schedule.rates_at(step))
        assert plan.survival == tuple(1 - rate for rate in schedule.rates_at(step))
        seen |= {16 * rate for rate in schedule.rates_at(step)}
    assert seen == set(range(11))


@pytest.mark.parametrize("name", ["falling", "rising"])
def test_the_plan_stays_a_function_of_the_step(name):
    backwards = [over_time(name).plan(step) for step in reversed(range(120))]
    assert [over_time(name).plan(step) for step in range(120)] == backwards[::-1]


@pytest.mark.parametrize("name", ["falling", "rising"])
def test_rates_that_change_need_the_end_of_the_window(name):
    with pytest.raises(ConfigurationError, match=rf"`drop_rate_over_time='{name}'` needs .*Pass `last_step`"):
        FeatureReuseSchedule(4, drop_rate_over_time=name)


def test_a_window_of_one_step_and_a_step_in_the_middle_of_a_cycle():
    assert over_time("falling", first_step=3, last_step=3).rates_at(3)[-1] == 0.6
    assert over_time("rising", first_step=3, last_step=3).rates_at(3)[-1] == 0
    # The last cycle begins before the end of the window, and its rates are those of then.
    assert over_time("rising", last_step=111).rates_at(111)[-1] == pytest.approx(0.6 * 100 / 101)


# From the options


@pytest.mark.parametrize(("start", "end"), list(itertools.combinations([0.0, 0.2, 0.5, 1.0], 2)))
def test_options_give_the_window_over_which_rates_change(start, end):
    options = FeatureReuseArguments(drop_rate_over_time="falling", reuse_start=start, reuse_end=end, vanilla_steps=1)
    schedule = options.schedule(num_blocks=4, max_steps=300, seed=0)
    assert (schedule.first_step, schedule.last_step) == (300 * start, 300 * end)
    assert (schedule.vanilla_steps, schedule.drop_rate_over_time) == (1, "falling")
    middle = schedule.first_step + 3 * round((end - start) * 50)
    assert schedule.rates_at(middle)[-1] == pytest.approx(0.25)


def test_settings_make_the_same_schedule_again():
    schedule = over_time("rising", vanilla_steps=2, drop_granularity="sample", drop_rate_schedule="uniform")
    again = FeatureReuseSchedule(**schedule.settings())
    assert vars(again) == vars(schedule)
    assert repr(again) == repr(schedule)
