"""Draw a training run, with losses of each kind of step, accuracy and dropped blocks; or a model before training.

The colours are those of Okabe and Ito (2008), which stay apart for colour-blind readers. matplotlib is imported when
a figure is drawn, and drawn without pyplot, so that an application's figures and backend stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.inspection.report import common_prefix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_featreuse.inspection.report import ModelReport
    from hf_featreuse.schedule import FeatureReuseSchedule

LogHistory = Sequence[Mapping[str, Any]]
# (steps, values), name in the legend, colour, line style.
_Curve = tuple[tuple[list[int], list[float]], str, str, str]

_BLUE, _ORANGE, _GREEN, _GREY, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#666666", "#CC79A7"
# Key in the log, name in the legend, colour, line style.
_KIND_LOSSES = (
    ("loss/stochastic_depth", "stochastic depth", _BLUE, "-"),
    ("loss/masked_freeze", "masked freeze", _ORANGE, "-"),
    ("loss/vanilla", "vanilla", _GREY, "-"),
)
_OVERALL_LOSS = (("loss", "training", _GREY, "-"),)
_EVALUATION_LOSS = (("eval_loss", "evaluation", _GREEN, "--"),)
_ACCURACIES = (("eval_accuracy", "top-1", _GREEN, "-"), ("eval_top5_accuracy", "top-5", _PURPLE, "--"))
_WIDTH_INCHES, _DOTS_PER_INCH = 10.0, 120
# About three pixels each; narrower ones blur into one another.
_MAX_COLUMNS = 300
# Columns hold whole cycles: this many steps is a multiple of the usual lengths of a cycle.
_CYCLES = 12
# Steps of a column that are counted: a plan takes some 60 microseconds, and a run may have millions of steps.
_MAX_COUNTED = 2 * _CYCLES
_MAX_ROW_LABELS = 16
_MAX_COLUMN_LABELS = 48
_CHARACTERS_IN_A_ROW = 150
_SMOOTH_FROM = 150
_SAMPLES = 16


def plot_training(
    log_history: LogHistory,
    schedule: FeatureReuseSchedule,
    path: str | Path,
    *,
    block_names: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Write a PNG of a run: losses, evaluation accuracy and a raster of the dropped blocks, over the optimizer steps.

    Panels without data are left out. Needs matplotlib, which comes with `pip install "hf_featreuse[examples]"`.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`. Entries with `loss`,
            `loss/stochastic_depth`, `loss/masked_freeze`, `loss/vanilla` or `eval_loss` give the first panel,
            `eval_accuracy` and `eval_top5_accuracy`, from 0 to 1, the second.
        schedule (`FeatureReuseSchedule`): says for each step which blocks were dropped, the third panel.
        path (`str` or `Path`): the file to write; its folder is made if missing.
        block_names (`Sequence[str]`, *optional*): name of each block in forward order; block numbers by default.
        title (`str`, *optional*): printed above the panels.

    Returns:
        `Path`: the file, 1200 pixels wide.

    Raises:
        ConfigurationError: the log has no step, the names do not fit the blocks, or matplotlib is missing.

    Example:
        >>> import tempfile
        >>> from hf_featreuse import FeatureReuseSchedule
        >>> from hf_featreuse.plotting import plot_training
        >>> log = [{"step": 10, "loss/stochastic_depth": 2.3}, {"step": 20, "loss/stochastic_depth": 1.9}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_training(log, FeatureReuseSchedule(4), f"{folder}/training.png").name
        'training.png'
    """
    last_step = max((int(entry["step"]) for entry in log_history if "step" in entry), default=0)
    if last_step < 1:
        raise ConfigurationError(
            f"`log_history` has {len(log_history)} entries and none at a step of 1 or more, so there is nothing to "
            "plot. Call this after `trainer.train()`, with `logging_steps` at most the number of steps."
        )
    if block_names is not None and len(block_names) != schedule.num_blocks:
        raise ConfigurationError(
            f"`block_names` has {len(block_names)} names, but the schedule has {schedule.num_blocks} blocks. Pass the "
            "names of the blocks that the schedule was made for, in forward order."
        )
    # A plain Trainer logs no kinds of step, only the overall training loss.
    has_kinds = bool(_curves(log_history, _KIND_LOSSES))
    losses = _curves(log_history, (*(_KIND_LOSSES if has_kinds else _OVERALL_LOSS), *_EVALUATION_LOSS))
    accuracies = _curves(log_history, _ACCURACIES)
    shares = dropped_shares(schedule, last_step)
    panels = [bool(losses), bool(accuracies), bool(shares.any())]
    if not any(panels):
        raise ConfigurationError(
            f"`log_history` has no loss and no accuracy up to step {last_step}, and the schedule drops no block: "
            "there is nothing to plot. Pass `trainer.state.log_history` of a finished run."
        )
    heights = [2.6, 2.0, min(5.0, max(1.6, 0.2 * schedule.num_blocks))]
    figure, axes = _new_figure([h for h, has_data in zip(heights, panels, strict=True) if has_data], title)
    if losses:
        _draw_curves(axes[0], losses, "loss")
    if accuracies:
        _draw_curves(axes[int(panels[0])], accuracies, "accuracy (%)", factor=100.0)
    if shares.any():
        _draw_raster(axes[-1], shares, last_step, block_names)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].set_xlim(0, last_step)
    return save_figure(figure, path)


def plot_inspection(report: ModelReport, path: str | Path, *, title: str | None = None) -> Path:
    """Write a PNG of an inspected model: survival probability and share of arithmetic of each block, over depth.

    Needs matplotlib, which comes with `pip install "hf_featreuse[examples]"`.

    Args:
        report (`ModelReport`): from `inspect_model`. Without counted arithmetic, the second panel is left out.
        path (`str` or `Path`): the file to write; its folder is made if missing.
        title (`str`, *optional*): printed above the panels; by default the model and the expected costs.

    Returns:
        `Path`: the file, 1200 pixels wide.

    Raises:
        ConfigurationError: matplotlib is missing.

    Example:
        >>> import tempfile
        >>> from hf_featreuse import inspect_model
        >>> from hf_featreuse.plotting import plot_inspection
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_inspection(inspect_model("vit"), f"{folder}/vit.png").name
        'vit.png'
    """
    blocks = report.blocks
    arithmetic = [100 * block.share_of_arithmetic for block in blocks if block.share_of_arithmetic is not None]
    figure, axes = _new_figure([2.0] * (2 if arithmetic else 1), title or _inspection_title(report))
    survival = [block.survival_probability for block in blocks]
    _draw_bars(axes[0], survival, _BLUE, "survival probability")
    axes[0].set_ylim(0, 1)
    if arithmetic:
        _draw_bars(axes[1], arithmetic, _ORANGE, "arithmetic\n(% of a vanilla step)")
    _label_blocks(axes[-1], [block.name for block in blocks])
    return save_figure(figure, path)


def dropped_shares(schedule: FeatureReuseSchedule, num_steps: int, max_columns: int = _MAX_COLUMNS) -> np.ndarray:
    """Count how often each block was in D, for each kind of step and each column of the raster.

    Args:
        schedule (`FeatureReuseSchedule`): the schedule of the run.
        num_steps (`int`): optimizer steps of the run, at least 1.
        max_columns (`int`, defaults to 300): most columns to share the steps among. Columns hold equal numbers of
            steps, a multiple of 12 where above 12; the last one holds what is left. Of more than 24 steps in a column
            24 are counted, in two runs of 12 steps.

    Returns:
        `numpy.ndarray`: shape (2, num_blocks, columns): of the counted steps of a column, the share that was a
        stochastic-depth step, then a masked-freeze step, with this block in D.

    Example:
        >>> from hf_featreuse import FeatureReuseSchedule
        >>> from hf_featreuse.plotting import dropped_shares
        >>> dropped_shares(FeatureReuseSchedule(2, drop_rate=0.9, drop_rate_schedule="uniform"), 4, 2).shape
        (2, 2, 2)
    """
    steps_per_column = _column_width(num_steps, max_columns)
    columns = math.ceil(num_steps / steps_per_column)
    counts = np.zeros((2, schedule.num_blocks, columns))
    kinds = {"stochastic_depth": 0, "masked_freeze": 1}
    # With a set for every sample, a few samples stand for all.
    samples = {"batch_size": _SAMPLES} if schedule.drop_granularity == "sample" else {}
    for column in range(columns):
        steps = _counted_steps(column * steps_per_column, min((column + 1) * steps_per_column, num_steps))
        for step in steps:
            plan = schedule.plan(step, **samples)
            if plan.sample_masks is not None:
                counts[kinds[plan.kind.value], :, column] += plan.sample_masks.mean(0) / len(steps)
            elif plan.dropped:
                counts[kinds[plan.kind.value], list(plan.dropped), column] += 1 / len(steps)
    return counts


def _counted_steps(first: int, end: int) -> list[int]:
    """Steps from `first` to before `end`: all, or, where they are many, runs of whole cycles spread over them."""
    if end - first <= _MAX_COUNTED:
        return list(range(first, end))
    runs = range(first, end, _CYCLES)
    starts = runs[:: math.ceil(len(runs) / (_MAX_COUNTED // _CYCLES))]
    return [step for start in starts for step in range(start, min(start + _CYCLES, end))]


def _curves(log_history: LogHistory, keys: Sequence[tuple[str, str, str, str]]) -> list[_Curve]:
    """Collect the finite points of each key that the log has."""
    curves = []
    for key, name, colour, style in keys:
        points = [(int(entry["step"]), float(entry[key])) for entry in log_history if key in entry and "step" in entry]
        # A key may be logged as None, and a loss may be infinite: neither has a place on the axis.
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points:
            steps, values = zip(*points, strict=True)
            curves.append(((list(steps), list(values)), name, colour, style))
    return curves


def _column_width(num_steps: int, max_columns: int) -> int:
    """Give the steps in a column: a number that whole cycles of 2, 3, 4 or 6 steps fill, or stripes would appear."""
    least = math.ceil(num_steps / max_columns)
    return next((width for width in (1, 2, 4, 6, 12) if width >= least), _CYCLES * math.ceil(least / _CYCLES))


def empty_figure(height: float) -> Figure:
    """Make a figure of this height in inches and of the width of all; `ConfigurationError` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            'Plotting needs matplotlib, which is not installed. Run `pip install "hf_featreuse[examples]"`, or leave '
            "the plot out."
        ) from error
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _new_figure(heights: Sequence[float], title: str | None) -> tuple[Figure, list[Axes]]:
    """Make the figure and axes of these heights in inches, one above the other, that share their x axis."""
    # Each panel needs half an inch more, for its legend.
    figure = empty_figure(sum(heights) + 0.5 * len(heights) + 0.4)
    if title:
        figure.suptitle(title, fontsize=13)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    return figure, list(axes[:, 0])


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG and make its folder if missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=_DOTS_PER_INCH)
    return path


def _inspection_title(report: ModelReport) -> str:
    name = report.architecture if report.model == report.architecture else f"{report.model} ({report.architecture})"
    if not report.costs:
        return name
    depth, freeze, mean = (report.costs[key] for key in ("stochastic_depth", "masked_freeze", "mean"))
    expected = f"stochastic depth {depth:.2f}, masked freeze {freeze:.2f}, mean {mean:.2f}"
    return f"{name}\nexpected cost, vanilla step = 1: {expected}"


def _draw_bars(axes: Axes, values: Sequence[float], colour: str, label: str) -> None:
    """Draw one bar a block."""
    axes.bar(range(len(values)), values, width=0.75, color=colour)
    axes.set_ylabel(label)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_blocks(axes: Axes, names: Sequence[str]) -> None:
    """Name the blocks under their bars, every second or further one where they are many."""
    prefix = common_prefix(names)
    shown = range(0, len(names), math.ceil(len(names) / _MAX_COLUMN_LABELS))
    labels = [names[block].removeprefix(prefix) for block in shown]
    axes.set_xticks(list(shown), labels, fontsize=8)
    if len(labels) * max(map(len, labels)) > _CHARACTERS_IN_A_ROW:
        axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel(f"block of {prefix.rstrip('.')}, in forward order" if prefix else "block, in forward order")


def _draw_curves(axes: Axes, curves: Sequence[_Curve], label: str, factor: float = 1.0) -> None:
    """Draw one line a curve; long ones faintly, with their running mean on top."""
    longest = max(len(steps) for (steps, _), *_ in curves)
    for (steps, values), name, colour, style in curves:
        scaled = factor * np.asarray(values)
        if style == "-" and len(steps) < longest / 2:
            # A kind of step that few logs have: a line would suggest values in between.
            axes.plot(steps, scaled, ".", color=colour, markersize=6, label=name, clip_on=False)
        elif len(steps) >= _SMOOTH_FROM:
            axes.plot(steps, scaled, color=colour, linewidth=0.6, alpha=0.3)
            window = len(steps) // 50
            smooth = np.convolve(scaled, np.ones(window) / window, mode="valid")
            centres = steps[(window - 1) // 2 :][: len(smooth)]
            axes.plot(centres, smooth, style, color=colour, linewidth=1.6, label=f"{name} (running mean)")
        else:
            marker = "o" if len(steps) <= 30 else ""
            axes.plot(
                steps,
                scaled,
                style,
                color=colour,
                linewidth=1.6,
                marker=marker,
                markersize=3.5,
                label=name,
                clip_on=False,
            )
    axes.set_ylabel(label)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    _legend_above(axes)


def _draw_raster(axes: Axes, shares: np.ndarray, last_step: int, block_names: Sequence[str] | None) -> None:
    """Draw which blocks were in D: one cell a step, or two half rows of shares where steps share a column."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    _, num_blocks, columns = shares.shape
    width = _column_width(last_step, _MAX_COLUMNS)
    blue, orange = np.array(to_rgb(_BLUE)), np.array(to_rgb(_ORANGE))
    depth, freeze = shares[..., None]
    handles = [
        Patch(color=_BLUE, label="stochastic depth: dropped"),
        Patch(color=_ORANGE, label="masked freeze: trained"),
    ]
    if width == 1:
        image = 1 + depth * (blue - 1) + freeze * (orange - 1)
    else:
        # The darkest shade is the largest share, so that low drop rates show too.
        most = shares.max()
        halves = [1 + depth / most * (blue - 1), 1 + freeze / most * (orange - 1)]
        image = np.stack(halves, axis=1).reshape(2 * num_blocks, columns, 3)
        counted = f"{_MAX_COUNTED} of " if width > _MAX_COUNTED else ""
        handles.append(Patch(alpha=0, label=f"shade: share of {counted}each {width} steps, darkest {most:.0%}"))
    axes.imshow(
        np.round(255 * image).astype(np.uint8),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, columns * width, -0.5, num_blocks - 0.5),
    )
    if num_blocks <= 2 * _MAX_ROW_LABELS:
        for edge in range(1, num_blocks):
            axes.axhline(edge - 0.5, color="white", linewidth=1.5)
    names = [str(block) for block in range(num_blocks)] if block_names is None else list(block_names)
    prefix = common_prefix(names) if block_names is not None else ""
    shown = range(0, num_blocks, math.ceil(num_blocks / _MAX_ROW_LABELS))
    axes.set_yticks(list(shown), [names[block].removeprefix(prefix) for block in shown], fontsize=8)
    axes.set_ylabel(f"block of\n{prefix.rstrip('.')}" if prefix else "block")
    axes.spines[["top", "right"]].set_visible(False)
    _legend_above(axes, handles)


def _legend_above(axes: Axes, handles: list[Any] | None = None) -> None:
    """Put the legend over the panel, where it hides nothing."""
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=5,
        frameon=False,
        fontsize=9,
        borderaxespad=0.2,
        handlelength=1.8,
    )
