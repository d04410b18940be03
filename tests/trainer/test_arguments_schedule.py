"""The schedule that the options give a run."""

import itertools
import math
from fractions import Fraction

import pytest
from test_arguments import OTHERS

from hf_featreuse import FeatureReuseArguments, FeatureReuseSchedule
from hf_featreuse.trainer.arguments import window_steps


def test_schedule_is_built_from_every_option():
    schedule = FeatureReuseArguments(**OTHERS).schedule(num_blocks=6, max_steps=100, seed=1)
    expected = FeatureReuseSchedule(
        6,
        drop_rate=0.3,
        drop_rate_schedule="uniform",
        stochastic_depth_steps=2,
        masked_freeze_steps=3,
        seed=7,
        first_step=25,
        last_step=75,
        drop_granularity="sample",
        vanilla_steps=1,
        drop_rate_over_time="falling",
    )
    assert vars(schedule) == vars(expected)


def test_schedule_of_the_defaults_has_no_end():
    assert vars(FeatureReuseArguments().schedule(6, 100, 1)) == vars(FeatureReuseSchedule(6, seed=1))


@pytest.mark.parametrize(("reuse_seed", "expected"), [(None, 42), (0, 0), (7, 7), (2**64 - 1, 2**64 - 1)])
def test_seed_of_the_schedule(reuse_seed, expected):
    assert FeatureReuseArguments(reuse_seed=reuse_seed).schedule(4, 10, seed=42).seed == expected


@pytest.mark.parametrize(
    ("rate", "depth", "freeze", "expected"),
    [
        (0.5, 1, 1, True),
        (0.5, 1, 0, True),
        (0.5, 0, 1, True),
        (0.5, 0, 0, False),
        (0, 1, 1, False),
        (0.0, 1, 0, False),
    ],
)
def test_alternates_unless_the_rate_or_both_numbers_of_steps_are_zero(rate, depth, freeze, expected):
    options = FeatureReuseArguments(drop_rate=rate, stochastic_depth_steps=depth, masked_freeze_steps=freeze)
    assert options.alternates is expected
    if not expected:
        assert options.schedule(0, 10, 0).rates == ()


@pytest.mark.parametrize(
    ("start", "end", "max_steps", "expected"),
    [
        (0.0, 1.0, 100, (0, None)),
        (0, 1, 7, (0, None)),
        (0.25, 0.75, 100, (25, 75)),
        (0.25, 0.75, 10, (3, 7)),
        (0.0, 0.5, 3, (0, 1)),
        (0.5, 1.0, 3, (2, None)),
        # Products that come out a rounding error above or below a whole number.
        (0.07, 1.0, 100, (7, None)),
        (0.0, 0.29, 100, (0, 29)),
        (0.1, 0.3, 10, (1, 3)),
        (0.55, 0.57, 100, (55, 57)),
        (1 / 3, 2 / 3, 3, (1, 2)),
        (1 / 3, 2 / 3, 300_000, (100_000, 200_000)),
    ],
)
def test_window_steps_are_those_within_the_fractions(start, end, max_steps, expected):
    assert window_steps(start, end, max_steps) == expected


@pytest.mark.parametrize("max_steps", [1, 7, 10, 64, 99, 100, 1000])
def test_window_steps_equal_exact_arithmetic(max_steps):
    for start, end in itertools.combinations(range(0, 100, 3), 2):
        first, last = window_steps(start / 100, end / 100, max_steps)
        assert first == math.ceil(Fraction(start, 100) * max_steps)
        assert last == math.floor(Fraction(end, 100) * max_steps)
