"""Configurations for training an image classifier from scratch on small images, and its image processor.

The defaults of transformers are made for 224 pixels: a ViT with patches of 16 sees four tokens in an image of 32, a
ConvNeXt shrinks it to one position. Here each family gets patches, strides, depth and width that suit 8 to 64 pixels.
Any other model type, and any larger image, gets the default configuration with its image size and labels set.

Sources: ViT for small images with patches of 4, arXiv 2112.13492; the widths of DeiT-Tiny, arXiv 2012.12877.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, ViTImageProcessorPil
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_featreuse.errors import ConfigurationError

Settings = dict[str, Any]

SMALLEST_IMAGE = 8
LARGEST_SMALL_IMAGE = 64
# Up to this many pixels a side two stages, or tokens of 2 pixels, are enough; above it three stages.
_TINY_IMAGE = 16
_OWN_PROCESSOR = {
    "imagegpt": "colour-cluster ids",
    "shieldgemma2": "a prompt with each image",
    "siglip2": "a list of patches with a mask",
}
_NOT_OPTIONS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "transformers_version",
}
_ARGUMENTS = {"image_size": "image_size", "num_labels": "num_labels", "id2label": "label_names"}
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def small_config(
    model_type: str,
    image_size: int,
    num_labels: int,
    label_names: Sequence[str] | None = None,
    overrides: str | Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """Make the configuration of an image classifier that suits training from scratch on images of this size.

    From 8 to 64 pixels the common families (`SMALL_FAMILIES`) get 6 to 12 blocks 64 to 256 wide, patches or strides
    that keep 16 to 256 positions, and no drop path of their own. Other types and larger images get transformers'
    defaults. Options that follow from one you override follow your value: `hidden_size=96` also sets
    `intermediate_size=384` and the number of heads, unless you give them.

    Args:
        model_type (`str`): a type of transformers' image classifiers, such as `"vit"`, `"convnext"` or `"resnet"`.
        image_size (`int`): height and width of the model's input in pixels, at least 8.
        num_labels (`int`): number of classes, at least 1.
        label_names (`Sequence[str]`, *optional*): the name of each class, in the order of their ids. By default
            `"LABEL_0"`, `"LABEL_1"`, ...
        overrides (`str` or `Mapping[str, Any]`, *optional*): options of the configuration to set differently, as a
            dict or as `"hidden_size=96,depths=[2,2],hidden_act=relu,qkv_bias=false,drop_path_rate=1e-2"`. Names of
            nested configurations are dotted: `"vision_config.hidden_size=96"`.

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
    given = {name: _as_option(name, value, default) for name, value in given.items()}
    if image_size <= LARGEST_SMALL_IMAGE and model_type in _BUILDERS:
        settings = _BUILDERS[model_type](image_size, given)
    else:
        settings = _with_image_size(default, image_size)
    for name, value in given.items():
        _set_nested(settings, name, value, default)
    _check_stages(model_type, settings)
    try:
        config = type(default)(**settings, **_fixed(model_type, labels, default))
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ConfigurationError(
            f"transformers refuses the configuration of `{model_type}` with {_shown(given)}: {_last_line(error)} "
            "Change the values in `overrides`."
        ) from error
    _check_heads(config)
    _check_taken(config, given)
    return config


def small_image_processor(config_or_type: PreTrainedConfig | str, image_size: int) -> ViTImageProcessorPil:
    """Make the image processor of a classifier trained from scratch: RGB, exact resize, values from -1 to 1.

    It is transformers' `ViTImageProcessor` on its PIL backend, so it needs no torchvision. A saved one loads with
    `AutoImageProcessor` and `pipeline("image-classification")` without this package.

    Args:
        config_or_type (`PreTrainedConfig` or `str`): the model's configuration or its model type.
        image_size (`int`): height and width to resize to, in pixels, at least 8; no cropping.

    Returns:
        `ViTImageProcessorPil`: mean and standard deviation 0.5 for each of the three channels, bilinear resize.

    Raises:
        ConfigurationError: the model type is unknown or needs its own processor, or the configuration has another
            image size or is not for three channels.

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


def parse_overrides(overrides: str | Mapping[str, Any] | None) -> Settings:
    """Read the options in `"name=value,name=value"`; a mapping is returned as a dict.

    Args:
        overrides (`str` or `Mapping[str, Any]`, *optional*): values are numbers, `true`, `false`, `none`, words,
            quoted text and lists, tuples or dicts of these.

    Returns:
        `dict[str, Any]`: value of each option.

    Raises:
        ConfigurationError: an entry has no `=`, a value does not parse, or a name comes twice.

    Example:
        >>> from hf_featreuse.small_models import parse_overrides
        >>> parse_overrides("depths=[2,2],hidden_act=relu,qkv_bias=false,layer_norm_eps=1e-6")
        {'depths': [2, 2], 'hidden_act': 'relu', 'qkv_bias': False, 'layer_norm_eps': 1e-06}
    """
    if overrides is None:
        return {}
    if not isinstance(overrides, str):
        return dict(overrides)
    parsed: Settings = {}
    for entry in _split_at_commas(overrides):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not name or not equals:
            raise ConfigurationError(
                f"`overrides={overrides!r}` has the entry {entry.strip()!r}, which is not `name=value`. Write "
                'it as in "hidden_size=192,depths=[2,2]".'
            )
        if name in parsed:
            raise ConfigurationError(f"`overrides={overrides!r}` sets `{name}` twice. Keep one of them.")
        parsed[name] = _parse_value(name, value)
    return parsed


def _split_at_commas(text: str) -> Iterator[str]:
    """Split at the commas outside of brackets and quotes."""
    start, depth, quote = 0, 0, ""
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    if text[start:].strip():
        yield text[start:]


class _WordsToConstants(ast.NodeTransformer):
    """Turn bare words into true, false, none or text, so that `[relu, true]` reads as a literal."""

    def visit_Name(self, node: ast.Name) -> ast.Constant:
        return ast.copy_location(ast.Constant(_WORDS.get(node.id.lower(), node.id)), node)


def _parse_value(name: str, text: str) -> Any:
    """Read one value."""
    try:
        return ast.literal_eval(_WordsToConstants().visit(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"The value of `{name}` in `overrides` does not parse: {text!r}. Write a number, true, false, none, a "
            "word, text in quotes, or a list such as [32,64] with its brackets closed."
        ) from error


def _check_model_type(model_type: str) -> None:
    """Refuse types that transformers has no image classifier for."""
    types = sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    if model_type not in types:
        raise ConfigurationError(
            f"`model_type={model_type!r}` is not an image classifier of transformers."
            f"{_did_you_mean(model_type, types)} Pass one of these {len(types)}: {', '.join(types)}."
        )


def _check_image_size(image_size: int) -> None:
    """Refuse sizes that leave nothing to learn from."""
    if not _is_whole(image_size) or image_size < SMALLEST_IMAGE:
        raise ConfigurationError(
            f"`image_size={image_size!r}` is not a whole number of at least {SMALLEST_IMAGE} pixels. Pass the height "
            "and width the images are resized to, such as 32."
        )


def _check_processor_fits(config: PreTrainedConfig, image_size: int) -> None:
    """Compare the size and the channels that the configuration states with those of the processor."""
    options = config.to_dict()
    options = {**options, **options.get("vision_config", {})}
    size = options.get("image_size", image_size)
    # EfficientNet and Perceiver state a size that their layers do not depend on, but a mismatch is still a mistake.
    if size not in (image_size, [image_size, image_size], (image_size, image_size)):
        raise ConfigurationError(
            f"`image_size={image_size}`, but the configuration is for images of {size} pixels. Pass that size, or "
            "make the configuration with the same `image_size`."
        )
    if options.get("num_channels", 3) != 3:
        raise ConfigurationError(
            f"The configuration is for {options['num_channels']} channels, and the processor makes RGB images. Leave "
            "`num_channels` at 3."
        )


def _labels(num_labels: int, label_names: Sequence[str] | None) -> dict[int, str]:
    """Give the name of each class id."""
    if not _is_whole(num_labels) or num_labels < 1:
        raise ConfigurationError(
            f"`num_labels={num_labels!r}` is not a whole number of at least 1. Pass the number of classes."
        )
    names = [f"LABEL_{index}" for index in range(num_labels)] if label_names is None else list(label_names)
    if len(names) != num_labels:
        raise ConfigurationError(
            f"`label_names` has {len(names)} names and `num_labels={num_labels}`. Pass one name for each class."
        )
    repeated = sorted({str(name) for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigurationError(f"`label_names` has {repeated} more than once. Give each class its own name.")
    return {index: str(name) for index, name in enumerate(names)}


def _fixed(model_type: str, labels: dict[int, str], default: PreTrainedConfig) -> Settings:
    """Give the settings that are arguments or follow from the model type."""
    classes = cast(Any, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)[model_type]
    fixed: Settings = {
        # AutoModel fails on types with several classes, such as DeiT, when the configuration names none.
        "architectures": [classes if isinstance(classes, str) else classes[0]],
        "id2label": labels,
        "label2id": {name: index for index, name in labels.items()},
    }
    # PVT keeps the number of classes as an option of its own.
    return {**fixed, "num_labels": len(labels)} if "num_labels" in default.to_dict() else fixed


def _option_names(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the names that can be overridden, nested ones dotted."""
    names: list[str] = []
    for name, value in options.items():
        if name in _NOT_OPTIONS:
            continue
        names.append(prefix + name)
        if isinstance(value, dict):
            names += _option_names(value, f"{prefix}{name}.")
    return names


def _as_option(name: str, value: Any, default: PreTrainedConfig) -> Any:
    """Check that the option exists; give the value the type that the default has where nothing is lost."""
    if name in _ARGUMENTS:
        raise ConfigurationError(f"`overrides` sets `{name}`. Pass the argument `{_ARGUMENTS[name]}` instead.")
    names = [*_option_names(default.to_dict()), *default.attribute_map]
    if name not in names:
        raise ConfigurationError(
            f"`overrides` sets `{name}`, which `{default.model_type}` does not have.{_did_you_mean(name, names)} "
            f"Its options are: {', '.join(sorted(names))}."
        )
    before = _get_nested(default, name)
    if isinstance(before, bool):
        words = {"1": True, "y": True, "yes": True, "true": True, "0": False, "n": False, "no": False, "false": False}
        if str(value).lower() not in words:
            raise ConfigurationError(f"`overrides` sets `{name}={value!r}`. Pass true or false.")
        return words[str(value).lower()]
    if isinstance(before, int) and (isinstance(value, bool) or not isinstance(value, int | type(None))):
        raise ConfigurationError(f"`overrides` sets `{name}={value!r}`. Pass a whole number, as the default {before}.")
    if isinstance(before, float) and _is_whole(value):
        return float(value)
    return value


def _get_nested(config: Any, name: str) -> Any:
    """Read a dotted option."""
    for part in name.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def _set_nested(settings: Settings, name: str, value: Any, config: Any) -> None:
    """Set a dotted option, keeping what a nested plain dict holds by default."""
    head, _, rest = name.partition(".")
    if not rest:
        merge = isinstance(value, dict) and isinstance(settings.get(head), dict)
        settings[head] = {**settings[head], **value} if merge else value
        return
    inner = _get_nested(config, head)
    known = {} if isinstance(inner, PreTrainedConfig) else dict(inner)
    settings[head] = {**known, **settings.get(head, {})}
    _set_nested(settings[head], rest, value, inner)


def _with_image_size(default: PreTrainedConfig, image_size: int) -> Settings:
    """Set the image size where the default configuration has one, in the form it has there."""
    options = default.to_dict()
    if isinstance(options.get("image_size"), list | tuple):
        return {"image_size": [image_size, image_size]}
    if "image_size" in options:
        return {"image_size": image_size}
    if "image_size" in options.get("vision_config", {}):
        return {"vision_config": {"image_size": image_size}}
    return {}


def _check_stages(model_type: str, settings: Settings) -> None:
    """Refuse per-stage lists of different lengths, which some models would silently cut to the shortest."""
    lengths = {name: len(settings[name]) for name in _PER_STAGE if isinstance(settings.get(name), list | tuple)}
    counts = {name: settings[name] for name in _STAGE_COUNTS if lengths and name in settings}
    if len({*lengths.values(), *counts.values()}) > 1:
        raise ConfigurationError(
            f"`{model_type}` has one entry a stage in each of its lists, but the numbers of stages are "
            f"{_shown({**lengths, **counts})}. Give all of them in `overrides`."
        )


def _check_heads(config: PreTrainedConfig) -> None:
    """Refuse widths that the heads do not divide, which some models notice only when they are built."""
    options = config.to_dict()
    for name, inner in [("", options), ("vision_config.", options.get("vision_config", {}))]:
        width, heads = inner.get("hidden_size"), inner.get("num_attention_heads")
        if _is_whole(width) and _is_whole(heads) and (heads < 1 or width % heads):
            raise ConfigurationError(
                f"`{name}hidden_size={width}` is not a multiple of `{name}num_attention_heads={heads}`. Change one of "
                "them in `overrides`."
            )


def _check_taken(config: PreTrainedConfig, given: Settings) -> None:
    """Refuse overrides that the configuration replaced by a value computed from other options."""
    for name, value in given.items():
        found = _get_nested(config, name)
        if found != value and not isinstance(found, PreTrainedConfig):
            raise ConfigurationError(
                f"`overrides` sets `{name}={value!r}`, but `{config.model_type}` computes it from other options and "
                f"has {found!r}. Set those options instead."
            )


def _is_whole(value: object) -> TypeGuard[int]:
    """Tell whole numbers from the rest; True is not a number here."""
    return isinstance(value, int) and not isinstance(value, bool)


def _did_you_mean(name: object, names: Sequence[str]) -> str:
    """Word the close matches, if any."""
    close = difflib.get_close_matches(str(name), names, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _shown(options: Mapping[str, Any]) -> str:
    """Show options as `name=value`."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "no overrides"


def _last_line(error: Exception) -> str:
    """Keep the sentence of an error that says what is wrong."""
    line = re.sub(r"^\w*(Error|Exception): ", "", str(error).strip().splitlines()[-1].strip())
    return line if line.endswith(".") else line + "."


# Each builder takes the image size and the options given by the user, and returns the family's settings. Drop path of
# the architecture itself stays off: this package drops whole blocks, and both at once would blur what is measured.


def _width(given: Mapping[str, Any], name: str, default: int) -> int:
    """Width that other settings follow from: the user's or the family's."""
    width = given.get(name, default)
    if not _is_whole(width) or width < 1:
        raise ConfigurationError(f"`overrides` sets `{name}={width!r}`. Pass a whole number of at least 1.")
    return width


def _heads(width: int, channels: int = 32) -> int:
    """Number of attention heads of about `channels` channels that divides the width."""
    return max(count for count in range(1, max(1, width // channels) + 1) if width % count == 0)


def _initial_deviation(width: int) -> float:
    """Standard deviation of new weights; the usual 0.02 is for 768 channels and too small to start from below."""
    return round(0.02 * math.sqrt(768 / width), 3)


def _patch(image_size: int) -> int:
    """Side of a ViT patch in pixels: 2, 4 or 8 by the image's size, or one off where that divides it evenly."""
    target = 2 if image_size <= _TINY_IMAGE else 4 if image_size <= 40 else 8
    return next((side for side in (target, target - 1, target + 1) if image_size % side == 0), target)


def _stride(image_size: int) -> int:
    """Stride of a stem that leaves a first stage of 8 to 27 positions a side, and Swin a last one of 4 or more."""
    return max(1, image_size // 14)


def _stages(image_size: int) -> tuple[list[int], list[int]]:
    """Depths and widths of the stages, the side halving from one to the next."""
    return ([3, 3], [48, 96]) if image_size <= _TINY_IMAGE else ([3, 6, 3], [64, 128, 256])


def _tokens(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Settings that all transformers of constant width share."""
    tiny = image_size <= _TINY_IMAGE
    width = _width(given, "hidden_size", 64 if tiny else 192)
    return {
        "image_size": image_size,
        "patch_size": _patch(image_size),
        "hidden_size": width,
        "num_hidden_layers": 6 if tiny else 12,
        "num_attention_heads": _heads(width),
        "initializer_range": _initial_deviation(width),
    }


def _vit(image_size: int, given: Mapping[str, Any]) -> Settings:
    """ViT, DeiT, ViT-MSN and I-JEPA."""
    settings = _tokens(image_size, given)
    return {**settings, "intermediate_size": 4 * settings["hidden_size"]}


def _beit(image_size: int, given: Mapping[str, Any]) -> Settings:
    """BEiT and Data2Vec Vision; they know no positions unless asked to."""
    return {**_vit(image_size, given), "use_absolute_position_embeddings": True, "drop_path_rate": 0.0}


def _dinov2(image_size: int, given: Mapping[str, Any]) -> Settings:
    """DINOv2 with and without registers; the widths of its MLP follow from `mlp_ratio`."""
    return _tokens(image_size, given)


def _vision_tower(image_size: int, given: Mapping[str, Any]) -> Settings:
    """CLIP, MetaCLIP 2 and SigLIP: a ViT in `vision_config`."""
    prefix = "vision_config."
    inner = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    whole = given.get("vision_config", {})
    return {"vision_config": _vit(image_size, {**inner, **(whole if isinstance(whole, Mapping) else {})})}


def _swin(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Swin and Swin v2; windows of 4 by 4 tokens, the width doubling from stage to stage."""
    depths, widths = _stages(image_size)
    first = _width(given, "embed_dim", widths[0])
    stages = len(given.get("depths", depths))
    return {
        "image_size": image_size,
        "patch_size": _stride(image_size),
        "embed_dim": first,
        "depths": depths,
        "num_heads": [_heads(first) * 2**stage for stage in range(stages)],
        "window_size": 4,
        "initializer_range": _initial_deviation(first),
        "drop_path_rate": 0.0,
    }


def _focalnet(image_size: int, given: Mapping[str, Any]) -> Settings:
    """FocalNet; one level and window of focus a stage."""
    depths, widths = _stages(image_size)
    stages = len(given.get("depths", depths))
    return {
        "image_size": image_size,
        "patch_size": _stride(image_size),
        "embed_dim": widths[0],
        "depths": depths,
        "focal_levels": [2] * stages,
        "focal_windows": [3] * stages,
        "initializer_range": _initial_deviation(widths[0]),
        "drop_path_rate": 0.0,
    }


def _convnext(image_size: int, given: Mapping[str, Any]) -> Settings:
    """ConvNeXt."""
    # Its own 1e-6 is for 300 epochs: for the first hundreds of steps every block would be next to nothing.
    return {**_convnextv2(image_size, given), "layer_scale_init_value": 0.1}


def _convnextv2(image_size: int, given: Mapping[str, Any]) -> Settings:
    """ConvNeXt v2, which has no layer scale."""
    depths, widths = _stages(image_size)
    return {
        "image_size": image_size,
        "patch_size": _stride(image_size),
        "num_stages": len(given.get("hidden_sizes", widths)),
        "depths": depths,
        "hidden_sizes": widths,
        "initializer_range": _initial_deviation(widths[0]),
    }


def _resnet(image_size: int, given: Mapping[str, Any]) -> Settings:
    """ResNet; its stem always shrinks four times, so the stages shrink once at most."""
    widths = [64] if image_size <= _TINY_IMAGE else [64, 128]
    return {
        "embedding_size": (given.get("hidden_sizes") or widths)[0],
        "hidden_sizes": widths,
        "depths": [6] if len(widths) == 1 else [5, 5],
        "layer_type": "basic",
    }


def _regnet(image_size: int, given: Mapping[str, Any]) -> Settings:
    """RegNet; its stem shrinks twice."""
    widths = [64] if image_size <= _TINY_IMAGE else [64, 128]
    return {
        "embedding_size": (given.get("hidden_sizes") or widths)[0],
        "hidden_sizes": widths,
        "depths": [6] if len(widths) == 1 else [5, 5],
        "groups_width": 16,
        "downsample_in_first_stage": False,
    }


def _bit(image_size: int, given: Mapping[str, Any]) -> Settings:
    """BiT, a ResNet v2 with group normalisation; its stem shrinks four times."""
    widths = [128] if image_size <= _TINY_IMAGE else [128, 256]
    return {
        "embedding_size": 64,
        "hidden_sizes": widths,
        "depths": [6] if len(widths) == 1 else [5, 5],
        "num_groups": 8,
    }


def _poolformer(image_size: int, given: Mapping[str, Any]) -> Settings:
    """PoolFormer."""
    depths, widths = _stages(image_size)
    stride = _stride(image_size)
    stages = len(given.get("hidden_sizes", widths))
    return {
        "num_encoder_blocks": stages,
        "depths": depths,
        "hidden_sizes": widths,
        "patch_sizes": [2 * stride - 1] + [3] * (stages - 1),
        "strides": [stride] + [2] * (stages - 1),
        "padding": [stride - 1] + [1] * (stages - 1),
        "initializer_range": _initial_deviation(widths[0]),
        "layer_scale_init_value": 0.1,
    }


def _pyramid(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Settings that the pyramid transformers share; keys and values keep the resolution of the deepest stage."""
    depths, widths = _stages(image_size)
    widths = given.get("hidden_sizes", widths)
    stages = len(widths)
    stride = _stride(image_size)
    return {
        "num_encoder_blocks": stages,
        "depths": depths,
        "hidden_sizes": widths,
        "strides": [stride] + [2] * (stages - 1),
        "num_attention_heads": [_heads(width) for width in widths],
        "mlp_ratios": [4] * stages,
        "initializer_range": _initial_deviation(widths[0]),
    }


def _pvt_v2(image_size: int, given: Mapping[str, Any]) -> Settings:
    """PVT v2; its patches overlap."""
    return {**_segformer(image_size, given), "image_size": [image_size, image_size]}


def _segformer(image_size: int, given: Mapping[str, Any]) -> Settings:
    """SegFormer's encoder; its patches overlap."""
    settings = _pyramid(image_size, given)
    stages = len(settings["strides"])
    return {
        **settings,
        "patch_sizes": [2 * settings["strides"][0] - 1] + [3] * (stages - 1),
        "sr_ratios": [2**stage for stage in reversed(range(stages))],
        "drop_path_rate": 0.0,
    }


_BUILDERS: dict[str, Callable[[int, Mapping[str, Any]], Settings]] = {
    "beit": _beit,
    "bit": _bit,
    "clip": _vision_tower,
    "convnext": _convnext,
    "convnextv2": _convnextv2,
    "data2vec-vision": _beit,
    "deit": _vit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "donut-swin": _swin,
    "focalnet": _focalnet,
    "ijepa": _vit,
    "metaclip_2": _vision_tower,
    "poolformer": _poolformer,
    "pvt_v2": _pvt_v2,
    "regnet": _regnet,
    "resnet": _resnet,
    "segformer": _segformer,
    "siglip": _vision_tower,
    "swin": _swin,
    "swinv2": _swin,
    "vit": _vit,
    "vit_msn": _vit,
}
SMALL_FAMILIES = tuple(_BUILDERS)
_STAGE_COUNTS = ("num_encoder_blocks", "num_layers", "num_stages")
# Lists with one entry a stage.
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
