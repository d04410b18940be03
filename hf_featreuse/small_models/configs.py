"""Create configurations and image processors for training image classifiers from scratch on small images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, ViTImageProcessorPil
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.small_models.families import BUILDERS
from hf_featreuse.small_models.overrides import (
    Settings,
    as_option,
    check_taken,
    is_whole,
    last_line,
    parse_overrides,
    set_nested,
    shown,
)
from hf_featreuse.text import did_you_mean

SMALLEST_IMAGE = 8
LARGEST_SMALL_IMAGE = 64
_OWN_PROCESSOR = {
    "imagegpt": "color-cluster ids",
    "shieldgemma2": "a prompt with each image",
    "siglip2": "a list of patches with a mask",
}
SMALL_FAMILIES = tuple(BUILDERS)
_STAGE_COUNTS = ("num_encoder_blocks", "num_layers", "num_stages")
# Lists with one entry per stage.
_PER_STAGE = (
    "depths",
    "focal_levels",
    "focal_windows",
    "hidden_sizes",
    "mlp_ratios",
    "num_attention_heads",
    "num_heads",
    "padding",
    "patch_sizes",
    "sequence_reduction_ratios",
    "sr_ratios",
    "strides",
)


def small_config(
    model_type: str,
    image_size: int,
    num_labels: int,
    label_names: Sequence[str] | None = None,
    overrides: str | Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """Create the configuration of an image classifier for training from scratch on images of this size.

    From 8 to 64 pixels the common families (`SMALL_FAMILIES`) get 6 to 12 blocks with a width of 64 to 256, patches or
    strides that keep 16 to 256 positions, and no drop path. Other types and larger images get transformers' defaults.
    Options that depend on one you override follow your value: `hidden_size=96` also sets `intermediate_size=384` and
    the number of heads, unless you pass them.

    Args:
        model_type (`str`): a type of transformers' image classifiers, such as `"vit"`, `"convnext"` or `"resnet"`.
        image_size (`int`): height and width of the model's input in pixels, at least 8.
        num_labels (`int`): number of classes, at least 1.
        label_names (`Sequence[str]`, *optional*): the name of each class, in the order of their ids. By default
            `"LABEL_0"`, `"LABEL_1"`, ...
        overrides (`str` or `Mapping[str, Any]`, *optional*): options of the configuration to override, as a dict or as
            `"hidden_size=96,depths=[2,2],hidden_act=relu,qkv_bias=false,drop_path_rate=1e-2"`. Names in nested
            configurations are dotted: `"vision_config.hidden_size=96"`.

    Returns:
        `PreTrainedConfig`: for `AutoModelForImageClassification.from_config`, with `id2label` and `label2id` set.

    Raises:
        ConfigurationError: the model type or an override is unknown, or a value cannot be used.

    Example:
        >>> from hf_featreuse.small_models import small_config
        >>> config = small_config("vit", image_size=32, num_labels=2, label_names=["cat", "dog"])
        >>> config.patch_size, config.num_hidden_layers, config.id2label
        (4, 12, {0: 'cat', 1: 'dog'})
        >>> small_config("convnext", 8, 10, overrides="depths=[2,4],hidden_sizes=[32,64]").depths
        [2, 4]
    """
    _check_model_type(model_type)
    _check_image_size(image_size)
    labels = _labels(num_labels, label_names)
    given = parse_overrides(overrides)
    default = CONFIG_MAPPING[model_type]()
    given = {name: as_option(name, value, default) for name, value in given.items()}
    if image_size <= LARGEST_SMALL_IMAGE and model_type in BUILDERS:
        settings = BUILDERS[model_type](image_size, given)
    else:
        settings = _with_image_size(default, image_size)
    for name, value in given.items():
        set_nested(settings, name, value, default)
    _check_stages(model_type, settings)
    try:
        config = type(default)(**settings, **_fixed(model_type, labels, default))
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ConfigurationError(
            f"transformers refuses the configuration of `{model_type}` with {shown(given)}: {last_line(error)} "
            "Change the values in `overrides`."
        ) from error
    _check_heads(config)
    check_taken(config, given)
    return config


def small_image_processor(config_or_type: PreTrainedConfig | str, image_size: int) -> ViTImageProcessorPil:
    """Create the image processor of a classifier trained from scratch: RGB, exact resize, values from -1 to 1.

    It is transformers' `ViTImageProcessor` on its PIL backend, so it needs no torchvision. A saved one loads with
    `AutoImageProcessor` and `pipeline("image-classification")` without this package.

    Args:
        config_or_type (`PreTrainedConfig` or `str`): the model's configuration or its model type.
        image_size (`int`): height and width to resize to, in pixels, at least 8. Images are not cropped.

    Returns:
        `ViTImageProcessorPil`: mean and standard deviation 0.5 for each of the three channels, bilinear resize.

    Raises:
        ConfigurationError: the model type is unknown or needs its own processor, or the configuration has another
            image size or a number of channels other than three.

    Example:
        >>> from PIL import Image
        >>> from hf_featreuse.small_models import small_image_processor
        >>> processor = small_image_processor("vit", image_size=8)
        >>> processor(Image.new("L", (20, 30)), return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 8, 8])
    """
    _check_image_size(image_size)
    config = config_or_type if isinstance(config_or_type, PreTrainedConfig) else None
    model_type = config_or_type if isinstance(config_or_type, str) else config_or_type.model_type
    _check_model_type(model_type)
    if model_type in _OWN_PROCESSOR:
        raise ConfigurationError(
            f"`{model_type}` takes {_OWN_PROCESSOR[model_type]}, not plain images of {image_size} pixels. Load the "
            f"processor of a pretrained `{model_type}` with `AutoImageProcessor.from_pretrained`, or choose another "
            "model type."
        )
    if config is not None:
        _check_processor_fits(config, image_size)
    return ViTImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_convert_rgb=True,
    )


def _check_model_type(model_type: str) -> None:
    """Refuse types for which transformers has no image classifier."""
    types = sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    if model_type not in types:
        raise ConfigurationError(
            f"`model_type={model_type!r}` is not an image classifier of transformers."
            f"{did_you_mean(model_type, types)} Pass one of these {len(types)}: {', '.join(types)}."
        )


def _check_image_size(image_size: int) -> None:
    """Refuse sizes that leave nothing to learn from."""
    if not is_whole(image_size) or image_size < SMALLEST_IMAGE:
        raise ConfigurationError(
            f"`image_size={image_size!r}` is not a whole number of at least {SMALLEST_IMAGE} pixels. Pass the height "
            "and width to which images are resized, such as 32."
        )


def _check_processor_fits(config: PreTrainedConfig, image_size: int) -> None:
    """Check that the size and the channels in the configuration are those of the processor."""
    options = config.to_dict()
    options = {**options, **options.get("vision_config", {})}
    size = options.get("image_size", image_size)
    # EfficientNet and Perceiver state a size that their layers do not depend on, but a mismatch is still a mistake.
    if size not in (image_size, [image_size, image_size], (image_size, image_size)):
        raise ConfigurationError(
            f"`image_size={image_size}` was passed, but the configuration is for images of {size} pixels. Pass that "
            "size, or create the configuration with the same `image_size`."
        )
    if options.get("num_channels", 3) != 3:
        raise ConfigurationError(
            f"The configuration is for {options['num_channels']} channels, but the processor produces RGB images. "
            "Leave `num_channels` at 3."
        )


def _labels(num_labels: int, label_names: Sequence[str] | None) -> dict[int, str]:
    """Return the name of each class id."""
    if not is_whole(num_labels) or num_labels < 1:
        raise ConfigurationError(
            f"`num_labels={num_labels!r}` is not a whole number of at least 1. Pass the number of classes."
        )
    names = [f"LABEL_{index}" for index in range(num_labels)] if label_names is None else list(label_names)
    if len(names) != num_labels:
        raise ConfigurationError(
            f"`label_names` has {len(names)} names, but `num_labels={num_labels}`. Pass one name per class."
        )
    repeated = sorted({str(name) for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigurationError(f"`label_names` has {repeated} more than once. Pass a different name for each class.")
    return {index: str(name) for index, name in enumerate(names)}


def _fixed(model_type: str, labels: dict[int, str], default: PreTrainedConfig) -> Settings:
    """Return the settings that are arguments or follow from the model type."""
    classes = cast(Any, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)[model_type]
    fixed: Settings = {
        # AutoModel fails on types with several classes, such as DeiT, when the configuration names none.
        "architectures": [classes if isinstance(classes, str) else classes[0]],
        "id2label": labels,
        "label2id": {name: index for index, name in labels.items()},
    }
    # PVT has a separate option for the number of classes.
    return {**fixed, "num_labels": len(labels)} if "num_labels" in default.to_dict() else fixed


def _with_image_size(default: PreTrainedConfig, image_size: int) -> Settings:
    """Return the setting of the image size in the form of the default configuration, if it has one."""
    options = default.to_dict()
    if isinstance(options.get("image_size"), list | tuple):
        return {"image_size": [image_size, image_size]}
    if "image_size" in options:
        return {"image_size": image_size}
    if "image_size" in options.get("vision_config", {}):
        return {"vision_config": {"image_size": image_size}}
    return {}


def _check_stages(model_type: str, settings: Settings) -> None:
    """Refuse per-stage lists of different lengths, which some models silently cut to the shortest."""
    lengths = {name: len(settings[name]) for name in _PER_STAGE if isinstance(settings.get(name), list | tuple)}
    counts = {name: settings[name] for name in _STAGE_COUNTS if lengths and name in settings}
    if len({*lengths.values(), *counts.values()}) > 1:
        raise ConfigurationError(
            f"`{model_type}` needs one entry per stage in each of its lists, but the numbers of stages are "
            f"{shown({**lengths, **counts})}. Give all of them in `overrides`."
        )


def _check_heads(config: PreTrainedConfig) -> None:
    """Refuse widths that are not a multiple of the heads, which some models notice only when they are built."""
    options = config.to_dict()
    for name, inner in [("", options), ("vision_config.", options.get("vision_config", {}))]:
        width, heads = inner.get("hidden_size"), inner.get("num_attention_heads")
        if is_whole(width) and is_whole(heads) and (heads < 1 or width % heads):
            raise ConfigurationError(
                f"`{name}hidden_size={width}` is not a multiple of `{name}num_attention_heads={heads}`. Change one of "
                "them in `overrides`."
            )
