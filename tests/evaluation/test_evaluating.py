"""Scores of a trained classifier, compared with figures computed by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hf_featreuse import ConfigurationError, DataError

pytest.importorskip("sklearn", reason="scores of each class need the extra `examples`")
pytest.importorskip("matplotlib", reason="plots need the extra `examples`")

from hf_featreuse.evaluation import evaluate_model, write_evaluation
from hf_featreuse.evaluation.evaluating import calibration_bins, calibration_error

NAMES = ["ant", "bee", "<cat>"]


class Table(nn.Module):
    """Returns its input as logits."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values):
        return self.scale * pixel_values


def batches(probabilities, labels, size=2):
    logits, labels = torch.tensor(probabilities).log(), torch.tensor(labels)
    return [
        {"pixel_values": logits[i : i + size], "labels": labels[i : i + size]} for i in range(0, len(labels), size)
    ]


# Class, and probability of each class; the last image has no label.
PROBABILITIES = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1], [0.9, 0.06, 0.04], [0.3, 0.3, 0.4]]
LABELS = [0, 1, 1, 1, -100]


@pytest.fixture
def evaluation():
    return evaluate_model(Table(), batches(PROBABILITIES, LABELS), NAMES, disable_tqdm=True)


def test_scores_are_those_computed_by_hand(evaluation):
    assert (evaluation.accuracy.correct, evaluation.accuracy.total) == (2, 4)
    assert evaluation.confusion == [[1, 0, 0], [2, 1, 0], [0, 0, 0]]
    ant, bee, cat = evaluation.classes
    assert (ant.precision, ant.recall, ant.support) == (pytest.approx(1 / 3), 1.0, 1)
    assert (bee.precision, bee.recall, bee.support) == (1.0, pytest.approx(1 / 3), 3)
    assert ant.f1 == bee.f1 == pytest.approx(0.5)
    assert (cat.precision, cat.recall, cat.f1, cat.support) == (None, None, None, 0)
    assert evaluation.macro_f1 == pytest.approx(0.5)
    assert evaluation.loss == pytest.approx(-np.log([0.7, 0.8, 0.4, 0.06]).mean(), rel=1e-6)
    assert evaluation.top5_accuracy is None
    assert evaluation.most_confused() == [("bee", "ant", 2)]


def test_calibration_error_is_the_mean_gap_of_fifteen_bins(evaluation):
    # Confidences 0.7, 0.8, 0.5 and 0.9 lie in separate bins.
    assert [one.count for one in evaluation.calibration].count(1) == 4
    assert evaluation.calibration_error == pytest.approx((0.3 + 0.2 + 0.5 + 0.9) / 4, rel=1e-6)


def test_the_ends_of_the_bins():
    bins = calibration_bins(np.array([0.0, 1 / 15, 1.0]), np.array([True, True, False]))
    assert [one.count for one in bins] == [2, *[0] * 13, 1]
    assert calibration_error(bins) == pytest.approx((2 * (1 - 1 / 30) + 1) / 3)


def test_mistakes_come_most_confident_first(evaluation):
    assert [(one.index, one.label, one.predicted) for one in evaluation.mistakes] == [
        (3, "bee", "ant"),
        (2, "bee", "ant"),
    ]
    assert evaluation.mistakes[0].confidence == pytest.approx(0.9)
    assert evaluation.mistakes[0].label_probability == pytest.approx(0.06)


def test_a_class_that_is_never_predicted_correctly_has_an_f1_of_zero():
    found = evaluate_model(Table(), batches([[0.9, 0.1]], [1]), ["a", "b"], disable_tqdm=True)
    assert [scores.f1 for scores in found.classes] == [0.0, 0.0]


def test_top_five_counts_classes_that_are_strictly_better():
    probabilities = [[0.3, 0.2, 0.2, 0.1, 0.1, 0.06, 0.04], [0.3, 0.2, 0.2, 0.1, 0.1, 0.06, 0.04]]
    found = evaluate_model(Table(), batches(probabilities, [4, 5]), list("abcdefg"), disable_tqdm=True)
    assert found.top5_accuracy == 0.5


def test_the_model_does_not_change():
    model = Table().train()
    evaluate_model(model, batches(PROBABILITIES, LABELS), NAMES, disable_tqdm=True)
    assert model.training and model.scale.grad is None


@pytest.mark.parametrize(
    ("labels", "names", "error", "message"),
    [
        ([-100] * 5, NAMES, DataError, "No image has a label"),
        ([0, 1, 3, 0, 0], NAMES, DataError, "label 3, but the model has 3 classes"),
        ([0, -1, 1, 0, 0], NAMES, DataError, "label -1"),
        (LABELS, NAMES[:2], ConfigurationError, "2 names"),
    ],
)
def test_what_cannot_be_scored_is_refused(labels, names, error, message):
    with pytest.raises(error, match=message):
        evaluate_model(Table(), batches(PROBABILITIES, labels), names, disable_tqdm=True)


def test_no_batch_is_refused():
    with pytest.raises(DataError, match="No image has a label"):
        evaluate_model(Table(), [], NAMES, disable_tqdm=True)


def test_the_report_holds_the_same_figures_and_escapes_names(evaluation, tmp_path):
    page = write_evaluation(
        evaluation, tmp_path / "report", image=lambda index: Image.new("RGB", (300, 200)), data={"data": "<b>"}
    )
    content = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert content["accuracy"]["correct"] == 2 and content["data"] == {"data": "<b>"}
    text = page.read_text(encoding="utf-8")
    assert "&lt;cat&gt;" in text and "<cat>" not in text and "data: &lt;b&gt;" in text
    assert text.count("<figure>") == 2 and text.count("data:image/png;base64") == 4
    assert "http" not in text
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "confusion.png",
        "evaluation.json",
        "index.html",
        "reliability.png",
    ]


def test_many_classes_get_no_confusion_matrix(tmp_path):
    names = [f"class {index}" for index in range(41)]
    probabilities = torch.full((2, 41), 1 / 41).tolist()
    found = evaluate_model(Table(), batches(probabilities, [0, 1]), names, disable_tqdm=True)
    write_evaluation(found, tmp_path / "report")
    assert not (tmp_path / "report" / "confusion.png").exists()
    assert "(39 more classes; these have the lowest F1.)" in str(found)


def test_a_folder_with_files_is_refused_and_not_changed(evaluation, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigurationError, match="is not empty"):
        write_evaluation(evaluation, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    write_evaluation(evaluation, tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").exists() and (tmp_path / "index.html").exists()
