"""Load the model of a run: from scratch, from a checkpoint to fine-tune, or a trained one to evaluate."""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoConfig, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

# `from transformers import AutoImageProcessor` needs torchvision in transformers 5.17.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_featreuse.data import ImageData, class_names, class_notes, in_order_of, open_classifier, relabelled
from hf_featreuse.data.labels import SINGLE
from hf_featreuse.errors import ConfigurationError, FeatureReuseError
from hf_featreuse.program.arguments import ModelArguments
from hf_featreuse.small_models import parse_overrides, small_config, small_image_processor
from hf_featreuse.text import flat, one_line

logger = logging.getLogger(__name__)


def load_model(
    model_args: ModelArguments, data: ImageData, trains: bool
) -> tuple[ImageData, PreTrainedModel, BaseImageProcessor]:
    """Return the data with the model's class ids, the model (loaded or from scratch) and its image processor."""
    labels = data.label_names
    if model_args.model_name_or_path is None and model_args.config_name is None:
        model_type = model_args.model_type or "vit"
        first = next(iter(next(iter(data.splits.values()))))["pixel_values"]
        size = model_args.image_size or min(max(first.shape[-2:]), 224)
        config = small_config(model_type, size, len(labels), labels, model_args.config_overrides)
        set_task(config, data)
        return data, AutoModelForImageClassification.from_config(config), small_image_processor(config, size)
    common = source_options(model_args)
    source = str(model_args.model_name_or_path or model_args.config_name)
    try:
        if model_args.model_name_or_path is not None and not trains:
            return load_trained(model_args, data, source, common)
        return load_pretrained(model_args, data, source, common)
    except FeatureReuseError:
        raise
    except Exception as error:  # Of transformers, safetensors and PEFT, about the content of the files.
        raise ConfigurationError(
            f"`{flat(source)}` cannot be loaded: {one_line(error)} Pass a checkpoint folder or a Hub id."
        ) from error


def source_options(model_args: ModelArguments) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that define where a checkpoint comes from."""
    return {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }


def load_trained(
    model_args: ModelArguments, data: ImageData, source: str, common: dict[str, Any]
) -> tuple[ImageData, PreTrainedModel, BaseImageProcessor]:
    """Load a trained classifier for evaluation; the data gets its class ids, matched by name."""
    opened = open_classifier(source, needs_processor=model_args.image_processor_name is None, **common)
    processor: Any = opened.processor
    if model_args.image_processor_name is not None:
        processor = AutoImageProcessor.from_pretrained(model_args.image_processor_name, **common)
    for note in class_notes(opened, data.label_names):
        logger.warning(note)
    task = opened.model.config.problem_type or SINGLE
    if task != data.problem_type:
        raise ConfigurationError(
            f"`{flat(source)}` was trained for {task}, but the labels of the data are for {data.problem_type}. Pass "
            "data for the task of the model, or another `--label_column_name`."
        )
    return relabelled(data, opened), opened.model, processor


def set_task(config: Any, data: ImageData) -> None:
    """Set the problem type of a new head; without it transformers assumes one class per image."""
    if data.problem_type != SINGLE or config.problem_type is not None:
        config.problem_type = data.problem_type


def load_pretrained(
    model_args: ModelArguments, data: ImageData, source: str, common: dict[str, Any]
) -> tuple[ImageData, PreTrainedModel, BaseImageProcessor]:
    """Load a checkpoint, or new weights for its config, with a head for the labels of the data."""
    name, overrides = model_args.config_name or source, parse_overrides(model_args.config_overrides)
    if model_args.model_name_or_path is not None:
        # Keep the order of the classes if the head of the checkpoint is for the same classes.
        data = in_order_of(data, class_names(AutoConfig.from_pretrained(name, **common)))
    labels = data.label_names
    config = AutoConfig.from_pretrained(
        name,
        num_labels=len(labels),
        label2id={label: index for index, label in enumerate(labels)},
        id2label=dict(enumerate(labels)),
        **overrides,
        **common,
    )
    set_task(config, data)
    processor = AutoImageProcessor.from_pretrained(model_args.image_processor_name or source, **common)
    if model_args.model_name_or_path is None:
        return data, AutoModelForImageClassification.from_config(config), processor
    try:
        model = AutoModelForImageClassification.from_pretrained(
            source, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes, **common
        )
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ConfigurationError(
            f"The head of `{source}` does not have the {len(labels)} classes of the data. Pass "
            "`--ignore_mismatched_sizes` to replace it by a new head."
        ) from None
    return data, model, processor
