"""Evaluate a trained classifier, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from hf_featreuse.analysis.analyzing import labels_of
from hf_featreuse.analysis.statistics import Accuracy
from hf_featreuse.errors import ConfigurationError, DataError
from hf_featreuse.evaluation.results import CalibrationBin, ClassScores, Evaluation, Mistake
from hf_featreuse.method.dummy_forward import model_inputs, undisturbed

CALIBRATION_BINS = 15


def evaluate_model(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    label_names: Sequence[str],
    *,
    num_mistakes: int = 24,
    name: str | None = None,
    notes: Sequence[str] = (),
    disable_tqdm: bool | None = None,
) -> Evaluation:
    """Measure accuracy, scores of each class, confusions and calibration of a trained classifier.

    Runs each batch once, in eval mode and without gradients, and keeps four numbers per image. The model stays on its
    device; modes, buffers and torch's random state are as before afterwards. Requires scikit-learn.

    Args:
        model (`torch.nn.Module`): an image classifier with one class per image.
        batches (`Iterable[dict[str, torch.Tensor]]`): inputs of the model's forward, such as `pixel_values` of shape
            (batch, 3, height, width), and `labels`, int64 of shape (batch,), where -100 means no label.
        label_names (`Sequence[str]`): names of the model's classes, in the order of their ids.
        num_mistakes (`int`, defaults to 24): how many of the most confident mistakes to keep.
        name (`str`, *optional*): name of the model in the result; by default its class.
        notes (`Sequence[str]`): added to the result.
        disable_tqdm (`bool`, *optional*): whether to hide the progress bar; by default it is shown unless
            transformers' log level is above warnings.

    Returns:
        `Evaluation`: print it for a report; `evaluation.to_dict()` for JSON.

    Raises:
        ConfigurationError: scikit-learn is missing, or `label_names` does not fit the model.
        DataError: there is no labeled image, or a label is not a class of the model.

    Source:
        Expected calibration error with 15 bins of equal width: Guo et al. 2017, "On Calibration of Modern Neural
        Networks" (arXiv 1706.04599).

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse.evaluation import evaluate_model
        >>> config = ViTConfig(
        ...     hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32
        ... )
        >>> batch = {"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.tensor([0, 1] * 4)}
        >>> evaluation = evaluate_model(ViTForImageClassification(config), [batch], ["cat", "dog"])
        >>> evaluation.accuracy.total, [scores.support for scores in evaluation.classes]
        (8, [4, 4])
    """
    _scikit_learn()
    quiet = transformers.logging.get_verbosity() > logging.WARNING if disable_tqdm is None else disable_tqdm
    title = name or type(model).__name__
    total = len(batches) if isinstance(batches, Sized) else None
    parts, seen = [], 0
    with undisturbed(model), torch.inference_mode():
        for batch in tqdm(batches, total=total, desc=f"Evaluating {title}", unit="batch", disable=quiet):
            labels = labels_of(batch)
            parts.append(_outcomes(model, batch, labels, len(label_names), seen))
            seen += len(labels)
    if not parts or not sum(len(part["label"]) for part in parts):
        raise DataError(
            "No image has a label (-100 means none), so there is nothing to evaluate. Pass labeled images."
        )
    found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    hits = found["label"] == found["predicted"]
    classes, confusion = _by_class(found["label"], found["predicted"], label_names)
    calibration = calibration_bins(found["confidence"], hits)
    return Evaluation(
        model=title,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        accuracy=Accuracy.of(int(hits.sum()), len(hits)),
        top5_accuracy=float((found["rank"] < 5).mean()) if len(label_names) > 5 else None,
        loss=float(-np.log(np.maximum(found["label_probability"], np.finfo(np.float64).tiny)).mean()),
        macro_f1=float(np.mean([scores.f1 or 0.0 for scores in classes if scores.support])),
        calibration_error=calibration_error(calibration),
        classes=classes,
        confusion=confusion,
        calibration=calibration,
        mistakes=_most_confident_mistakes(found, hits, label_names, num_mistakes),
        notes=list(notes),
    )


def _outcomes(
    model: nn.Module, batch: Mapping[str, Any], labels: torch.Tensor, num_classes: int, first_index: int
) -> dict[str, np.ndarray]:
    """Return the values to keep for each labeled image of a batch."""
    args, kwargs = model_inputs(model, batch)
    output = model(*args, **kwargs)
    logits = output["logits"] if isinstance(output, Mapping) else output if torch.is_tensor(output) else output[0]
    if logits.shape != (len(labels), num_classes):
        raise ConfigurationError(
            f"`label_names` has {num_classes} names, but the model returns logits of shape {tuple(logits.shape)} for "
            f"{len(labels)} images. Pass one name per class of the model."
        )
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= num_classes))]
    if len(wrong):
        raise DataError(
            f"A batch holds the label {int(wrong[0])}, but the model has {num_classes} classes. Pass labels from 0 to "
            f"{num_classes - 1}."
        )
    there = (labels != -100).nonzero().flatten()
    probabilities = logits.double().softmax(-1).cpu()[there]
    labels = labels[there]
    confidence, predicted = probabilities.max(-1)
    own = probabilities.gather(1, labels[:, None]).squeeze(1)
    return {
        "index": first_index + there.numpy(),
        "label": labels.numpy(),
        "predicted": predicted.numpy(),
        "confidence": confidence.numpy(),
        "label_probability": own.numpy(),
        "rank": (probabilities > own[:, None]).sum(1).numpy(),
    }


def _by_class(
    labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]
) -> tuple[list[ClassScores], list[list[int]]]:
    """Return the scores of each class, and the confusion matrix."""
    metrics, ids = _scikit_learn(), np.arange(len(names))
    found = metrics.precision_recall_fscore_support(labels, predicted, labels=ids, zero_division=np.nan)
    precision, recall, f1, support = map(np.asarray, found)
    confusion = np.asarray(metrics.confusion_matrix(labels, predicted, labels=ids))
    occurs = confusion.sum(0) + confusion.sum(1) > 0
    scores = [
        ClassScores(
            str(name),
            _known(precision[index]),
            _known(recall[index]),
            # A class that occurs but was never predicted correctly has an F1 of zero, not `None`.
            (_known(f1[index]) or 0.0) if occurs[index] else None,
            int(support[index]),
        )
        for index, name in enumerate(names)
    ]
    return scores, confusion.tolist()


def calibration_bins(confidence: np.ndarray, hits: np.ndarray) -> list[CalibrationBin]:
    """Sort images by confidence into bins of equal width.

    Args:
        confidence (`numpy.ndarray`): highest probability of each image, from 0 to 1.
        hits (`numpy.ndarray`): whether each image was classified correctly.
    """
    places = np.clip(np.ceil(confidence * CALIBRATION_BINS) - 1, 0, CALIBRATION_BINS - 1).astype(int)
    bins = []
    for index in range(CALIBRATION_BINS):
        inside = places == index
        count = int(inside.sum())
        means = (float(confidence[inside].mean()), float(hits[inside].mean())) if count else (None, None)
        bins.append(CalibrationBin(index / CALIBRATION_BINS, (index + 1) / CALIBRATION_BINS, count, *means))
    return bins


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Return the expected calibration error: mean gap of confidence and accuracy over the bins, weighted by images."""
    total = sum(one.count for one in bins)
    return sum(one.count / total * abs((one.confidence or 0) - (one.accuracy or 0)) for one in bins if one.count)


def _most_confident_mistakes(
    found: Mapping[str, np.ndarray], hits: np.ndarray, names: Sequence[str], count: int
) -> list[Mistake]:
    wrong = np.flatnonzero(~hits)
    order = wrong[np.argsort(-found["confidence"][wrong], kind="stable")][:count].tolist()
    return [
        Mistake(
            int(found["index"][row]),
            str(names[int(found["label"][row])]),
            str(names[int(found["predicted"][row])]),
            float(found["confidence"][row]),
            float(found["label_probability"][row]),
        )
        for row in order
    ]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _scikit_learn() -> Any:
    """Return the module `sklearn.metrics`."""
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ConfigurationError(
            'Scores of each class need scikit-learn, which is not installed. Run `pip install "hf_featreuse[plot]"`.'
        ) from error
    return metrics
