"""Find the columns of images and labels in a data set, and read them."""

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
    typed = [name for name, feature in features.items() if isinstance(single_feature(feature), datasets.ClassLabel)]
    return _column(features, passed, ["label", "labels", "cls"], typed, "label", "a ClassLabel")


def _column(
    features: datasets.Features, passed: str | None, usual: list[str], typed: list[str], kind: str, type_name: str
) -> str:
    """Return the column passed, or one of the usual name, or the only one of the usual type."""
    columns = f"The columns are {list(features)}."
    flag = f"{kind}_column_name"
    if passed is not None:
        if passed not in features:
            raise DataError(f"{flag}={passed!r} (--{flag}) is not a column of the data. {columns}")
        return passed
    for name in usual:
        if name in features:
            return name
    if len(typed) != 1:
        count = "several columns are" if typed else "no column is"
        raise DataError(
            f"Found no {kind} column: none is called {' or '.join(map(repr, usual))}, and {count} of type "
            f"{type_name}. {columns} Pass one as {flag} (--{flag})."
        )
    return typed[0]


def check_splits(
    used: Mapping[str, datasets.Dataset],
    features: datasets.Features,
    image_column: str,
    label_column: str,
    source: str,
) -> None:
    """Raise for splits whose columns differ from those of the training split: their labels would be other classes."""
    for name, dataset in used.items():
        for column in (image_column, label_column):
            if dataset.features.get(column) != features[column]:
                raise DataError(
                    f"Column {column!r} of split '{name}' of {source} is {dataset.features.get(column)}, but the "
                    f"training split has {features[column]}. Use the same columns in all splits."
                )


def images_only(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """Keep the image column, undecoded."""
    try:
        return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"Column {column!r} contains {dataset.features[column]}, not images. Pass the column of the images as "
            "image_column_name (--image_column_name)."
        ) from error


def column_values(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """Read a whole column as Python objects."""
    table: Any = dataset.select_columns([column]).with_format("arrow")[:]
    values = np.empty(len(dataset), dtype=object)
    # One by one: NumPy would make a second dimension of lists of equal length.
    for row, value in enumerate(table.column(0).to_pylist()):
        values[row] = value
    return values


def single_feature(feature: Any) -> Any:
    """Return the feature of the entries of a list, and any other feature unchanged."""
    return feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature


def capitalized(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]
