"""Draw random sets of residual blocks from a counter, so that any cycle and any sample can be drawn independently.

Source: the counter-based generator Philox 4x64, Salmon et al. 2011, of NumPy, whose raw words are the same on every
platform. The third counter word identifies the kind of draw: 0 is a set per batch, 2 a set per sample (1 was the first
version of the latter).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Version of the draws per sample; a run that was started with another version cannot be resumed.
SAMPLE_DRAW_VERSION = 2
# Consecutive samples that share a draw, in which each block has a fixed number of drops.
GROUP = 16
# Each group takes 32 bits per block, so a counter value (4 words of 64 bits) serves 8 blocks.
_BLOCKS_PER_COUNTER = 8


def draw_batch(seed: int, cycle: int, rates: Sequence[float]) -> tuple[int, ...]:
    """Draw the set D of a cycle: block l is in it with probability `rates[l]`, independently of the others."""
    # Streams of different cycles never overlap: each has 2**64 counter values.
    words = np.random.Philox(key=seed, counter=[0, cycle, 0, 0]).random_raw(len(rates))
    uniforms = (words >> np.uint64(11)) * 2.0**-53
    return tuple(np.flatnonzero(uniforms < rates).tolist())


def sixteenths(rate: float) -> int:
    """Return how many samples of a group drop a block: the nearest number, from 1 to 15 unless the rate is 0."""
    return 0 if rate == 0 else min(max(int(GROUP * rate + 0.5), 1), GROUP - 1)


def draw_samples(seed: int, cycle: int, rates: Sequence[float], count: int, position: int) -> np.ndarray:
    """Draw the sets D of consecutive samples in a cycle.

    A group is 16 consecutive positions of the global batch. In each, a block is dropped by exactly
    `sixteenths(rate)` samples; an aligned run of 2, 4 or 8 positions holds the floor or the ceiling of its share.

    Args:
        seed (`int`): key of the generator.
        cycle (`int`): number of the cycle.
        rates (`Sequence[float]`): drop probability of each of L blocks.
        count (`int`): number of samples.
        position (`int`): position of the first sample in the global batch.

    Returns:
        `numpy.ndarray`: booleans of shape (count, L), `True` where a sample drops a block.
    """
    first, last = position // GROUP, (position + max(count, 1) - 1) // GROUP
    counters = -(-len(rates) // _BLOCKS_PER_COUNTER)
    generator = np.random.Philox(key=seed, counter=[first * counters, cycle, 2, 0])
    words = generator.random_raw((last - first + 1) * counters * 4)
    halves = np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)], axis=-1).astype(np.int64)
    bits = halves.reshape(last - first + 1, -1)[:, : len(rates)]
    positions = np.arange(position, position + count)
    bits, place = bits[positions // GROUP - first], (positions % GROUP)[:, None]
    # A random permutation of the 16 places as a butterfly network: each of the four levels decides one bit of a rank.
    rank = np.zeros_like(bits)
    for level in range(4):
        switch = 8 * level + (place >> (level + 1)) + (8 >> level) * rank
        rank = 2 * rank + ((place >> level & 1) ^ (bits >> switch & 1))
    return rank < np.array([sixteenths(rate) for rate in rates])
