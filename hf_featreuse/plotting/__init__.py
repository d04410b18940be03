"""Pictures of a training run and of a model before training, as PNG files."""

from hf_featreuse.plotting.figure import empty_figure, save_figure
from hf_featreuse.plotting.inspection import plot_inspection
from hf_featreuse.plotting.training import dropped_shares, plot_training

__all__ = ["dropped_shares", "empty_figure", "plot_inspection", "plot_training", "save_figure"]
