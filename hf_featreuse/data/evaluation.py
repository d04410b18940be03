"""The one way to open a trained checkpoint, and to match its classes with those of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

# Under its short name transformers 5.17 asks for torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from hf_featreuse.data.image_split import ImageSplit
from hf_featreuse.data.images import ImageCollator
from hf_featreuse.data.transforms import EvalTransform
from hf_featreuse.errors import CheckpointError, ConfigurationError, DataError
from hf_featreuse.text import first_few, first_sentence, one_line


@dataclass(frozen=True)
class OpenModel:
    """A trained classifier, ready to be evaluated.

    Args:
        name (`str`): as the user gave it.
        model (`PreTrainedModel`): on the CPU, in float32.
        processor (`BaseImageProcessor`, *optional*): resizes and normalises its images.
    """

    name: str
    model: PreTrainedModel
    processor: BaseImageProcessor | None


def open_classifier(name: str, *, needs_processor: bool = True) -> OpenModel:
    """Load a checkpoint with all its weights and its image processor.

    Args:
        name (`str`): a local folder, or an id on the Hub.
        needs_processor (`bool`, defaults to `True`): refuse a checkpoint without an image processor.

    Raises:
        ConfigurationError: it is not an image classifier, or has no image processor.
        CheckpointError: weights are missing.
    """
    local = Path(name)
    if local.is_dir() and not (local / "config.json").is_file():
        raise ConfigurationError(
            f"The folder `{name}` has no config.json, so it is not a checkpoint. Pass a folder that `save_pretrained` "
            "or `Trainer.save_model` wrote, or a Hub id."
        )
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:
        raise ConfigurationError(
            f"`{name}` cannot be loaded as a trained image classifier: {one_line(error)} Pass a local checkpoint "
            "folder or the Hub id of one."
        ) from error
    if type(model.config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ConfigurationError(f"`{name}` is a `{model.config.model_type}` model, not an image classifier.")
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"`{name}` lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}. Random weights "
            "say nothing about a model: pass a checkpoint that was trained with its classification head."
        )
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
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
) -> DataLoader:
    """Batches of a split as the model takes them: images and order depend on only the split and the seed.

    The order is random, as CKA compares the images of a batch and data sets are often sorted by class.
    """
    class_ids = torch.tensor(class_ids_of(opened, label_names))
    assert opened.processor is not None
    collate = ImageCollator.from_processor(opened.processor)
    shuffled = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return DataLoader(
        split.with_transform(EvalTransform(opened.processor)),
        batch_size=batch_size,
        sampler=shuffled[:max_samples].tolist(),
        num_workers=num_workers,
        collate_fn=_Collate(collate, class_ids),
    )


class _Collate:
    """Collate and give each label the id that the model has for it; a class, so that workers can be spawned."""

    def __init__(self, collate: ImageCollator, class_ids: torch.Tensor) -> None:
        self.collate, self.class_ids = collate, class_ids

    def __call__(self, features: list) -> dict[str, torch.Tensor]:
        batch = self.collate(features)
        return {**batch, "labels": self.class_ids[batch["labels"]]}


def class_ids_of(opened: OpenModel, label_names: Sequence[str]) -> list[int]:
    """The model's id of each class of the data: by name if it knows all names, else in the same order.

    Raises:
        DataError: neither is possible.
    """
    own = _class_names(opened)
    if len(set(own)) == len(own) and set(label_names) <= set(own):
        return [own.index(name) for name in label_names]
    if len(label_names) == len(own) and (_is_unnamed(own) or not set(own) & set(label_names)):
        return list(range(len(label_names)))
    raise DataError(
        f"`{opened.name}` has {len(own)} classes ({first_few(own)}) and the data {len(label_names)} "
        f"({first_few(label_names)}): they are not the same. Pass the data that the model was trained for."
    )


def class_notes(opened: OpenModel, label_names: Sequence[str]) -> list[str]:
    """What to know if the classes of model and data were matched by their order."""
    own = _class_names(opened)
    if _is_unnamed(own) or set(label_names) <= set(own):
        return []
    names = f"{first_few(own)} and the data {first_few(label_names)}"
    return [f"The model calls its classes {names}; they were matched in this order."]


def _class_names(opened: OpenModel) -> list[str]:
    """Names of the model's classes, in the order of their ids."""
    names = opened.model.config.id2label or {}
    return [name for _, name in sorted((int(index), str(name)) for index, name in names.items())]


def _is_unnamed(names: Sequence[str]) -> bool:
    """Whether transformers made the names up, so that they mean nothing."""
    return list(names) == [f"LABEL_{index}" for index in range(len(names))]
