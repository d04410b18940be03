"""Find the columns of images and labels in a data set, and turn labels of any kind into class ids."""

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from hf_featreuse.errors import DataError


def image_column(features: datasets.Features, passed: str | None) -> str:
    """Find the column of the images."""
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    return _column(features, passed, ["image"], typed, "image", "an Image")


def label_column(features: datasets.Features, passed: str | None) -> str:
    """Find the column of the labels."""
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return _column(features, passed, ["label", "labels"], typed, "label", "a ClassLabel")


def _column(
    features: datasets.Features, passed: str | None, usual: list[str], typed: list[str], kind: str, type_name: str
) -> str:
    """Take the column passed, else one of the usual name, else the only one of the usual type."""
    columns = f"The columns are {list(features)}."
    flag = f"{kind}_column_name"
    if passed is not None:
        if passed not in features:
            raise DataError(f"{flag}={passed!r} (--{flag}) is no column of the data. {columns}")
        return passed
    for name in usual:
        if name in features:
            return name
    if len(typed) != 1:
        count = "several columns are" if typed else "no column is"
        raise DataError(
            f"Found no {kind} column: none is called {' or '.join(map(repr, usual))}, and {count} of type "
            f"{type_name}. {columns} Name one with {flag} (--{flag})."
        )
    return typed[0]


def check_splits(
    used: Mapping[str, datasets.Dataset],
    features: datasets.Features,
    image_column: str,
    label_column: str,
    source: str,
) -> None:
    """Refuse splits whose columns differ from the training split's; their labels would mean other classes."""
    for name, dataset in used.items():
        for column in (image_column, label_column):
            if dataset.features.get(column) != features[column]:
                raise DataError(
                    f"Column {column!r} of split '{name}' of {source} is {dataset.features.get(column)}; the training "
                    f"split has {features[column]}. Give all splits the same columns."
                )


def images_only(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """Keep the image column, undecoded."""
    try:
        return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"Column {column!r} holds {dataset.features[column]}, not images. Name the column of the images with "
            "image_column_name (--image_column_name)."
        ) from error


def column_values(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """Read a whole column as Python objects."""
    table: Any = dataset.select_columns([column]).with_format("arrow")[:]
    values = np.empty(len(dataset), dtype=object)
    values[:] = table.column(0).to_pylist()
    return values


class Labels:
    """The classes of a data set: their names, and the id of each value in the label column."""

    def __init__(self, feature: Any, train_values: np.ndarray, column: str, source: str):
        self._column, self._source = column, source
        if isinstance(feature, datasets.ClassLabel):
            self.names = list(feature.names)
            self._ids: dict[Any, int] = {i: i for i in range(len(self.names))}
            return
        dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
        if not dtype.startswith(("int", "uint", "bool", "string", "large_string")):
            raise DataError(
                f"Column {column!r} of {source} holds {feature}; labels are class labels, integers or strings. Name "
                "the column of the labels with label_column_name (--label_column_name)."
            )
        known = sorted(set(train_values.tolist()) - {None, -1})
        self.names = [str(value) for value in known]
        self._ids = {value: i for i, value in enumerate(known)}

    def encode(self, values: np.ndarray, rows: np.ndarray, split: str) -> np.ndarray:
        """Turn the labels of some rows into class ids."""
        ids = np.array([self._ids.get(value, -1) for value in values[rows]], dtype=np.int64)
        if (ids < 0).any():
            row = int(rows[ids.argmin()])
            where = f"row {row} of split '{split}' of {self._source} (column {self._column!r})"
            if values[row] is None or values[row] == -1:
                raise DataError(f"{capitalised(where)} has no label: {values[row]}. Leave such rows out of the data.")
            raise DataError(
                f"{capitalised(where)} has the label {values[row]!r}, which is none of the training labels."
            )
        return ids


def capitalised(text: str) -> str:
    """Make the first letter a capital."""
    return text[:1].upper() + text[1:]
