"""Read the option for class weights: balanced by the training labels, from a JSON file, or numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.recipe.losses import IGNORED, balanced_weights
from hf_featreuse.text import did_you_mean

logger = logging.get_logger(__name__)

BALANCED = "balanced"
_FIX = 'Pass "balanced", a JSON file with a list of numbers or an object from class names to numbers, or the numbers.'


def check_class_weights(option: object) -> None:
    """Raise `ConfigurationError` unless the option is valid; a file is not opened yet."""
    if option is None or option == BALANCED:
        return
    if isinstance(option, str) and _number(option) is None:
        if not Path(option).is_file():
            raise ConfigurationError(f'`class_weights={option!r}` is neither a file nor "balanced". {_FIX}')
        return
    values = [option] if isinstance(option, str) else option
    if not isinstance(values, Sequence) or not values or None in [_number(value) for value in values]:
        raise ConfigurationError(f"`class_weights={option!r}` is not a list of numbers of at least 0. {_FIX}")


def _number(value: Any) -> float | None:
    """Read a weight; `None` if it is not one."""
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else -1.0
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None


def class_weights(
    option: str | Sequence[Any] | None, label_names: Sequence[str] | None, train_labels: Any, *, several: bool
) -> list[float] | None:
    """Return the weight of each class.

    Args:
        option (`str` or `list`, *optional*): as the user passed it.
        label_names (`Sequence[str]`, *optional*): names of the classes in the order of their ids, if known.
        train_labels (`Callable`): returns the training labels as an array; `None` if there is no training data.
        several (`bool`): whether an image has several labels.

    Raises:
        ConfigurationError: the number of weights is not the number of classes, or a file cannot be read.
    """
    if option is None:
        return None
    if option == BALANCED:
        labels = train_labels()
        if labels is None:
            logger.warning_once(
                '`class_weights="balanced"` has no training data to count, so the evaluation loss is not weighted.'
            )
            return None
        return _balanced(np.asarray(labels), len(label_names or ()), several)
    values: Any = option
    if isinstance(option, str) and _number(option) is None:
        try:
            values = json.loads(Path(option).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"`class_weights={option!r}` cannot be read as JSON: {error}. {_FIX}") from error
        if isinstance(values, Mapping):
            values = _by_name(values, label_names or (), option)
    values = [values] if isinstance(values, (str, int, float)) else values
    numbers = [_number(value) for value in values] if isinstance(values, Sequence) else [None]
    classes = len(numbers) if label_names is None else len(label_names)
    if None in numbers or len(numbers) != classes:
        raise ConfigurationError(
            f"`class_weights={option!r}` has {len(numbers)} entries, but the model has {classes} classes; each needs "
            f"one number of at least 0. {_FIX}"
        )
    return [number for number in numbers if number is not None]


def _by_name(values: Mapping[str, Any], names: Sequence[str], file: str) -> list[Any]:
    """Return the weights of a JSON object in the order of the classes; a class without entry has weight 1."""
    unknown = sorted(values.keys() - set(names))
    if unknown:
        raise ConfigurationError(
            f"`class_weights={file!r}` names the class {unknown[0]!r}, which the model does not have."
            f"{did_you_mean(unknown[0], names)}"
        )
    return [values.get(name, 1.0) for name in names]


def _balanced(labels: np.ndarray, classes: int, several: bool) -> list[float]:
    if several:
        return balanced_weights((labels == 1).sum(0).tolist(), len(labels))
    if not np.issubdtype(labels.dtype, np.integer):
        raise ConfigurationError(
            f'`class_weights="balanced"` counts class ids, but the training labels are {labels.dtype}. Leave it unset.'
        )
    return balanced_weights(np.bincount(labels[labels != IGNORED], minlength=classes).tolist())


def labels_of(dataset: Any) -> Any:
    """Find the labels of a data set: in an attribute, in a column, or else by reading every example.

    Raises:
        ConfigurationError: it is a stream, or its examples have no `labels`.
    """
    if dataset is None:
        return None
    if not isinstance(dataset, Sized):
        raise ConfigurationError(
            '`class_weights="balanced"` counts the training labels, but those of a stream cannot be counted in '
            "advance. Pass the weights as numbers or a JSON file."
        )
    if isinstance(labels := getattr(dataset, "labels", None), (np.ndarray, Sequence)):
        return labels
    for name in ("labels", "label"):
        if isinstance(dataset, Dataset) and name in dataset.column_names:
            return dataset.with_format("numpy", columns=[name])[:][name]
    logger.info("Reading all training examples once to count their classes.")
    examples: Any = dataset
    found = [example.get("labels", example.get("label")) for example in (examples[i] for i in range(len(dataset)))]
    if any(label is None for label in found):
        raise ConfigurationError(
            '`class_weights="balanced"` needs `labels` in each training example. Pass the weights as numbers.'
        )
    return np.asarray(found)
