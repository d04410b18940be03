"""Random sets of blocks, per batch and per sample, against their rules written out."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from hf_featreuse import FeatureReuseSchedule
from hf_featreuse.method.draws import SAMPLE_DRAW_VERSION, draw_batch, draw_samples, sixteenths


def drawn(schedule: FeatureReuseSchedule, cycles: int) -> list[tuple[int, ...]]:
    """The set D of the first cycles."""
    return [schedule.plan(cycle * schedule.steps_per_cycle).dropped for cycle in range(cycles)]


# Per batch. These sets are part of the interface: a run that is resumed with a later version must see the same.


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
    schedule = FeatureReuseSchedule(6, drop_rate=0.5, seed=2**64 - 1, stochastic_depth_steps=1)
    assert [schedule.plan(step).dropped for step in (0, 2, 4, 2_000_000)] == [(4,), (4, 5), (), (2,)]


def philox_4x64_words(seed: int, cycle: int, block: int = 0, draw: int = 0) -> list[int]:
    """The four words of a block of a cycle's stream, from the algorithm as published (Salmon et al. 2011)."""
    mask = 2**64 - 1
    # numpy counts up before it generates.
    c0, c1, c2, c3, k0, k1 = block + 1, cycle, draw, 0, seed, 0
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


# Per sample


def dropped_by_rule(seed: int, cycle: int, rates: list[float], position: int) -> list[bool]:
    """Which blocks the sample at a position drops: the rule for one sample and one block at a time."""
    group, place = divmod(position, 16)
    drops = []
    for block, rate in enumerate(rates):
        words = philox_4x64_words(seed, cycle, group * math.ceil(len(rates) / 8) + block // 8, draw=2)
        word = words[block % 8 // 2]
        bits = word >> 32 if block % 2 else word & 0xFFFFFFFF
        rank = offset = 0
        for level in range(4):
            n = 16 >> (level + 1)
            bit = (place >> level & 1) ^ (bits >> (offset + (place >> (level + 1)) + n * rank) & 1)
            rank, offset = 2 * rank + bit, offset + 8
        count = 0 if rate == 0 else min(max(math.floor(16 * rate + 0.5), 1), 15)
        drops.append(rank < count)
    return drops


@pytest.mark.parametrize(("seed", "cycle"), [(0, 0), (7, 3), (2**64 - 1, 10**6)])
@pytest.mark.parametrize("num_blocks", [1, 3, 8, 9, 20])
def test_sets_of_samples_follow_the_rule(seed, cycle, num_blocks):
    rates = [0.7 * block / max(num_blocks - 1, 1) for block in range(num_blocks)]
    for first in (0, 16 * 10**5):
        expected = [dropped_by_rule(seed, cycle, rates, first + sample) for sample in range(40)]
        assert draw_samples(seed, cycle, rates, 40, first).tolist() == expected


def test_sets_of_samples_are_pinned():
    # A change here would change every run with sets per sample: it needs a new version of the draw.
    assert SAMPLE_DRAW_VERSION == 2
    schedule = FeatureReuseSchedule(
        5, drop_rate_schedule="uniform", seed=7, drop_granularity="sample", stochastic_depth_steps=1
    )
    masks = schedule.plan(2, batch_size=3, position=1).sample_masks
    assert masks.astype(int).tolist() == [[0, 0, 0, 1, 0], [1, 0, 1, 0, 0], [0, 1, 0, 1, 1]]
    masks = (
        FeatureReuseSchedule(12, seed=0, drop_granularity="sample", stochastic_depth_steps=1)
        .plan(10, batch_size=2, position=47)
        .sample_masks
    )
    assert masks.astype(int).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1, 0, 1, 1, 0, 0, 0]]


def ranks(seed: int, cycle: int, num_blocks: int, count: int) -> np.ndarray:
    """The rank of each sample at each block: how many of the counts 1 to 15 do not reach it."""
    return sum(~draw_samples(seed, cycle, [k / 16] * num_blocks, count, 0) for k in range(1, 16)).astype(int)


@pytest.mark.parametrize("seed", range(3))
def test_the_ranks_of_a_group_are_a_permutation(seed):
    found = ranks(seed, 5, 12, 160).reshape(10, 16, 12)
    assert np.array_equal(np.sort(found, axis=1), np.broadcast_to(np.arange(16)[:, None], (10, 16, 12)))
    # Not always the same one: of 120 random ones among 16!, no two are alike.
    assert len({tuple(column) for group in found for column in group.T}) == 120


@pytest.mark.parametrize("k", range(1, 16))
def test_aligned_runs_hold_the_floor_or_the_ceiling_of_their_share(k):
    masks = draw_samples(k, 2, [k / 16] * 9, 320, 0)
    for length in (2, 4, 8, 16):
        counts = masks.reshape(-1, length, 9).sum(1)
        share = length * k / 16
        assert set(np.unique(counts)) == {math.floor(share), math.ceil(share)}, length


def test_every_rank_is_as_likely_at_every_place():
    groups = 4000
    found = ranks(3, 0, 2, 16 * groups).reshape(groups, 16, 2)
    bound = 5 * math.sqrt(1 / 16 * 15 / 16 / groups)
    for rank in range(16):
        assert np.all(np.abs((found == rank).mean(0) - 1 / 16) < bound), rank
    # Neither blocks nor groups nor cycles depend on each other.
    cycles = np.stack([ranks(3, cycle, 2, 160) for cycle in range(100)])
    pairs = [(found[..., 0], found[..., 1]), (found[1:], found[:-1]), (cycles[1:], cycles[:-1])]
    for first, second in pairs:
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / math.sqrt(first.size)


@pytest.mark.parametrize("num_blocks", [1, 3, 8, 9, 12])
def test_how_a_batch_is_cut_changes_nothing(num_blocks):
    schedule = FeatureReuseSchedule(num_blocks, seed=7, drop_granularity="sample")
    whole = schedule.plan(4, batch_size=70).sample_masks
    assert whole.shape == (70, num_blocks)
    for size in (1, 2, 3, 7, 16, 17, 32, 70):
        parts = [
            schedule.plan(4, batch_size=min(size, 70 - first), position=first).sample_masks
            for first in range(0, 70, size)
        ]
        assert np.array_equal(np.concatenate(parts), whole), size


@pytest.mark.parametrize("ranks_", [2, 3])
def test_ranks_enter_at_their_own_position(ranks_):
    """Micro-batches of 4 that accelerate deals out to the ranks in turn."""
    schedule = FeatureReuseSchedule(5, seed=1, drop_granularity="sample")
    micro_batches, size = 4, 4
    whole = schedule.plan(0, batch_size=micro_batches * ranks_ * size).sample_masks
    for micro_batch in range(micro_batches):
        for rank in range(ranks_):
            position = (micro_batch * ranks_ + rank) * size
            part = schedule.plan(0, batch_size=size, position=position).sample_masks
            assert np.array_equal(part, whole[position : position + size])


def test_no_samples_have_no_sets():
    assert draw_samples(0, 0, [0.5, 0.5], 0, 5).shape == (0, 2)


def test_both_kinds_of_draw_have_streams_of_their_own():
    per_sample, shared = (
        FeatureReuseSchedule(64, seed=7, drop_rate_schedule="uniform", drop_granularity=granularity)
        for granularity in ("sample", "batch")
    )
    for step in (0, 2, 4):
        first = per_sample.plan(step, batch_size=1).sample_masks[0]
        assert tuple(np.flatnonzero(first)) != shared.plan(step).dropped


# Rounding


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0, 0),
        (1e-9, 1),
        (0.03, 1),
        (1 / 16, 1),
        (1.49 / 16, 1),
        (1.5 / 16, 2),
        (0.5, 8),
        (8.5 / 16, 9),
        (0.9, 14),
        (15 / 16, 15),
        (0.97, 15),
        (1 - 1e-9, 15),
    ],
)
def test_rates_are_rounded_to_sixteenths_but_neither_to_none_nor_to_all(rate, expected):
    assert sixteenths(rate) == expected
    masks = draw_samples(0, 0, [rate], 64, 0)
    assert masks.reshape(4, 16).sum(1).tolist() == [expected] * 4
    if rate:
        schedule = FeatureReuseSchedule(3, rate, drop_rate_schedule="uniform", drop_granularity="sample")
        assert schedule.rates == (expected / 16,) * 3
        assert schedule.plan(0, batch_size=1).survival == (1 - expected / 16,) * 3


def test_linear_rates_are_rounded_block_by_block():
    rounded = FeatureReuseSchedule(12, drop_granularity="sample")
    assert [16 * rate for rate in rounded.rates] == [1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8]
    exact = FeatureReuseSchedule(12)
    assert exact.rates == tuple(0.5 * (block + 1) / 12 for block in range(12))
    assert exact.plan(0).survival == tuple(1 - rate for rate in exact.rates)


def test_a_rate_of_zero_never_drops_per_batch():
    assert {draw_batch(0, cycle, [0.0, 1.0, 0.0]) for cycle in range(100)} == {(1,)}
