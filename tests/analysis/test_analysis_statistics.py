"""Intervals against published values, and the sets of blocks that are dropped."""

import itertools
import math

import numpy as np
import pytest
import torch

from hf_featreuse.analysis import Accuracy, wilson_interval
from hf_featreuse.analysis.dropping import AccuracyCounter, DropSets, draw_sets, random_counts
from hf_featreuse.analysis.statistics import _t_quantile, mean_interval
from hf_featreuse.method.blocks import ResidualBlock

# Table I of Newcombe 1998, "Two-sided confidence intervals for the single proportion", method 3.
PUBLISHED = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("correct", "total", "low", "high"), PUBLISHED)
def test_wilson_interval_as_published(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_accuracy_lies_in_its_interval():
    for correct in range(8):
        accuracy = Accuracy.of(correct, 7)
        assert 0 <= accuracy.low <= accuracy.value <= accuracy.high <= 1


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (200, 1.972)])
def test_quantiles_of_t_as_in_tables(degrees, quantile):
    assert _t_quantile(degrees) == pytest.approx(quantile, abs=6e-4)


def test_interval_of_a_mean():
    values = [0.4, 0.5, 0.6]
    low, high = mean_interval(values, 10**9)
    assert (low, high) == pytest.approx((0.5 - 4.303 * 0.1 / math.sqrt(3), 0.5 + 4.303 * 0.1 / math.sqrt(3)), abs=1e-3)
    # If half of all sets were drawn, the rest can change the mean less; if all were drawn, not at all.
    half = mean_interval(values, 6)
    assert half[1] - half[0] == pytest.approx((high - low) / math.sqrt(2), rel=1e-6)
    assert mean_interval(values, 3) == pytest.approx((0.5, 0.5))
    assert mean_interval([0.5], 3) is None
    assert mean_interval([0.5], 1) == (0.5, 0.5)
    assert mean_interval([0.0, 1.0], 100) == (0.0, 1.0)


# Sets


def blocks(count: int, inexact: tuple[int, ...] = ()) -> list[ResidualBlock]:
    return [ResidualBlock(f"layers.{i}", torch.nn.Linear(1, 1), exact=i not in inexact) for i in range(count)]


def test_sets_are_distinct_and_of_their_size():
    sets = DropSets.of(blocks(8), random_draws=6, seed=1, allow_inexact=False)
    assert sets.distinct()[0] == ()
    assert len(set(sets.distinct())) == len(sets.distinct())
    assert set(sets.each) == {(i,) for i in range(8)}
    assert sets.last[3] == (5, 6, 7)
    assert list(sets.random) == list(range(1, 8))
    for count, drawn in sets.random.items():
        assert len(set(drawn)) == len(drawn) == (8 if count in (1,) else 6)
        assert all(len(set(dropped)) == count and dropped == tuple(sorted(dropped)) for dropped in drawn)


def test_sets_depend_only_on_the_seed():
    state = np.random.get_state()[1].copy()
    first, again, other = (draw_sets(10, 4, 20, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert np.array_equal(state, np.random.get_state()[1])


def test_every_block_is_drawn_equally_often():
    counts = np.zeros(6)
    for seed in range(300):
        for dropped in draw_sets(6, 3, 4, seed):
            counts[list(dropped)] += 1
    assert np.abs(counts / counts.sum() - 1 / 6).max() < 0.02


def test_few_sets_are_all_taken():
    assert draw_sets(5, 3, 10, 0) == list(itertools.combinations(range(5), 3))


def test_deep_models_are_measured_at_some_counts():
    assert random_counts(1) == []
    assert random_counts(13) == list(range(1, 13))
    deep = random_counts(50)
    assert (deep[0], deep[-1], len(set(deep))) == (1, 49, 12)


def test_inexact_blocks_are_left_out_unless_allowed():
    refused = DropSets.of(blocks(5, (1,)), random_draws=3, seed=0, allow_inexact=False)
    assert not [dropped for dropped in refused.distinct() if 1 in dropped]
    assert refused.last == [(), (4,), (3, 4), (2, 3, 4)]
    assert list(refused.random) == [1, 2, 3]
    allowed = DropSets.of(blocks(5, (1,)), random_draws=3, seed=0, allow_inexact=True)
    assert (1,) in allowed.each and len(allowed.last) == 6


def test_counter_leaves_out_samples_without_a_label():
    counter = AccuracyCounter(DropSets.of(blocks(2), 2, 0, False))
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    counter.add((), logits, torch.tensor([0, 0, -100]))
    counter.add((), logits[:1], torch.tensor([1]))
    assert (counter.accuracy(()).correct, counter.accuracy(()).total) == (1, 3)
    assert counter.accuracy((1,)) is None
