"""Convert the labels of a column to training targets: class ids, zeros and ones for each class, or values."""

from __future__ import annotations

import math
from typing import Any, Protocol

import datasets
import numpy as np

from hf_featreuse.data.columns import capitalized, single_feature
from hf_featreuse.errors import DataError
from hf_featreuse.text import printable

SINGLE, SEVERAL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
_COUNTED = ("int", "uint", "bool", "string", "large_string")
_MEASURED = ("float", "double", "half")


class LabelReader(Protocol):
    """Labels of one kind.

    Attributes:
        names (`list[str]`): of the classes, in the order of their ids; of the column, for a regression.
        problem_type (`str`): the kind, as configurations of transformers call it.
    """

    names: list[str]
    problem_type: str

    def encode(self, values: np.ndarray, rows: np.ndarray, split: str) -> np.ndarray:
        """Turn labels, as Python objects, into numbers; their rows and their split are for messages."""
        ...


def label_reader(feature: Any, train_values: np.ndarray, column: str, source: str) -> LabelReader:
    """Return the reader for the type of a column.

    Class labels, integers and strings are classes; a list of them is several labels per image, and so is a list of as
    many zeros and ones as there are classes; a floating-point number is a regression.

    Args:
        feature (`Any`): type of the column, as `datasets` has it.
        train_values (`numpy.ndarray`): the column of the training split, as Python objects.
        column (`str`): its name, for messages.
        source (`str`): what messages call the data.

    Raises:
        DataError: the column is of another type.
    """
    entry = single_feature(feature)
    kind = entry.dtype if isinstance(entry, datasets.Value) else ""
    if isinstance(entry, datasets.ClassLabel) or kind.startswith(_COUNTED):
        return (Labels if entry is feature else SeveralLabels)(entry, train_values, column, source)
    if kind.startswith(_MEASURED):
        return Measured(column, source) if entry is feature else SeveralLabels(entry, train_values, column, source)
    raise DataError(
        f"Column {column!r} of {source} holds {feature}; labels are class labels, integers or strings, lists of them, "
        "or numbers to predict. Name the column of the labels with label_column_name (--label_column_name)."
    )


class Labels:
    """The classes of a data set: their names, and the id of each value in the label column."""

    problem_type = SINGLE

    def __init__(self, feature: Any, train_values: np.ndarray, column: str, source: str):
        self._column, self._source = column, source
        if isinstance(feature, datasets.ClassLabel):
            self.names = list(feature.names)
            self._ids: dict[Any, int] = {i: i for i in range(len(self.names))}
            return
        known = sorted(set(train_values.tolist()) - {None, -1})
        self.names = [str(value) for value in known]
        self._ids = {value: i for i, value in enumerate(known)}

    def encode(self, values: np.ndarray, rows: np.ndarray, split: str) -> np.ndarray:
        """Turn labels into class ids."""
        ids = np.array([self._ids.get(value, -1) for value in values], dtype=np.int64)
        if (ids < 0).any():
            row, value = int(rows[ids.argmin()]), values[ids.argmin()]
            where = f"row {row} of split '{split}' of {self._source} (column {self._column!r})"
            if value is None or value == -1:
                raise DataError(f"{capitalized(where)} has no label: {value}. Leave such rows out of the data.")
            raise DataError(f"{capitalized(where)} has the label {value!r}, which is not one of the training labels.")
        return ids


class SeveralLabels:
    """Several labels per image, as a list of classes, or as one zero or one for each class."""

    problem_type = SEVERAL

    def __init__(self, entry: Any, train_values: np.ndarray, column: str, source: str):
        self._column, self._source = column, source
        lists = [value for value in train_values.tolist() if value is not None]
        lengths = {len(value) for value in lists}
        found = {label for value in lists for label in value} - {None}
        self._is_hot = not isinstance(entry, datasets.ClassLabel) and found <= {0, 1} and len(lengths) == 1
        self._is_hot &= lengths != {1} and lengths != {0}
        if self._is_hot:
            self.names = [str(index) for index in range(lengths.pop())]
        elif isinstance(entry, datasets.ClassLabel):
            self.names = list(entry.names)
            self._ids: dict[Any, int] = {i: i for i in range(len(self.names))}
        elif entry.dtype.startswith(_MEASURED):
            raise DataError(
                f"Column {column!r} of {source} holds lists of numbers other than as many zeros and ones in each row: "
                "several labels per image are these, or lists of classes. Name another column with label_column_name "
                "(--label_column_name)."
            )
        else:
            known = sorted(found)
            self.names, self._ids = [str(value) for value in known], {value: i for i, value in enumerate(known)}

    def encode(self, values: np.ndarray, rows: np.ndarray, split: str) -> np.ndarray:
        """Return a zero or one for each class, float32 of shape (rows, classes)."""
        encoded = np.zeros((len(rows), len(self.names)), np.float32)
        for i, (value, row) in enumerate(zip(values, rows.tolist(), strict=True)):
            if value is None or None in value:
                raise DataError(f"{self._where(row, split)} has no labels: {value}. Leave such rows out of the data.")
            if self._is_hot:
                if len(value) != len(self.names) or not set(value) <= {0, 1}:
                    raise DataError(
                        f"{self._where(row, split)} has the labels {printable(str(value))[:80]}, but the training "
                        f"labels are {len(self.names)} zeros and ones per image."
                    )
                encoded[i] = value
                continue
            unknown = [label for label in value if label not in self._ids]
            if unknown:
                raise DataError(
                    f"{self._where(row, split)} has the label {unknown[0]!r}, which is not one of the training labels."
                )
            encoded[i, [self._ids[label] for label in value]] = 1
        return encoded

    def _where(self, row: int, split: str) -> str:
        return capitalized(f"row {row} of split '{split}' of {self._source} (column {self._column!r})")


class Measured:
    """One number per image, to be predicted."""

    problem_type = REGRESSION

    def __init__(self, column: str, source: str):
        self.names, self._source = [column], source

    def encode(self, values: np.ndarray, rows: np.ndarray, split: str) -> np.ndarray:
        """Return the numbers, float32 of shape (rows,)."""
        for value, row in zip(values, rows.tolist(), strict=True):
            if value is None or not math.isfinite(value):
                where = capitalized(f"row {row} of split '{split}' of {self._source} (column {self.names[0]!r})")
                raise DataError(f"{where} holds {value}, not a number. Leave such rows out of the data.")
        return values.astype(np.float32)
