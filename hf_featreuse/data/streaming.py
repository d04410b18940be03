"""Stream labeled images from the Hub or from disk while training, without storing the data set."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from datasets.utils.file_utils import xopen

from hf_featreuse.data.columns import capitalized, image_column, label_column, single_feature
from hf_featreuse.data.images import decode_image, to_tensors
from hf_featreuse.data.labels import SEVERAL, SINGLE, LabelReader, label_reader
from hf_featreuse.data.loading import VALIDATION_NAMES, ImageData
from hf_featreuse.data.sources import check_inside, load_with_datasets
from hf_featreuse.data.transforms import ImageTransform
from hf_featreuse.errors import BadImageError, DataError
from hf_featreuse.text import one_line, printable

_SHUFFLE_BUFFER = 1000  # images among which the next one is drawn
_ARCHIVES = frozenset(("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4"))
_NO_VALUES = np.empty(0, dtype=object)


class ImageStream(torch.utils.data.IterableDataset):
    """Images and labels of one split in the order of the stream.

    Items are those of [`ImageSplit`]. A random transform is a function of seed, epoch and place in the stream, so a
    resumed run sees the same images as long as the number of data-loading workers is the same.

    Args:
        stream (`datasets.IterableDataset`): with a column `image`, undecoded, and a column `label`.
        labels (`LabelReader`): turns labels into numbers.
        name (`str`): of the split, for messages.
        source (`str`): what messages call the source.
        folder (`str`, *optional*): the only folder from which files may be read that rows name by their path; by
            default files of the Hub.

    Raises:
        DataError: a row names another file.
        BadImageError: an image is read that cannot be decoded.
    """

    num_skipped = 0

    def __init__(
        self,
        stream: datasets.IterableDataset,
        labels: LabelReader,
        name: str,
        source: str,
        folder: str | None = None,
    ):
        self._stream, self._labels, self._name, self._source, self._folder = stream, labels, name, source, folder
        self._transform: Callable[..., torch.Tensor] | None = None
        self._class_ids: np.ndarray | None = None
        # Workers that outlive an epoch see it, too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, worker = int(self._epoch), torch.utils.data.get_worker_info()
        self._stream.set_epoch(epoch)
        # `datasets` gives each worker different shards.
        first = 0 if worker is None else worker.id << 40
        for row, example in zip(itertools.count(first), self._stream, strict=False):
            stored: dict[str, Any] = example["image"] or {"bytes": None, "path": None}
            if stored["bytes"] is None and stored["path"]:
                self._check_path(stored["path"])
            try:
                image = decode_image(_fetched(stored))
            except Exception as error:  # decoders raise almost anything on broken files
                raise BadImageError(
                    f"Cannot decode image {row - first} of split '{self._name}' of {self._source}: "
                    f"{one_line(error).rstrip('.')}. Leave it out of the data."
                ) from None
            if self._transform is None:
                (pixels,) = to_tensors([image])
            elif isinstance(self._transform, ImageTransform):
                (pixels,) = self._transform.batch([image], np.array([row]), epoch)
            else:
                pixels = self._transform(image)
            yield {"pixel_values": pixels, "labels": self._label(example["label"], row - first)}

    def _check_path(self, path: str) -> None:
        if self._folder is not None:
            check_inside([path], [os.path.realpath(self._folder)], self._source)
        elif not _is_on_the_hub(path):
            raise DataError(
                f"{capitalized(self._source)} names the file {printable(repr(path))}, which is not on the Hub. "
                "Only files of the data set are read. Store the images in its rows."
            )

    def _label(self, value: Any, row: int) -> Any:
        values = np.empty(1, dtype=object)
        values[0] = value
        encoded = self._labels.encode(values, np.array([row]), self._name)[0]
        if self._class_ids is not None:
            encoded = self._class_ids[encoded]
        return encoded.tolist()

    def with_transform(self, transform: Callable[..., torch.Tensor] | None) -> ImageStream:
        """Return the same stream with another transform, as [`ImageSplit.with_transform`] does."""
        stream = copy.copy(self)
        stream._transform, stream._epoch = transform, self._epoch.clone().share_memory_()
        return stream

    def with_class_ids(self, class_ids: Sequence[int], num_classes: int | None = None) -> ImageStream:
        """Return the same stream with other class ids, as [`ImageSplit.with_class_ids`] does."""
        if self._labels.problem_type == SEVERAL and list(class_ids) != list(range(num_classes or len(class_ids))):
            raise DataError("A stream with several labels per image keeps the order of its classes. Do not stream it.")
        stream = copy.copy(self)
        if self._labels.problem_type == SINGLE:
            before = np.arange(len(class_ids)) if self._class_ids is None else self._class_ids
            stream._class_ids = np.asarray(class_ids, dtype=np.int64)[before]
        return stream

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of shuffling and random transforms, as [`ImageSplit.set_epoch`] does."""
        self._epoch.fill_(epoch)


def _is_on_the_hub(path: str) -> bool:
    """Return whether a path is a file on the Hub, possibly inside an archive there."""
    *members, file = path.split("::")
    return file.startswith("hf://datasets/") and all(member.partition("://")[0] in _ARCHIVES for member in members)


def _fetched(stored: dict[str, Any]) -> dict[str, Any]:
    """Read the bytes of a file on the Hub."""
    if stored["bytes"] is None and "://" in (stored["path"] or ""):
        with xopen(stored["path"], "rb") as file:
            return {"bytes": file.read(), "path": None}
    return stored


def stream_image_data(
    dataset_name: str,
    dataset_config_name: str | None = None,
    *,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    token: str | bool | None = None,
    seed: int = 42,
    splits: Sequence[str] = ("train", "validation"),
) -> ImageData:
    """Open the splits of a data set as streams, which are read while training.

    The training images are shuffled within a window of 1,000. No validation split is made from them.

    Args:
        dataset_name (`str`): name on the Hub, or a local folder that `datasets` reads: of Parquet, Arrow or WebDataset
            files, or of images in class folders.
        dataset_config_name (`str`, *optional*): configuration of the data set.
        max_train_samples (`int`, *optional*): number of training images, the first ones; by default all.
        max_eval_samples (`int`, *optional*): the same for validation and test, each.
        image_column_name (`str`, *optional*): as for [`load_image_data`].
        label_column_name (`str`, *optional*): as for [`load_image_data`]; the classes must be named by the type of the
            column, as they cannot be collected in advance.
        token (`str` or `bool`, *optional*): as for [`load_image_data`].
        seed (`int`, defaults to 42): seed of the shuffling.
        splits (`Sequence[str]`, defaults to `("train", "validation")`): which to open.

    Returns:
        `ImageData`: whose splits are [`ImageStream`]s.

    Raises:
        DataError: the data set cannot be opened, lacks the training split or a column, or its classes have no names.

    Example:
        >>> import tempfile
        >>> import datasets
        >>> from PIL import Image
        >>> from hf_featreuse.data import stream_image_data
        >>> features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        >>> rows = {"image": [Image.new("RGB", (4, 4))] * 2, "label": [0, 1]}
        >>> folder = tempfile.mkdtemp()
        >>> table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        >>> size = table.to_parquet(f"{folder}/train.parquet")
        >>> data = stream_image_data(folder, splits=("train",))
        >>> data.label_names, len(list(data.splits["train"]))
        (['cat', 'dog'], 2)
    """
    source = f"data set '{printable(dataset_name)}'"
    options = {"streaming": True, "token": None if os.path.isdir(dataset_name) else token}
    opened: Any = load_with_datasets(
        lambda: datasets.load_dataset(dataset_name, dataset_config_name, **options), source
    )
    validation = next((name for name in VALIDATION_NAMES if name in opened), None)
    names = {"train": "train", "validation": validation, "test": "test"}
    parts = {part: names[part] for part in splits if names.get(part) in opened}
    if not parts or ("train" in splits and "train" not in parts):
        raise DataError(f"{capitalized(source)} has no split 'train', only {sorted(opened)}.")
    folder = dataset_name if os.path.isdir(dataset_name) else None
    found: dict[str, Any] = {}
    reader: LabelReader | None = None
    for part, name in parts.items():
        stream = opened[name]
        if stream.features is None:
            stream = stream._resolve_features()
        images, labels = (
            image_column(stream.features, image_column_name),
            label_column(stream.features, label_column_name),
        )
        feature = stream.features[labels]
        if reader is None:
            _check_named(feature, labels, source)
            reader = label_reader(feature, _NO_VALUES, labels, source)
        stream = stream.select_columns([images, labels]).cast_column(images, datasets.Image(decode=False))
        columns = {images: "image", labels: "label"}
        if any(old != new for old, new in columns.items()):
            stream = stream.rename_columns({old: new for old, new in columns.items() if old != new})
        limit = max_train_samples if part == "train" else max_eval_samples
        stream = stream if limit is None else stream.take(limit)
        if part == "train":
            stream = stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        found[part] = ImageStream(stream, reader, name, source, folder)
    assert reader is not None
    return ImageData(found, reader.names, None if folder else dataset_name, reader.problem_type)


def _check_named(feature: Any, column: str, source: str) -> None:
    """Raise for classes whose names would need a pass over all data."""
    entry = single_feature(feature)
    is_value = isinstance(entry, datasets.Value) and entry.dtype.startswith(("float", "double", "half"))
    if not isinstance(entry, datasets.ClassLabel) and not (is_value and entry is feature):
        raise DataError(
            f"Column {column!r} of {source} contains {feature}, but a stream needs class labels, whose names are "
            "known in advance, or numbers to predict. Store the column as `ClassLabel`, or load the data without "
            "streaming."
        )
