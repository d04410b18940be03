"""Create figures of one width and their parts.

The colors are those of Okabe and Ito (2008), which color-blind readers can tell apart. matplotlib is imported when a
figure is created, and draws without pyplot, so that an application's figures and backend do not change.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_featreuse.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GRAY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#666666", "#CC79A7"
_WIDTH_INCHES, _DOTS_PER_INCH = 10.0, 120


def empty_figure(height: float) -> Figure:
    """Create a figure of this height in inches and the common width; raise `ConfigurationError` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            'Plotting needs matplotlib, which is not installed. Run `pip install "hf_featreuse[plot]"`, or leave '
            "out the plot."
        ) from error
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def stacked_axes(heights: Sequence[float], title: str | None) -> tuple[Figure, list[Axes]]:
    """Create a figure with axes of these heights in inches, one above the other, that share their x axis."""
    # Each panel needs half an inch more, for its legend.
    figure = empty_figure(sum(heights) + 0.5 * len(heights) + 0.4)
    if title:
        figure.suptitle(title, fontsize=13)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    return figure, list(axes[:, 0])


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG; create its folder if missing."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # Names of models and folders may hold `$`.
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # matplotlib draws boxes for them; pages and JSON files have the names.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure.savefig(path, format="png", dpi=_DOTS_PER_INCH)
    return path


def legend_above(axes: Axes, handles: list[Any] | None = None) -> None:
    """Put the legend above the panel, where it hides nothing."""
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
