"""Rates, plans, the window and the arguments of the schedule."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from hf_featreuse import ConfigurationError, FeatureReuseSchedule, StepKind
from hf_featreuse.method.schedule import VANILLA_PLAN, sample_position

VANILLA, DEPTH, FREEZE = StepKind.VANILLA, StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE


def drawn(schedule: FeatureReuseSchedule, cycles: int) -> list[tuple[int, ...]]:
    """The set D of the first cycles."""
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


def test_default_is_linear_three_to_one_from_the_first_step_without_end():
    schedule = FeatureReuseSchedule(4)
    assert schedule.rates == (0.125, 0.25, 0.375, 0.5)
    assert (schedule.stochastic_depth_steps, schedule.masked_freeze_steps) == (3, 1)
    assert (schedule.seed, schedule.first_step, schedule.last_step) == (0, 0, None)


def test_single_block_has_the_full_rate_in_both_schedules():
    for name in ("linear", "uniform"):
        assert FeatureReuseSchedule(1, drop_rate=0.3, drop_rate_schedule=name).rates == (0.3,)


# Draws


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


def test_very_small_and_very_large_rates_are_honored():
    rare = FeatureReuseSchedule(4, drop_rate=1e-9, drop_rate_schedule="uniform")
    assert set(drawn(rare, 500)) == {()}
    frequent = FeatureReuseSchedule(4, drop_rate=1 - 1e-9, drop_rate_schedule="uniform")
    assert set(drawn(frequent, 500)) == {(0, 1, 2, 3)}


# Sets


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
    schedule = FeatureReuseSchedule(
        32, drop_rate=0.9, drop_rate_schedule="uniform", first_step=3, last_step=6, stochastic_depth_steps=1
    )
    assert kinds(schedule, 10) == [VANILLA] * 3 + [DEPTH, FREEZE, DEPTH, FREEZE] + [VANILLA] * 3


def test_window_may_end_within_a_cycle():
    schedule = FeatureReuseSchedule(
        32, drop_rate=0.9, drop_rate_schedule="uniform", last_step=2, stochastic_depth_steps=1
    )
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
        *(("drop_rate", value) for value in (1, 1.0, -0.1, 1.5, math.nan, math.inf, True, False, "0.5", None)),
        *(("drop_rate_schedule", value) for value in ("cosine", "Linear", None, 1)),
        *(("drop_rate_over_time", value) for value in ("linear", "Falling", None, 1)),
        *(
            (option, value)
            for option in ("stochastic_depth_steps", "masked_freeze_steps", "vanilla_steps")
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
        "FeatureReuseSchedule(num_blocks=4, drop_rate=0.3, drop_rate_schedule='linear', stochastic_depth_steps=3, "
        "masked_freeze_steps=1, seed=5, first_step=1, last_step=9, drop_granularity='batch', vanilla_steps=0, "
        "drop_rate_over_time='constant', unfreeze_steps=0)"
    )


# Sets per sample


def by_sample(num_blocks: int = 5, **changed) -> FeatureReuseSchedule:
    return FeatureReuseSchedule(
        num_blocks, **{"stochastic_depth_steps": 1, "seed": 7, "drop_granularity": "sample", **changed}
    )


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


# Positions of samples


def in_steps(batches: list[list[int]], accumulated: int) -> list[list[list[int]]]:
    """The micro-batches of one rank, by optimizer step."""
    return [batches[first : first + accumulated] for first in range(0, len(batches), accumulated)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("accumulated", [1, 2, 3])
@pytest.mark.parametrize("images", [48, 44, 41])
@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("even_batches", [False, True])
def test_positions_follow_the_order_of_the_data(num_ranks, accumulated, images, split_batches, even_batches):
    """Of the batches that accelerate deals out to the ranks, the last of an epoch may be smaller."""
    samples = 4
    sampler = BatchSampler(range(images), samples * (num_ranks if split_batches else 1), drop_last=False)
    seen = set()
    for rank in range(num_ranks):
        shard = BatchSamplerShard(sampler, num_ranks, rank, split_batches=split_batches, even_batches=even_batches)
        for step, micro_batches in enumerate(in_steps(list(shard), accumulated)):
            first = step * accumulated * num_ranks * samples
            for index, images_of_batch in enumerate(micro_batches):
                position = sample_position(index, rank, num_ranks, samples)
                for offset, image in enumerate(images_of_batch):
                    place = first + position + offset
                    assert place not in seen
                    seen.add(place)
                    # Beyond the end, images from the start of the epoch fill up the batch.
                    assert place >= images or image == place
    assert set(range(images)) <= seen


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("left", [1, 4, 5, 7, 8])
def test_slices_of_a_dispatched_batch_follow_each_other(num_ranks, left):
    """As accelerate's dispatcher cuts the last batch: evenly, with samples of the first one where some are missing."""
    samples, sizes = 4, []
    for rank in range(num_ranks):
        size = -(-left // num_ranks)
        sizes.append((sample_position(2, rank, num_ranks, samples, dispatched=size), size))
    places = [place for first, size in sizes for place in range(first, first + size)]
    assert places == list(range(2 * num_ranks * samples, 2 * num_ranks * samples + len(places)))
