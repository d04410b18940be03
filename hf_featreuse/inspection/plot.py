"""Draw a model before training: survival probability and share of arithmetic of each block, over depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_featreuse.inspection.report import ModelReport
from hf_featreuse.plotting.figure import BLUE, ORANGE, save_figure, stacked_axes
from hf_featreuse.text import common_prefix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_LABELS = 48
_CHARACTERS_IN_A_ROW = 150


def plot_inspection(report: ModelReport, path: str | Path, *, title: str | None = None) -> Path:
    """Write a PNG of an inspected model: survival probability and share of arithmetic of each block, over depth.

    Requires matplotlib, which is installed by `pip install "hf_featreuse[plot]"`.

    Args:
        report (`ModelReport`): from `inspect_model`. If the arithmetic was not counted, the second panel is left out.
        path (`str` or `Path`): the file to write; its folder is created if missing.
        title (`str`, *optional*): printed above the panels; by default the model and the expected costs.

    Returns:
        `Path`: the file, 1200 pixels wide.

    Raises:
        ConfigurationError: matplotlib is missing.

    Example:
        >>> import tempfile
        >>> from hf_featreuse import inspect_model
        >>> from hf_featreuse.inspection import plot_inspection
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_inspection(inspect_model("vit"), f"{folder}/vit.png").name
        'vit.png'
    """
    blocks = report.blocks
    arithmetic = [100 * block.share_of_arithmetic for block in blocks if block.share_of_arithmetic is not None]
    figure, axes = stacked_axes([2.0] * (2 if arithmetic else 1), title or _inspection_title(report))
    survival = [block.survival_probability for block in blocks]
    _draw_bars(axes[0], survival, BLUE, "survival probability")
    axes[0].set_ylim(0, 1)
    if arithmetic:
        _draw_bars(axes[1], arithmetic, ORANGE, "arithmetic\n(% of a vanilla step)")
    _label_blocks(axes[-1], [block.name for block in blocks])
    return save_figure(figure, path)


def _inspection_title(report: ModelReport) -> str:
    name = report.architecture if report.model == report.architecture else f"{report.model} ({report.architecture})"
    if not report.costs:
        return name
    depth, freeze, mean = (report.costs[key] for key in ("stochastic_depth", "masked_freeze", "mean"))
    expected = f"stochastic depth {depth:.2f}, masked freeze {freeze:.2f}, mean {mean:.2f}"
    return f"{name}\nexpected cost, vanilla step = 1: {expected}"


def _draw_bars(axes: Axes, values: Sequence[float], color: str, label: str) -> None:
    """Draw one bar per block."""
    axes.bar(range(len(values)), values, width=0.75, color=color)
    axes.set_ylabel(label)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_blocks(axes: Axes, names: Sequence[str]) -> None:
    """Name the blocks under their bars, or only every second, third, ... one if there are many."""
    prefix = common_prefix(names)
    shown = range(0, len(names), math.ceil(len(names) / _MAX_LABELS))
    labels = [names[block].removeprefix(prefix) for block in shown]
    axes.set_xticks(list(shown), labels, fontsize=8)
    if len(labels) * max(map(len, labels)) > _CHARACTERS_IN_A_ROW:
        axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel(f"block of {prefix.rstrip('.')}, in forward order" if prefix else "block, in forward order")
