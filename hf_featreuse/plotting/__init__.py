"""Draw a training run as a PNG file, and provide the figure for other plots."""

from hf_featreuse.plotting.figure import empty_figure, save_figure
from hf_featreuse.plotting.training import dropped_shares, plot_training

__all__ = ["dropped_shares", "empty_figure", "plot_training", "save_figure"]
