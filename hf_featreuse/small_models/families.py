"""Depth, width, patches and strides of each family of image classifiers for images of 8 to 64 pixels.

Each builder takes the image size and the user's options, and returns the family's settings. The architecture's own
drop path is off: this package drops whole blocks, and results with both could not be told apart.

Sources: ViT for small images with patches of 4, arXiv 2112.13492; the widths of DeiT-Tiny, arXiv 2012.12877.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.small_models.overrides import Settings, is_whole

# Up to this side in pixels, two stages or tokens of 2 pixels are enough; above it there are three stages.
_TINY_IMAGE = 16


def _width(given: Mapping[str, Any], name: str, default: int) -> int:
    """Return the width on which other settings depend: the user's or the family's."""
    width = given.get(name, default)
    if not is_whole(width) or width < 1:
        raise ConfigurationError(
            f"`overrides` sets `{name}={width!r}`, which is not a width. Pass a whole number of at least 1."
        )
    return width


def _heads(width: int, channels: int = 32) -> int:
    """Return the number of attention heads, of about `channels` channels each, that divides the width."""
    return max(count for count in range(1, max(1, width // channels) + 1) if width % count == 0)


def _initial_deviation(width: int) -> float:
    """Return the standard deviation of new weights; the usual 0.02 is for 768 channels and too small below."""
    return round(0.02 * math.sqrt(768 / width), 3)


def _patch(image_size: int) -> int:
    """Return the side of a ViT patch in pixels: 2, 4 or 8 by the image's size, or one off if that divides it."""
    target = 2 if image_size <= _TINY_IMAGE else 4 if image_size <= 40 else 8
    return next((side for side in (target, target - 1, target + 1) if image_size % side == 0), target)


def _stride(image_size: int) -> int:
    """Return the stride of a stem after which a side has 8 to 27 positions, and 4 or more in Swin's last stage."""
    return max(1, image_size // 14)


def _stages(image_size: int) -> tuple[list[int], list[int]]:
    """Return the depths and widths of the stages; the side halves from one to the next."""
    return ([3, 3], [48, 96]) if image_size <= _TINY_IMAGE else ([3, 6, 3], [64, 128, 256])


def _tokens(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Return the settings that all transformers of constant width share."""
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
    """Return the settings of ViT, DeiT, ViT-MSN and I-JEPA."""
    settings = _tokens(image_size, given)
    return {**settings, "intermediate_size": 4 * settings["hidden_size"]}


def _beit(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Return the settings of BEiT and Data2Vec Vision, which have no position embeddings by default."""
    return {**_vit(image_size, given), "use_absolute_position_embeddings": True, "drop_path_rate": 0.0}


def _dinov2(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Return the settings of DINOv2 with and without registers; the widths of its MLP follow from `mlp_ratio`."""
    return _tokens(image_size, given)


def _vision_tower(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Return the settings of CLIP, MetaCLIP 2 and SigLIP: a ViT in `vision_config`."""
    prefix = "vision_config."
    inner = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    whole = given.get("vision_config", {})
    return {"vision_config": _vit(image_size, {**inner, **(whole if isinstance(whole, Mapping) else {})})}


def _swin(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Return the settings of Swin and Swin v2; windows have 4 by 4 tokens, the width doubles from stage to stage."""
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
    """Return the settings of FocalNet."""
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
    """Return the settings of ConvNeXt."""
    # The default 1e-6 is for 300 epochs: for the first hundreds of steps every block would add almost nothing.
    return {**_convnextv2(image_size, given), "layer_scale_init_value": 0.1}


def _convnextv2(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Return the settings of ConvNeXt v2, which has no layer scale."""
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
    """Return the settings of ResNet; its stem always shrinks four times, so the stages shrink at most once."""
    widths = [64] if image_size <= _TINY_IMAGE else [64, 128]
    return {
        "embedding_size": (given.get("hidden_sizes") or widths)[0],
        "hidden_sizes": widths,
        "depths": [6] if len(widths) == 1 else [5, 5],
        "layer_type": "basic",
    }


def _regnet(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Return the settings of RegNet; its stem shrinks twice."""
    widths = [64] if image_size <= _TINY_IMAGE else [64, 128]
    return {
        "embedding_size": (given.get("hidden_sizes") or widths)[0],
        "hidden_sizes": widths,
        "depths": [6] if len(widths) == 1 else [5, 5],
        "groups_width": 16,
        "downsample_in_first_stage": False,
    }


def _bit(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Return the settings of BiT, a ResNet v2 with group normalization; its stem shrinks four times."""
    widths = [128] if image_size <= _TINY_IMAGE else [128, 256]
    return {
        "embedding_size": 64,
        "hidden_sizes": widths,
        "depths": [6] if len(widths) == 1 else [5, 5],
        "num_groups": 8,
    }


def _poolformer(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Return the settings of PoolFormer."""
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
    """Return the settings that pyramid transformers share; keys and values have the deepest stage's resolution."""
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
    """Return the settings of PVT v2, whose patches overlap."""
    return {**_segformer(image_size, given), "image_size": [image_size, image_size]}


def _segformer(image_size: int, given: Mapping[str, Any]) -> Settings:
    """Return the settings of SegFormer's encoder, whose patches overlap."""
    settings = _pyramid(image_size, given)
    stages = len(settings["strides"])
    return {
        **settings,
        "patch_sizes": [2 * settings["strides"][0] - 1] + [3] * (stages - 1),
        "sr_ratios": [2**stage for stage in reversed(range(stages))],
        "drop_path_rate": 0.0,
    }


BUILDERS: dict[str, Callable[[int, Mapping[str, Any]], Settings]] = {
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
