"""Choose sets of blocks to drop, and count correct predictions without them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_featreuse.analysis.results import RandomDrop
from hf_featreuse.analysis.statistics import Accuracy, mean_interval
from hf_featreuse.method.blocks import ResidualBlock

# A deep model is measured at no more than this many numbers of random blocks.
_MOST_RANDOM_COUNTS = 12

Dropped = tuple[int, ...]


@dataclass(frozen=True)
class DropSets:
    """The sets of blocks to drop: each block by itself, the last k, and k at random.

    Args:
        each (`list[tuple[int, ...]]`): one set per block that can be dropped.
        last (`list[tuple[int, ...]]`): the last 0, 1, ... blocks, as long as all of them can be dropped.
        random (`dict[int, list[tuple[int, ...]]]`): the sets drawn for each number of blocks.
        num_droppable (`int`): number of blocks from which random sets are drawn.
    """

    each: list[Dropped]
    last: list[Dropped]
    random: dict[int, list[Dropped]]
    num_droppable: int

    @classmethod
    def of(cls, blocks: Sequence[ResidualBlock], random_draws: int, seed: int, allow_inexact: bool) -> DropSets:
        """Choose the sets for a model; they are the same for the same seed and number of droppable blocks."""
        droppable = [index for index, block in enumerate(blocks) if block.exact or allow_inexact]
        last = [tuple(range(len(blocks) - count, len(blocks))) for count in range(len(blocks) + 1)]
        random = {
            count: [
                tuple(droppable[position] for position in drawn)
                for drawn in draw_sets(len(droppable), count, random_draws, seed)
            ]
            for count in random_counts(len(droppable))
            if random_draws
        }
        return cls(
            [(index,) for index in droppable],
            [dropped for dropped in last if set(dropped) <= set(droppable)],
            random,
            len(droppable),
        )

    def distinct(self) -> list[Dropped]:
        """Return every set once, starting with the empty one."""
        return list(dict.fromkeys(itertools.chain(self.last, self.each, *self.random.values())))


def random_counts(num_blocks: int) -> list[int]:
    """Return the numbers of blocks to drop at random: all below `num_blocks`, or twelve, evenly spread."""
    if num_blocks - 1 <= _MOST_RANDOM_COUNTS:
        return list(range(1, num_blocks))
    return np.linspace(1, num_blocks - 1, _MOST_RANDOM_COUNTS).round().astype(int).tolist()


def draw_sets(num_blocks: int, count: int, draws: int, seed: int) -> list[Dropped]:
    """Draw distinct sets of `count` blocks, or all if they are few, without changing the global random state."""
    # Sets of one block are measured anyway.
    if count == 1 or math.comb(num_blocks, count) <= draws:
        return list(itertools.combinations(range(num_blocks), count))
    generator = np.random.default_rng([seed, count])
    found: dict[Dropped, None] = {}
    while len(found) < draws:
        found[tuple(sorted(generator.choice(num_blocks, count, replace=False).tolist()))] = None
    return list(found)


class AccuracyCounter:
    """Counts correct predictions for each set of dropped blocks.

    Args:
        sets (`DropSets`): the sets whose results will be asked for.
    """

    def __init__(self, sets: DropSets) -> None:
        self._sets = sets
        self._correct: dict[Dropped, int] = {}
        self._total: dict[Dropped, int] = {}

    def add(self, dropped: Dropped, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count one batch; a label of -100 leaves a sample out."""
        hits = (logits.argmax(-1).cpu() == labels)[labels != -100]
        self._correct[dropped] = self._correct.get(dropped, 0) + int(hits.sum())
        self._total[dropped] = self._total.get(dropped, 0) + len(hits)

    def accuracy(self, dropped: Dropped) -> Accuracy | None:
        """Return the accuracy without these blocks; `None` if it was not measured."""
        total = self._total.get(dropped, 0)
        return Accuracy.of(self._correct[dropped], total) if total else None

    def early_exit(self, num_blocks: int) -> list[Accuracy | None]:
        """Return the accuracy after 0, 1, ... and all blocks."""
        return [self.accuracy(tuple(range(depth, num_blocks))) for depth in range(num_blocks + 1)]

    def random(self) -> list[RandomDrop]:
        """Return the accuracies without random blocks, for each number of blocks."""
        found = []
        for count, drawn in self._sets.random.items():
            values = [self._correct[dropped] / self._total[dropped] for dropped in drawn]
            low, high = mean_interval(values, math.comb(self._sets.num_droppable, count)) or (None, None)
            found.append(RandomDrop(count, float(np.mean(values)), low, high, values, [list(d) for d in drawn]))
        return found
