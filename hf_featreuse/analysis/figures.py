"""Draw one or more analyses on the same axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_featreuse.analysis.results import ModelAnalysis
from hf_featreuse.analysis.statistics import Accuracy
from hf_featreuse.plotting import empty_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The colors of Okabe and Ito (2008) that stand out from white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
_MARKERS = ("o", "s", "^", "D", "v")
_PANEL_INCHES = 3.6
_MAPS_IN_A_ROW = 3
_MOST_TICKS = 8
_CHARACTERS_IN_A_ROW = 140
_TITLE_CHARACTERS = 90

Named = Sequence[tuple[str, ModelAnalysis]]


def plot_cka(analyses: Named, path: Path) -> Path:
    """Draw a map of linear CKA for each model, all on one color scale; undefined values are gray."""
    columns = min(_MAPS_IN_A_ROW, max(2, len(analyses)))
    rows = math.ceil(len(analyses) / columns)
    figure = empty_figure((4.7 if columns == 2 else 3.3) * rows)
    figure.set_layout_engine("constrained", h_pad=0.1)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, analysis) in zip(panels, analyses, strict=False):
        values = np.array([[np.nan if v is None else v for v in row] for row in analysis.cka])
        axes.set_facecolor("0.8")
        axes.imshow(values, origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axes.set_title(textwrap.fill(name, _TITLE_CHARACTERS // columns), fontsize=11)
        ticks = range(0, len(values), math.ceil(len(values) / _MOST_TICKS))
        axes.set_xticks(list(ticks))
        axes.set_yticks(list(ticks))
        axes.set_xlabel("block")
        axes.set_ylabel("block")
    for axes in panels[len(analyses) :]:
        axes.set_axis_off()
    figure.colorbar(panels[0].images[0], ax=panels[: len(analyses)], label="linear CKA", shrink=0.9)
    return save_figure(figure, path)


def plot_features(analyses: Named, path: Path) -> Path:
    """Draw the residual ratio and the cosine similarity of each block over depth."""
    figure = empty_figure(_PANEL_INCHES)
    ratio, cosine = figure.subplots(1, 2)
    for index, (name, analysis) in enumerate(analyses):
        for axes, key in ((ratio, "residual_ratio"), (cosine, "cosine_similarity")):
            values = [np.nan if v is None else v for v in (getattr(block, key) for block in analysis.blocks)]
            _line(axes, index, range(len(values)), values, name)
    _finish(ratio, "block", "residual ratio |f(x)| / |x|")
    ratio.set_ylim(bottom=0)
    _name_models(ratio)
    _finish(cosine, "block", "cosine of input and output")
    cosine.set_ylim(min(0, cosine.get_ylim()[0]), 1.02)
    return save_figure(figure, path)


def plot_single_drops(analyses: Named, path: Path) -> Path:
    """Draw the accuracy without each block, with its interval, and that of the whole model as a dashed line."""
    figure = empty_figure(_PANEL_INCHES)
    axes = figure.subplots()
    for index, (name, analysis) in enumerate(analyses):
        axes.axhline(100 * analysis.accuracy.value, color=_color(index), linestyle="--", linewidth=1)
        accuracies = [block.accuracy_without for block in analysis.blocks]
        _accuracies(axes, index, accuracies, name, offset=0.08 * (index - (len(analyses) - 1) / 2))
    _finish(axes, "block dropped", "accuracy (%)")
    _from_zero(axes)
    _name_models(axes)
    return save_figure(figure, path)


def plot_many_drops(analyses: Named, path: Path) -> Path:
    """Draw the accuracy over the exit depth, and over the number of last blocks and of random blocks dropped."""
    figure = empty_figure(_PANEL_INCHES + 0.3)
    panels = figure.subplots(1, 3, sharey=True)
    for index, (name, analysis) in enumerate(analyses):
        _accuracies(panels[0], index, analysis.early_exit, name)
        _accuracies(panels[1], index, analysis.drop_last, name)
        _random_drops(panels[2], index, analysis, name)
    _finish(panels[0], "exit after this many blocks", "accuracy (%)")
    _finish(panels[1], "last blocks dropped", "")
    _finish(panels[2], "random blocks dropped", "")
    panels[2].set_xlim(panels[1].get_xlim())
    _from_zero(panels[0])
    _name_models(panels[0])
    return save_figure(figure, path)


# File name, function that draws it, heading and how to read it.
FIGURES: tuple[tuple[str, Callable[[Named, Path], Path], str, str], ...] = (
    (
        "cka.png",
        plot_cka,
        "Similarity of the blocks",
        "Linear CKA between the outputs of all pairs of blocks: 1 for features that are equal up to rotation and "
        "scale, 0 for unrelated ones. A large bright square is a run of blocks with similar features; dark lines show "
        "where the features change.",
    ),
    (
        "features.png",
        plot_features,
        "What a block adds",
        "Left: the length of what a block adds, divided by that of its input; 0 is a block that does nothing. Right: "
        "the cosine of the angle between a block's input and output; 1 is a block that keeps the direction.",
    ),
    (
        "drop_one.png",
        plot_single_drops,
        "Accuracy without one block",
        "One block is dropped at a time; the dashed line is the whole model. Bars are 95 % Wilson intervals over the "
        "images.",
    ),
    (
        "drop_many.png",
        plot_many_drops,
        "Accuracy without several blocks",
        "Left: early exit; all blocks after a depth are skipped, and the model's own norm and head follow. Middle: "
        "the same figures over the number of last blocks dropped. Right: random blocks are dropped; a dot for each "
        "drawn set, their mean, and its 95 % interval over all sets of that size.",
    ),
)


def _random_drops(axes: Axes, index: int, analysis: ModelAnalysis, name: str) -> None:
    """Draw the mean over random sets with its interval, and a dot for each set."""
    drops = analysis.random_drops
    for drop in drops:
        dots = [100 * accuracy for accuracy in drop.accuracies]
        axes.plot([drop.num_dropped] * len(dots), dots, ".", color=_color(index), markersize=4, alpha=0.35)
    with_interval = [drop for drop in drops if drop.low is not None and drop.high is not None]
    axes.fill_between(
        [drop.num_dropped for drop in with_interval],
        [100 * (drop.low or 0) for drop in with_interval],
        [100 * (drop.high or 0) for drop in with_interval],
        color=_color(index),
        alpha=0.15,
        linewidth=0,
    )
    counts = [0, *(drop.num_dropped for drop in drops)]
    means = [100 * mean for mean in (analysis.accuracy.value, *(drop.mean for drop in drops))]
    _line(axes, index, counts, means, name)


def _accuracies(axes: Axes, index: int, accuracies: Sequence[Accuracy | None], name: str, offset: float = 0.0) -> None:
    """Draw accuracies with their intervals as bars, and gaps for missing ones."""
    places = np.arange(len(accuracies)) + offset
    values = 100 * np.array([np.nan if a is None else a.value for a in accuracies])
    low, high = (100 * np.array([np.nan if a is None else getattr(a, e) for a in accuracies]) for e in ("low", "high"))
    axes.vlines(places, low, high, color=_color(index), linewidth=1, alpha=0.6)
    _line(axes, index, places, values, name)


def _line(axes: Axes, index: int, places: Sequence[float] | np.ndarray | range, values, name: str) -> None:
    marker = _MARKERS[index % len(_MARKERS)]
    # matplotlib leaves labels that start with an underscore out of a legend.
    label = f" {name}" if name.startswith("_") else name
    axes.plot(places, values, color=_color(index), marker=marker, markersize=3.5, linewidth=1.6, label=label)


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    """Label the axes, with whole numbers along x."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=_MOST_TICKS))
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name_models(axes: Axes) -> None:
    """Name the models above all panels if there are several."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        columns = max(1, _CHARACTERS_IN_A_ROW // (max(map(len, names)) + 6))
        axes.figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, min(101.5, axes.get_ylim()[1]))
