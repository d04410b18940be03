"""Draw a training run: losses of each kind of step, accuracy and dropped blocks, over the optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.plotting.figure import BLUE, GRAY, GREEN, ORANGE, PURPLE, legend_above, save_figure, stacked_axes
from hf_featreuse.text import common_prefix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hf_featreuse.method.schedule import FeatureReuseSchedule

LogHistory = Sequence[Mapping[str, Any]]
# (steps, values), name in the legend, color, line style.
_Curve = tuple[tuple[list[int], list[float]], str, str, str]

# Key in the log, name in the legend, color, line style.
_KIND_LOSSES = (
    ("loss/stochastic_depth", "stochastic depth", BLUE, "-"),
    ("loss/masked_freeze", "masked freeze", ORANGE, "-"),
    ("loss/vanilla", "vanilla", GRAY, "-"),
)
_OVERALL_LOSS = (("loss", "training", GRAY, "-"),)
_EVALUATION_LOSS = (("eval_loss", "evaluation", GREEN, "--"),)
_ACCURACIES = (("eval_accuracy", "top-1", GREEN, "-"), ("eval_top5_accuracy", "top-5", PURPLE, "--"))
# About three pixels each; narrower ones blur.
_MAX_COLUMNS = 300
# Columns hold whole cycles: this many steps is a multiple of the usual lengths of a cycle.
_CYCLES = 12
# Steps per column that are counted: a plan takes about 60 microseconds, and a run may have millions of steps.
_MAX_COUNTED = 2 * _CYCLES
_MAX_ROW_LABELS = 16
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

    Panels without data are left out. Requires matplotlib, which is installed by
    `pip install "hf_featreuse[plot]"`.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`. Entries with `loss`,
            `loss/stochastic_depth`, `loss/masked_freeze`, `loss/vanilla` or `eval_loss` give the first panel,
            `eval_accuracy` and `eval_top5_accuracy`, from 0 to 1, the second.
        schedule (`FeatureReuseSchedule`): the schedule, which gives the blocks dropped in each step, the third panel.
        path (`str` or `Path`): the file to write; its folder is created if missing.
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
            f"`log_history` has {len(log_history)} entries, none of them at a step of 1 or more, so there is nothing "
            "to plot. Call this after `trainer.train()`, with `logging_steps` at most the number of steps."
        )
    if block_names is not None and len(block_names) != schedule.num_blocks:
        raise ConfigurationError(
            f"`block_names` has {len(block_names)} names, but the schedule has {schedule.num_blocks} blocks. Pass the "
            "names of the blocks of the schedule, in forward order."
        )
    # A plain Trainer logs only the overall training loss, not that of each kind of step.
    has_kinds = bool(_curves(log_history, _KIND_LOSSES))
    losses = _curves(log_history, (*(_KIND_LOSSES if has_kinds else _OVERALL_LOSS), *_EVALUATION_LOSS))
    accuracies = _curves(log_history, _ACCURACIES)
    shares = dropped_shares(schedule, last_step)
    panels = [bool(losses), bool(accuracies), bool(shares.any())]
    if not any(panels):
        raise ConfigurationError(
            f"`log_history` has no loss and no accuracy up to step {last_step}, and the schedule drops no block, so "
            "there is nothing to plot. Pass `trainer.state.log_history` of a finished run."
        )
    heights = [2.6, 2.0, min(5.0, max(1.6, 0.2 * schedule.num_blocks))]
    figure, axes = stacked_axes([h for h, has_data in zip(heights, panels, strict=True) if has_data], title)
    if losses:
        _draw_curves(axes[0], losses, "loss")
    if accuracies:
        _draw_curves(axes[int(panels[0])], accuracies, "accuracy (%)", factor=100.0)
    if shares.any():
        _draw_raster(axes[-1], shares, last_step, block_names)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].set_xlim(0, last_step)
    return save_figure(figure, path)


def dropped_shares(schedule: FeatureReuseSchedule, num_steps: int, max_columns: int = _MAX_COLUMNS) -> np.ndarray:
    """Return how often each block was in D, for each kind of step and each column of the raster.

    Args:
        schedule (`FeatureReuseSchedule`): the schedule of the run.
        num_steps (`int`): optimizer steps of the run, at least 1.
        max_columns (`int`, defaults to 300): maximum number of columns. Columns hold equal numbers of steps, a
            multiple of 12 if above 12; the last one holds the rest. If a column holds more than 24 steps, 24 are
            counted, in two runs of 12 steps.

    Returns:
        `numpy.ndarray`: shape (2, num_blocks, columns): the share of the counted steps of a column that were
        stochastic-depth steps, and masked-freeze steps, with this block in D.

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
    # With one set per sample, a few samples represent all.
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
    """Return the steps from `first` to before `end`; if there are many, runs of whole cycles spread over them."""
    if end - first <= _MAX_COUNTED:
        return list(range(first, end))
    runs = range(first, end, _CYCLES)
    starts = runs[:: math.ceil(len(runs) / (_MAX_COUNTED // _CYCLES))]
    return [step for start in starts for step in range(start, min(start + _CYCLES, end))]


def _curves(log_history: LogHistory, keys: Sequence[tuple[str, str, str, str]]) -> list[_Curve]:
    """Collect the finite points of each key that the log has."""
    curves = []
    for key, name, color, style in keys:
        points = [(int(entry["step"]), float(entry[key])) for entry in log_history if key in entry and "step" in entry]
        # A key may be logged as None, and a loss may be infinite: neither can be drawn.
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points:
            steps, values = zip(*points, strict=True)
            curves.append(((list(steps), list(values)), name, color, style))
    return curves


def _column_width(num_steps: int, max_columns: int) -> int:
    """Return the number of steps per column: a multiple of cycles of 2, 3, 4 or 6 steps, to avoid stripes."""
    least = math.ceil(num_steps / max_columns)
    return next((width for width in (1, 2, 4, 6, 12) if width >= least), _CYCLES * math.ceil(least / _CYCLES))


def _draw_curves(axes: Axes, curves: Sequence[_Curve], label: str, factor: float = 1.0) -> None:
    """Draw one line per curve; long ones faintly, with their running mean on top."""
    longest = max(len(steps) for (steps, _), *_ in curves)
    for (steps, values), name, color, style in curves:
        scaled = factor * np.asarray(values)
        if style == "-" and len(steps) < longest / 2:
            # A kind of step that few logs have: a line would suggest values in between.
            axes.plot(steps, scaled, ".", color=color, markersize=6, label=name, clip_on=False)
        elif len(steps) >= _SMOOTH_FROM:
            axes.plot(steps, scaled, color=color, linewidth=0.6, alpha=0.3)
            window = len(steps) // 50
            smooth = np.convolve(scaled, np.ones(window) / window, mode="valid")
            centers = steps[(window - 1) // 2 :][: len(smooth)]
            axes.plot(centers, smooth, style, color=color, linewidth=1.6, label=f"{name} (running mean)")
        else:
            marker = "o" if len(steps) <= 30 else ""
            axes.plot(
                steps,
                scaled,
                style,
                color=color,
                linewidth=1.6,
                marker=marker,
                markersize=3.5,
                label=name,
                clip_on=False,
            )
    axes.set_ylabel(label)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    legend_above(axes)


def _draw_raster(axes: Axes, shares: np.ndarray, last_step: int, block_names: Sequence[str] | None) -> None:
    """Draw which blocks were in D: one cell per step, or two half rows of shares if several steps share a column."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    _, num_blocks, columns = shares.shape
    width = _column_width(last_step, _MAX_COLUMNS)
    blue, orange = np.array(to_rgb(BLUE)), np.array(to_rgb(ORANGE))
    depth, freeze = shares[..., None]
    handles = [
        Patch(color=BLUE, label="stochastic depth: dropped"),
        Patch(color=ORANGE, label="masked freeze: trained"),
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
    legend_above(axes, handles)
