"""The results of an evaluation, as dataclasses and as text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hf_featreuse.analysis.results import described
from hf_featreuse.analysis.statistics import Accuracy
from hf_featreuse.text import aligned

_MOST_ROWS = 30


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class.

    Args:
        name (`str`): name of the class.
        precision (`float`, *optional*): share of the images predicted as this class that belong to it; `None` if no
            image was predicted as this class.
        recall (`float`, *optional*): share of the images of this class that were predicted as it; `None` if no image
            belongs to it.
        f1 (`float`, *optional*): harmonic mean of precision and recall; `None` if the class occurs neither as a label
            nor as a prediction.
        support (`int`): images of this class.
    """

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose highest probability lies in (low, high].

    Args:
        low (`float`): lower end of the bin.
        high (`float`): upper end of the bin.
        count (`int`): number of images.
        confidence (`float`, *optional*): mean over these images; `None` without images.
        accuracy (`float`, *optional*): share of these images classified correctly; `None` without images.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Mistake:
    """An image that was classified wrongly.

    Args:
        index (`int`): position of the image among the evaluated ones, from 0.
        label (`str`): name of its class.
        predicted (`str`): name of the predicted class.
        confidence (`float`): probability of the predicted class.
        label_probability (`float`): probability of its own class.
    """

    index: int
    label: str
    predicted: str
    confidence: float
    label_probability: float


@dataclass(frozen=True)
class Evaluation:
    """How well a trained model classifies, from [`evaluate_model`]. `str(evaluation)` is a report.

    Args:
        model (`str`): the name given, or the class of the model.
        architecture (`str`): class of the model.
        parameters (`int`): number of parameters.
        accuracy (`Accuracy`): share of the images classified correctly, with its 95 % Wilson interval.
        top5_accuracy (`float`, *optional*): share of the images whose class is among the five most probable; `None`
            with five classes or fewer.
        loss (`float`): mean cross-entropy, in nats.
        macro_f1 (`float`): mean F1 of the classes that occur as a label.
        calibration_error (`float`): expected calibration error over the bins, from 0 to 1.
        classes (`list[ClassScores]`): in the order of the model's classes.
        confusion (`list[list[int]]`): images by class (rows) and predicted class (columns), in the same order.
        calibration (`list[CalibrationBin]`): 15 bins of equal width, from confidence 0 to 1.
        mistakes (`list[Mistake]`): the most confident mistakes, most confident first.
        notes (`list[str]`): notes for reading the figures.
    """

    model: str
    architecture: str
    parameters: int
    accuracy: Accuracy
    top5_accuracy: float | None
    loss: float
    macro_f1: float
    calibration_error: float
    classes: list[ClassScores]
    confusion: list[list[int]]
    calibration: list[CalibrationBin]
    mistakes: list[Mistake]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as dicts, lists, strings and numbers, for JSON."""
        return dataclasses.asdict(self)

    def most_confused(self, count: int = 10) -> list[tuple[str, str, int]]:
        """Return the most frequent mistakes: class, predicted class and number of images, most frequent first."""
        names = [scores.name for scores in self.classes]
        pairs = [
            (names[label], names[predicted], images)
            for label, row in enumerate(self.confusion)
            for predicted, images in enumerate(row)
            if images and label != predicted
        ]
        return sorted(pairs, key=lambda pair: -pair[2])[:count]

    def summary(self) -> dict[str, str]:
        """Return the scores of the whole model as text, by name."""
        top5 = {} if self.top5_accuracy is None else {"top-5 accuracy": f"{self.top5_accuracy:.1%}"}
        return {
            "accuracy": described(self.accuracy),
            **top5,
            "mean F1 of the classes": f"{self.macro_f1:.3f}",
            "loss": f"{self.loss:.4f}",
            "expected calibration error": f"{self.calibration_error:.3f}",
        }

    def __str__(self) -> str:
        name = self.architecture if self.model == self.architecture else f"{self.model}: {self.architecture}"
        lines = [f"{name}, {self.parameters:,} parameters"]
        lines += [f"{key}: {value}" for key, value in self.summary().items()]
        shown = self.classes if len(self.classes) <= _MOST_ROWS else self._weakest()
        rows = [["class", *SCORE_COLUMNS], *([scores.name, *score_cells(scores)] for scores in shown)]
        left_out = len(self.classes) - len(shown)
        more = [f"({left_out} more classes; these have the lowest F1.)"] if left_out else []
        return "\n".join([*lines, "", *aligned(rows), *more, *(f"\nNote: {note}" for note in self.notes)])

    def _weakest(self) -> list[ClassScores]:
        """Return the classes with the lowest F1, of those that occur."""
        found = sorted((scores for scores in self.classes if scores.f1 is not None), key=lambda scores: scores.f1 or 0)
        return found[:_MOST_ROWS]


SCORE_COLUMNS = ("precision", "recall", "F1", "images")


def score_cells(scores: ClassScores) -> list[str]:
    """Return the cells of a class in a table, in the order of `SCORE_COLUMNS`."""
    shares = ("-" if value is None else f"{value:.3f}" for value in (scores.precision, scores.recall, scores.f1))
    return [*shares, str(scores.support)]
