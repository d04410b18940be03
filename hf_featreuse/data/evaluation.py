"""Open a trained checkpoint, and match its classes with those of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedConfig, PreTrainedModel

# `from transformers import AutoImageProcessor` needs torchvision in transformers 5.17.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from hf_featreuse.data.image_split import ImageSplit
from hf_featreuse.data.images import ImageCollator
from hf_featreuse.data.loading import ImageData
from hf_featreuse.data.transforms import EvalTransform
from hf_featreuse.errors import CheckpointError, ConfigurationError, DataError
from hf_featreuse.text import first_few, first_sentence, one_line


@dataclass(frozen=True)
class OpenModel:
    """A trained classifier, ready to be evaluated.

    Args:
        name (`str`): the name as the user passed it.
        model (`PreTrainedModel`): on the CPU.
        processor (`BaseImageProcessor`, *optional*): resizes and normalizes its images.
    """

    name: str
    model: PreTrainedModel
    processor: BaseImageProcessor | None


def open_classifier(name: str, *, needs_processor: bool = True, **options: Any) -> OpenModel:
    """Load a checkpoint with all its weights and its image processor.

    Args:
        name (`str`): a local folder, or an id on the Hub.
        needs_processor (`bool`, defaults to `True`): raise if the checkpoint has no image processor.
        options (`dict[str, Any]`): further arguments of `from_pretrained`, such as `revision`, `token` and `dtype`
            (float32 by default); code of a repository is run only with `trust_remote_code=True`.

    Raises:
        ConfigurationError: it is not an image classifier, or has no image processor.
        CheckpointError: weights are missing.
    """
    options = {"trust_remote_code": False, **options}
    local = Path(name)
    if local.is_dir() and not (local / "config.json").is_file():
        raise ConfigurationError(
            f"The folder `{name}` has no config.json, so it is not a checkpoint. Pass a folder that `save_pretrained` "
            "or `Trainer.save_model` wrote, or a Hub id."
        )
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            name, output_loading_info=True, **{"dtype": torch.float32, **options}
        )
    except Exception as error:
        raise ConfigurationError(
            f"`{name}` cannot be loaded as a trained image classifier: {one_line(error)} Pass a local checkpoint "
            "folder or a Hub id."
        ) from error
    if type(model.config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ConfigurationError(f"`{name}` is a `{model.config.model_type}` model, not an image classifier.")
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"`{name}` lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}, which would be "
            "random. Pass a checkpoint that was trained with its classification head."
        )
    try:
        processor = AutoImageProcessor.from_pretrained(
            name, **{key: value for key, value in options.items() if key != "dtype"}
        )
    except Exception as error:
        if not needs_processor:
            return OpenModel(name, model.eval(), None)
        raise ConfigurationError(
            f"`{name}` has no image processor: {first_sentence(error)} Save the one that the model was trained with "
            "into its folder, with `processor.save_pretrained`."
        ) from error
    return OpenModel(name, model.eval(), processor)


def evaluation_loader(
    opened: OpenModel,
    split: ImageSplit,
    label_names: Sequence[str],
    *,
    batch_size: int,
    max_samples: int,
    seed: int,
    num_workers: int = 0,
    shuffle: bool = True,
) -> DataLoader:
    """Return batches of a split for the model: images and order depend only on the split and the seed.

    The order is random unless `shuffle` is false, as CKA compares the images of a batch and data sets are often sorted
    by class.
    """
    assert opened.processor is not None
    if not np.issubdtype(split.labels.dtype, np.integer):
        raise DataError(
            "These images have several labels each, or values to predict, but one class per image is needed. Train "
            "and evaluate with `featreuse train --do_eval`, which has metrics for both."
        )
    shuffled = torch.arange(len(split))
    if shuffle:
        shuffled = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    relabelled = split.with_class_ids(class_ids_of(opened, label_names))
    return DataLoader(
        relabelled.with_transform(EvalTransform(opened.processor)),
        batch_size=batch_size,
        sampler=shuffled[:max_samples].tolist(),
        num_workers=num_workers,
        collate_fn=ImageCollator.from_processor(opened.processor),
    )


def relabelled(data: ImageData, opened: OpenModel) -> ImageData:
    """Return the data with the class ids and class names of a trained model.

    Raises:
        DataError: the classes of model and data cannot be matched.
    """
    class_ids, outputs = class_ids_of(opened, data.label_names), opened.model.config.num_labels
    splits = {name: split.with_class_ids(class_ids, outputs) for name, split in data.splits.items()}
    return dataclasses.replace(data, splits=splits, label_names=class_names(opened.model.config))


def in_order_of(data: ImageData, names: Sequence[str]) -> ImageData:
    """Return the data with its classes in the order of a checkpoint to fine-tune, if they are the same.

    Args:
        data (`ImageData`): the data.
        names (`Sequence[str]`): names of the checkpoint's classes, in the order of their ids. If the data has other
            classes, it is returned unchanged: the checkpoint gets a new head.
    """
    if sorted(names) != sorted(data.label_names) or len(set(names)) < len(names):
        return data
    class_ids = [list(names).index(name) for name in data.label_names]
    splits = {part: split.with_class_ids(class_ids) for part, split in data.splits.items()}
    return dataclasses.replace(data, splits=splits, label_names=list(names))


def class_ids_of(opened: OpenModel, label_names: Sequence[str]) -> list[int]:
    """Return the model's id of each class of the data: by name if it knows all names, else in the same order.

    Raises:
        DataError: neither is possible.
    """
    own = class_names(opened.model.config)
    if len(set(own)) == len(own) and set(label_names) <= set(own):
        return [own.index(name) for name in label_names]
    if len(label_names) == len(own) and (_is_unnamed(own) or not set(own) & set(label_names)):
        return list(range(len(label_names)))
    raise DataError(
        f"`{opened.name}` has {len(own)} classes ({first_few(own)}) and the data {len(label_names)} "
        f"({first_few(label_names)}), which do not match. Pass the data that the model was trained for."
    )


def class_notes(opened: OpenModel, label_names: Sequence[str]) -> list[str]:
    """Return a note if the classes of model and data were matched by their order."""
    own = class_names(opened.model.config)
    if _is_unnamed(own) or set(label_names) <= set(own):
        return []
    names = f"{first_few(own)} and the data {first_few(label_names)}"
    return [f"The model calls its classes {names}; they were matched in this order."]


def class_names(config: PreTrainedConfig) -> list[str]:
    """Return the names of a model's classes, in the order of their ids."""
    names = config.id2label or {}
    return [name for _, name in sorted((int(index), str(name)) for index, name in names.items())]


def _is_unnamed(names: Sequence[str]) -> bool:
    """Return whether the names are the placeholders of transformers."""
    return list(names) == [f"LABEL_{index}" for index in range(len(names))]
