"""Draw an evaluation: the confusion matrix and the reliability diagram."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hf_featreuse.evaluation.results import Evaluation
from hf_featreuse.plotting import empty_figure, save_figure
from hf_featreuse.plotting.figure import BLUE, GRAY

MOST_CLASSES = 40
_CLASSES_WITH_NUMBERS = 15
_CHARACTERS = 16


def plot_confusion(evaluation: Evaluation, path: Path) -> Path:
    """Draw the share of each class (rows) that was predicted as each class (columns)."""
    counts = np.array(evaluation.confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [_short(scores.name) for scores in evaluation.classes]
    figure = empty_figure(min(10.0, 3.5 + 0.42 * len(names)))
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    if len(names) <= _CLASSES_WITH_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=color, fontsize=9)
    figure.colorbar(image, ax=axes, label="share of the class")
    return save_figure(figure, path)


def plot_reliability(evaluation: Evaluation, path: Path) -> Path:
    """Draw accuracy over confidence, and how many images have which confidence."""
    bins = evaluation.calibration
    middles, width = [(one.low + one.high) / 2 for one in bins], bins[0].high - bins[0].low
    figure = empty_figure(3.6)
    reliability, histogram = figure.subplots(1, 2)
    reliability.bar(middles, [one.accuracy or 0 for one in bins], width * 0.9, color=BLUE, label="accuracy")
    reliability.plot([0, 1], [0, 1], color=GRAY, linestyle="--", linewidth=1, label="perfectly calibrated")
    reliability.set_ylabel("accuracy")
    reliability.set_ylim(0, 1.02)
    reliability.legend(frameon=False, fontsize=9)
    histogram.bar(middles, [one.count for one in bins], width * 0.9, color=BLUE)
    histogram.set_ylabel("images")
    for axes in (reliability, histogram):
        axes.set_xlabel("confidence (probability of the predicted class)")
        axes.set_xlim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def _short(name: str) -> str:
    return name if len(name) <= _CHARACTERS else f"{name[: _CHARACTERS - 1]}…"
