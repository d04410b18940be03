"""Load labeled images from the Hub, from local data or from scikit-learn, as data sets for Trainer.

The examples, the command line and the benchmarks share it. Splitting, shuffling and selecting use row numbers, so the
row of an image in its source is always known.
"""

import io
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from PIL import Image
from transformers import BaseImageProcessor

from hf_featreuse.data.columns import (
    capitalized,
    check_splits,
    column_values,
    image_column,
    images_only,
    label_column,
)
from hf_featreuse.data.image_split import ImageSplit
from hf_featreuse.data.labels import SEVERAL, SINGLE, label_reader
from hf_featreuse.data.sources import check_stored_paths, load_source
from hf_featreuse.data.splitting import held_out_rows
from hf_featreuse.data.transforms import EvalTransform, ImageTransform, TrainTransform, default_crop_scale, image_size
from hf_featreuse.errors import DataError
from hf_featreuse.text import first_few, printable

logger = logging.getLogger(__name__)

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_DIGITS = "scikit-learn digits"


@dataclass(frozen=True)
class ImageData:
    """The data set that [`load_image_data`] returns.

    Attributes:
        splits (`dict[str, ImageSplit]`): the requested splits that exist, by name: `"train"`, `"validation"` or
            `"test"`.
        label_names (`list[str]`): name of each class, in the order of the class ids.
        name (`str`, *optional*): name for a model card: that on the Hub, `"scikit-learn digits"`, or `None` for local
            data.
        problem_type (`str`, defaults to `"single_label_classification"`): the kind of the labels, as configurations of
            transformers call it: `"multi_label_classification"` for several labels per image, `"regression"` for a
            number.

    Example:
        >>> from hf_featreuse.data import load_image_data
        >>> data = load_image_data()
        >>> data.name, data.label_names[:3], sorted(data.splits)
        ('scikit-learn digits', ['0', '1', '2'], ['train', 'validation'])
    """

    splits: dict[str, ImageSplit]
    label_names: list[str]
    name: str | None
    problem_type: str = SINGLE

    def transformed(
        self, processor: BaseImageProcessor, train_transform: ImageTransform | None = None, *, seed: int = 42
    ) -> dict[str, ImageSplit]:
        """Return the splits with random crops and flips for training, and the processor's resizing for evaluation.

        Args:
            processor (`BaseImageProcessor`): the image processor of the model.
            train_transform (`ImageTransform`, *optional*): transform of the training images; by default a
                [`TrainTransform`] to the size of the processor.
            seed (`int`, defaults to 42): seed of that default.

        Example:
            >>> from transformers import ViTImageProcessor
            >>> from hf_featreuse.data import load_image_data
            >>> splits = load_image_data().transformed(ViTImageProcessor(size={"height": 32, "width": 32}))
            >>> splits["train"][0]["pixel_values"].shape
            torch.Size([3, 32, 32])
        """
        if train_transform is None:
            size = image_size(processor)
            train_transform = TrainTransform(size, scale=default_crop_scale(size), seed=seed)
        transforms = {"train": train_transform}
        return {
            name: split.with_transform(transforms.get(name) or EvalTransform(processor))
            for name, split in self.splits.items()
        }


def load_image_data(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    train_val_split: float | None = 0.15,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    seed: int = 42,
    skip_bad_images: bool = False,
    splits: Sequence[str] = ("train", "validation"),
) -> ImageData:
    """Load the splits of an image-classification data set.

    Without `dataset_name`, `train_dir` and `validation_dir` the 1,797 handwritten digits of scikit-learn are loaded,
    8 x 8 pixels, split by class into 1,437 and 360. In other data a split called validation, valid, val or dev is the
    validation split; without one, part of the training split is, stratified by class.

    Args:
        dataset_name (`str`, *optional*): name on the Hub, or a local folder: of images, of Parquet or Arrow files, or
            what `save_to_disk` wrote. In a folder of images, a folder called train, validation or test (or training,
            valid, val, dev, testing, eval, evaluation) that holds class folders is a split, and the folder that
            directly holds an image is its class; file names have no meaning. A file `metadata.csv`, `.jsonl` or
            `.parquet` with a column `file_name` describes the images of its folder instead of class folders.
        dataset_config_name (`str`, *optional*): configuration of the data set; by default its default one.
        train_dir (`str`, *optional*): folder with one folder of images for each class. Files that are left out, such
            as those that are not images, are listed in a logged warning.
        validation_dir (`str`, *optional*): the same for validation.
        train_val_split (`float`, defaults to 0.15): fraction of the training rows, in (0, 1), to use for validation if
            the data has no such split, stratified by class; with `None` or 0 there is then no validation.
        max_train_samples (`int`, *optional*): number of training images to keep, drawn by `seed`; by default all.
        max_eval_samples (`int`, *optional*): the same for validation and test, each.
        image_column_name (`str`, *optional*): column of the images; by default `image`, or the only one of type
            `Image`.
        label_column_name (`str`, *optional*): column of the labels, which are class labels, integers or strings; a
            list of them, or of as many zeros and ones as there are classes, is several labels per image; a
            floating-point number is a regression. By default `label`, `labels`, `cls` (of
            WebDataset files), or the only one of class labels.
        cache_dir (`str`, *optional*): folder for downloads; by default the cache of `datasets`.
        token (`str` or `bool`, *optional*): token for private data sets, `True` for the stored one; by default the
            stored one if there is one.
        trust_remote_code (`bool`, defaults to `False`): has no effect: `datasets` no longer runs code. Accepted for
            command lines that pass it.
        seed (`int`, defaults to 42): non-negative; decides every split and selection.
        skip_bad_images (`bool`, defaults to `False`): whether to decode all images of `splits` now and skip those that
            fail, with one logged warning; otherwise the first bad image that is read raises `BadImageError`.
        splits (`Sequence[str]`, defaults to `("train", "validation")`): which of `"train"`, `"validation"`, `"test"`
            to return.

    Returns:
        `ImageData`: with those of `splits` that exist.

    Raises:
        DataError: a folder, data set, split or column is missing, a split is empty, a label is missing or unknown, an
            argument is out of range, or every image is bad.

    Example:
        >>> from hf_featreuse.data import load_image_data
        >>> data = load_image_data(max_train_samples=100)
        >>> {name: len(split) for name, split in data.splits.items()}
        {'train': 100, 'validation': 360}
    """
    _check_arguments(train_val_split, max_train_samples, max_eval_samples, seed, splits)
    if trust_remote_code:
        logger.warning("trust_remote_code has no effect: the datasets library no longer runs code of data sets.")
    if dataset_name is None and train_dir is None and validation_dir is None:
        raw, parts = _load_digits(seed)
        name, source, allowed = _DIGITS, _DIGITS, None
    else:
        _check_folders(dataset_name, train_dir, validation_dir)
        raw, source, allowed = load_source(
            dataset_name, dataset_config_name, train_dir, validation_dir, splits, cache_dir=cache_dir, token=token
        )
        name = None if dataset_name is None or os.path.isdir(dataset_name) else dataset_name
        parts = _split_rows(raw, source, train_val_split, seed, label_column_name)
    parts = {part: parts[part] for part in ("train", "validation", "test") if part in parts and part in splits}
    if "train" in splits and "train" not in parts:
        raise DataError(f"{capitalized(source)} has no split 'train', only {sorted(raw)}.")
    if not parts:
        raise DataError(f"{capitalized(source)} has none of the splits {list(splits)}, only {sorted(raw)}.")

    reference = "train" if "train" in raw else next(iter(parts.values()))[0]
    features = raw[reference].features
    images_in = image_column(features, image_column_name)
    labels_in = label_column(features, label_column_name)
    used = {raw_name for raw_name, _ in parts.values()}
    check_splits({raw_name: raw[raw_name] for raw_name in sorted(used)}, features, images_in, labels_in, source)
    values = {raw_name: column_values(raw[raw_name], labels_in) for raw_name in used | {reference}}
    labels = label_reader(features[labels_in], values[reference], labels_in, source)
    ids = {part: labels.encode(values[raw_name][rows], rows, raw_name) for part, (raw_name, rows) in parts.items()}
    _warn_of_untrained(ids, labels.names, source, labels.problem_type)

    result = {}
    for part, (raw_name, rows) in parts.items():
        if len(rows) == 0:
            raise DataError(f"Split '{raw_name}' of {source} is empty: it has no rows.")
        flag = "max_train_samples" if part == "train" else "max_eval_samples"
        limit = max_train_samples if part == "train" else max_eval_samples
        if limit is not None and limit > len(rows):
            logger.warning("%s=%d, but split '%s' has only %d images: all are used.", flag, limit, part, len(rows))
        if limit is not None:
            stream = 1 + ("train", "validation", "test").index(part)
            drawn = np.random.default_rng([seed, stream]).permutation(len(rows))[:limit]
            rows, ids[part] = rows[drawn], ids[part][drawn]
        images = images_only(raw[raw_name], images_in)
        check_stored_paths(images, allowed, source)
        split = ImageSplit(images, rows, ids[part], raw_name, source)
        result[part] = split.without_bad_images() if skip_bad_images else split
    return ImageData(result, labels.names, name, labels.problem_type)


def _check_arguments(
    train_val_split: float | None, max_train: int | None, max_eval: int | None, seed: int, splits: Sequence[str]
) -> None:
    """Raise for arguments out of range, before anything is downloaded."""
    if train_val_split is not None and not 0 <= train_val_split < 1:
        raise DataError(f"train_val_split={train_val_split!r} must be a fraction from 0 to below 1, or None.")
    for flag, limit in (("max_train_samples", max_train), ("max_eval_samples", max_eval)):
        if limit is not None and limit < 1:
            raise DataError(f"{flag}={limit!r} must be a positive number of images, or None for all.")
    if seed < 0:
        raise DataError(f"seed={seed!r} must not be negative.")
    known = ("train", "validation", "test")
    if isinstance(splits, str) or not splits or not set(splits) <= set(known):
        raise DataError(f"splits={splits!r} must be a sequence of names among {known}.")


def _warn_of_untrained(ids: Mapping[str, np.ndarray], names: Sequence[str], source: str, problem_type: str) -> None:
    """Warn of classes in the evaluation images that no training image has: the model cannot learn them."""
    if "train" not in ids or problem_type not in (SINGLE, SEVERAL):
        return
    present = {part: np.nonzero(found)[1] if problem_type == SEVERAL else found for part, found in ids.items()}
    for part in ids.keys() - {"train"}:
        missing = np.setdiff1d(present[part], present["train"]).tolist()
        if missing:
            shown = printable(first_few([names[int(index)] for index in missing]))
            logger.warning(
                "No training image of %s has the class %s, which the %s images have: the model cannot learn it.",
                *(source, shown, part),
            )


def _check_folders(dataset_name: str | None, train_dir: str | None, validation_dir: str | None) -> None:
    """Raise for folders passed together with a data set, and for paths that are not directories."""
    folders = {"train_dir": train_dir, "validation_dir": validation_dir}
    folders = {flag: folder for flag, folder in folders.items() if folder is not None}
    if dataset_name is not None and folders:
        raise DataError(
            f"Both dataset_name={dataset_name!r} and {', '.join(f'{flag}={f!r}' for flag, f in folders.items())} were "
            "passed. Pass only one of them."
        )
    for flag, folder in folders.items():
        if not os.path.isdir(folder):
            raise DataError(f"{flag}={folder!r} (--{flag}) is not a directory. Pass a folder of class folders.")


def _load_digits(seed: int) -> tuple[dict[str, datasets.Dataset], dict[str, tuple[str, np.ndarray]]]:
    """Build scikit-learn's handwritten digits and their stratified split."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            "No data set was named, and the default, the handwritten digits, needs scikit-learn, which is not "
            "installed: pip install 'hf_featreuse[plot]', or pass dataset_name (--dataset_name) or train_dir "
            "(--train_dir)."
        ) from error
    digits: Any = load_digits()
    stored = []
    for pixels in np.rint(digits.images * (255 / 16)).astype(np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        stored.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    dataset = datasets.Dataset.from_dict({"image": stored, "label": digits.target.tolist()}, features=features)
    rows = np.arange(len(dataset))
    halves = train_test_split(rows, test_size=360, stratify=digits.target, random_state=seed % 2**32)
    train, validation = (("train", np.asarray(half)) for half in halves)
    return {"train": dataset}, {"train": train, "validation": validation}


def _split_rows(
    raw: Mapping[str, datasets.Dataset],
    source: str,
    train_val_split: float | None,
    seed: int,
    label_column_name: str | None,
) -> dict[str, tuple[str, np.ndarray]]:
    """Return, for train, validation and test, the split of the source and its rows."""
    parts = {part: (part, np.arange(len(raw[part]))) for part in ("train", "test") if part in raw}
    validation = next((name for name in VALIDATION_NAMES if name in raw), None)
    if validation is not None:
        parts["validation"] = (validation, np.arange(len(raw[validation])))
    elif train_val_split and len(raw.get("train", ())):
        train = raw["train"]
        held_out = math.ceil(train_val_split * len(train))
        if held_out == len(train):
            raise DataError(
                f"train_val_split={train_val_split} of the {len(train)} rows of split 'train' of {source} leaves none "
                "for training. Pass a smaller fraction, or a validation split."
            )
        values = column_values(train, label_column(train.features, label_column_name))
        chosen = held_out_rows(values, held_out, seed)
        parts["train"] = ("train", np.setdiff1d(np.arange(len(train)), chosen))
        parts["validation"] = ("train", chosen)
    return parts
