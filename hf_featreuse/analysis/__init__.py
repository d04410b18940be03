"""Analyze a trained model: what each residual block does to the features, and the accuracy without it."""

from hf_featreuse.analysis.analyzing import analyze_model
from hf_featreuse.analysis.report import write_report
from hf_featreuse.analysis.results import BlockAnalysis, ModelAnalysis, RandomDrop
from hf_featreuse.analysis.similarity import linear_cka
from hf_featreuse.analysis.statistics import Accuracy, wilson_interval

__all__ = [
    "Accuracy",
    "BlockAnalysis",
    "ModelAnalysis",
    "RandomDrop",
    "analyze_model",
    "linear_cka",
    "wilson_interval",
    "write_report",
]
