"""Inspect a model before training: its residual blocks, the cost of each kind of step, what cannot be skipped."""

from hf_featreuse.inspection.inspecting import inspect_model
from hf_featreuse.inspection.others import NotSkippable
from hf_featreuse.inspection.plot import plot_inspection
from hf_featreuse.inspection.report import BlockReport, ModelReport
from hf_featreuse.inspection.timing import Timing

__all__ = ["BlockReport", "ModelReport", "NotSkippable", "Timing", "inspect_model", "plot_inspection"]
