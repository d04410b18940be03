"""Accuracies with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z_95 = 1.959964


@dataclass(frozen=True)
class Accuracy:
    """Share of the samples classified correctly, with its 95 % Wilson interval.

    Args:
        value (`float`): `correct / total`, from 0 to 1.
        low (`float`): lower end of the interval.
        high (`float`): upper end of the interval.
        correct (`int`): samples classified correctly.
        total (`int`): samples with a label, at least 1.

    Example:
        >>> from hf_featreuse.analysis import Accuracy
        >>> accuracy = Accuracy.of(8, 10)
        >>> accuracy.value, round(accuracy.low, 3), round(accuracy.high, 3)
        (0.8, 0.49, 0.943)
    """

    value: float
    low: float
    high: float
    correct: int
    total: int

    @classmethod
    def of(cls, correct: int, total: int) -> Accuracy:
        """Return the accuracy of a count."""
        return cls(correct / total, *wilson_interval(correct, total), correct, total)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Compute the 95 % Wilson score interval of a proportion.

    Args:
        correct (`int`): successes, from 0 to `total`.
        total (`int`): trials, at least 1.

    Returns:
        `tuple[float, float]`: both ends, within [0, 1].

    Source:
        Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    Example:
        >>> from hf_featreuse.analysis import wilson_interval
        >>> [round(end, 3) for end in wilson_interval(0, 10)]
        [0.0, 0.278]
    """
    assert 0 <= correct <= total and total
    share, z2 = correct / total, _Z_95**2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    # At 0 and 1 the end is exact, and rounding could exceed it.
    return (0.0 if correct == 0 else center - half, 1.0 if correct == total else center + half)


def mean_interval(values: Sequence[float], population: int) -> tuple[float, float] | None:
    """Return the 95 % t interval, within [0, 1], of the mean of values drawn without replacement from a population.

    `None` for one value of several. If all were drawn, the mean is known and the interval has no width.
    """
    mean, count = float(np.mean(values)), len(values)
    if count == population:
        return mean, mean
    if count < 2:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(count) * math.sqrt(1 - count / population)
    half = _t_quantile(count - 1) * error
    return max(0.0, mean - half), min(1.0, mean + half)


def _t_quantile(degrees: int) -> float:
    """Return the 0.975 quantile of Student's t by integrating its density, accurate to 1e-4."""
    grid = np.linspace(0, 20, 200_001)
    log_constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    density = np.exp(log_constant - (degrees + 1) / 2 * np.log1p(grid**2 / degrees))
    below = 0.5 + np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)]) * grid[1]
    return float(np.interp(0.975, below, grid))
