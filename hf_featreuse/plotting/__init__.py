"""Pictures as PNG files: a training run, and the figure that others draw into."""

from hf_featreuse.plotting.figure import empty_figure, save_figure
from hf_featreuse.plotting.training import dropped_shares, plot_training

__all__ = ["dropped_shares", "empty_figure", "plot_training", "save_figure"]
