"""Build an image classifier by name, without its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from hf_featreuse.errors import BlockError, ConfigurationError
from hf_featreuse.method.blocks import ResidualBlock, find_and_choose
from hf_featreuse.text import did_you_mean, first_sentence, one_line

Inputs = Mapping[str, Any] | torch.Tensor


def open_model(
    name: str, inputs: Inputs | None, target_blocks: str | Sequence[str] | None, notes: list[str]
) -> tuple[nn.Module, Inputs | None, list[ResidualBlock], list[ResidualBlock]]:
    """Return a named model without its weights, its batch on the same device, its blocks and those of the target."""
    config = _configuration(name)
    model = _build(name, config, "meta")
    on_meta = inputs.to("meta") if isinstance(inputs, torch.Tensor) else inputs
    try:
        return model, on_meta, *find_and_choose(model, on_meta, target_blocks)
    except BlockError as error:
        if error.__cause__ is None:
            raise
        notes.append("The forward failed on the meta device, so the model was built on the CPU with random weights.")
    model = _build(name, config, "cpu")
    try:
        return model, inputs, *find_and_choose(model, inputs, target_blocks)
    except BlockError as error:
        if inputs is not None or error.__cause__ is None:
            raise
        # The message names Python because the command line, which cannot pass a batch, gets here too.
        raise BlockError(
            f"`{name}` cannot be inspected from its configuration alone: {type(model).__name__} fails on a batch made "
            f"from it. {type(error.__cause__).__name__}: {first_sentence(error.__cause__)} Make a batch of one with "
            f"the model's own image processor and run `hf_featreuse.inspect_model({name!r}, inputs=batch)` in Python."
        ) from error


def real_model(name: str, device: str) -> nn.Module:
    """Return a named model with random weights, on a device."""
    return _build(name, _configuration(name), device)


def _configuration(name: str) -> PreTrainedConfig:
    """Return the configuration of a local checkpoint, a model type or a Hub checkpoint, in this order."""
    types = sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    if not (Path(name) / "config.json").is_file():
        if name in types:
            return CONFIG_MAPPING[name]()
        if Path(name).is_dir():
            raise ConfigurationError(
                f"The folder `{name}` has no config.json, so it is not a checkpoint. Pass a folder that "
                "`save_pretrained` wrote, a Hub id or a model type."
            )
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if Path(name).is_dir():
            raise ConfigurationError(
                f"transformers cannot read `{Path(name) / 'config.json'}`: {one_line(error)} Pass a checkpoint of an "
                "image classifier."
            ) from error
        raise ConfigurationError(
            f"`{name}` is not a model that can be inspected. It is neither a local folder nor a model type of "
            f"transformers' image classifiers.{did_you_mean(name, types)} The Hugging Face Hub returned no checkpoint "
            f"of that name: {one_line(error)} Pass a folder with a config.json, a Hub id, or a model type such as "
            "`vit`."
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ConfigurationError(
            f"`{name}` is a `{config.model_type}` model, for which transformers has no image classifier. Pass an "
            "image classifier, or build the model yourself and pass it to `hf_featreuse.inspect_model`."
        )
    return config


def _build(name: str, config: PreTrainedConfig, device: str) -> nn.Module:
    """Return the image classifier of a configuration without changing torch's random state."""
    config = copy.deepcopy(config)
    if not config.architectures:
        # AutoModel fails on types with several classes, such as DeiT, when the configuration names none.
        classes = cast(Any, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)[config.model_type]
        config.architectures = [classes if isinstance(classes, str) else classes[0]]
    try:
        with torch.random.fork_rng([]), torch.device(device):
            return AutoModelForImageClassification.from_config(config)
    except Exception as error:
        raise ConfigurationError(
            f"transformers cannot build `{name}` from its configuration: {one_line(error)} Install what is missing, "
            "or pass another model."
        ) from error
