"""Evaluate trained classifiers and use them: accuracy by class, calibration, predictions, exports."""

from hf_featreuse.evaluation.evaluating import evaluate_model
from hf_featreuse.evaluation.exporting import Exported, export_model
from hf_featreuse.evaluation.page import write_evaluation
from hf_featreuse.evaluation.predicting import predict_files
from hf_featreuse.evaluation.results import CalibrationBin, ClassScores, Evaluation, Mistake

__all__ = [
    "CalibrationBin",
    "ClassScores",
    "Evaluation",
    "Exported",
    "Mistake",
    "evaluate_model",
    "export_model",
    "predict_files",
    "write_evaluation",
]
