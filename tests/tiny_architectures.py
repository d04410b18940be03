"""Tiny random models of every image classifier in transformers, with their residual blocks labeled by hand.

The names were read off the modeling files of transformers 5.23: which modules the forward calls in a loop, and which
of them return their input plus a branch. Nothing here asks the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

NUM_LABELS = 3

# Image classifiers that need a package which a plain installation lacks.
NOT_INSTALLED = {"dinat": "natten", "timm_wrapper": "timm"}

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """A tiny model and what is known of it from its source.

    Args:
        name (`str`): of the test case.
        model_type (`str`): key of transformers' mappings.
        model_class (`str`): class of transformers.
        config (`dict`): of the tiny model.
        blocks (`tuple[str, ...]`): the skippable residual blocks in forward order.
        exact (`bool`): whether their shortcut is a bitwise identity.
        activation (`str`, *optional*): after the addition.
        branch (`str`, *optional*): with such an activation, the part of a block whose output is added to its input.
        num_outputs (`int`, *optional*): length of the tuple that a block returns; `None` for a bare tensor.
        streams (`dict[str, int]`): part of a block's name to the argument that holds its stream, where not the first.
        handed_on (`tuple[int, ...]`): the arguments that the further outputs of a block are.
        image_size (`int`): of the images, in pixels.
        make_batch (`Callable`): (number of samples, image size, generator) to the inputs of a forward.
        returns_loss (`bool`): whether the model computes a loss from `labels`.
        needs_inputs (`bool`): whether no batch can be made from the config alone.
    """

    name: str
    model_type: str
    model_class: str
    config: dict[str, Any]
    blocks: tuple[str, ...] = ()
    exact: bool = True
    activation: str | None = None
    branch: str | None = None
    num_outputs: int | None = None
    streams: dict[str, int] = field(default_factory=dict)
    handed_on: tuple[int, ...] = ()
    image_size: int = 32
    make_batch: Callable[[int, int, torch.Generator], Batch] = field(default=lambda n, s, g: images(n, s, g))
    returns_loss: bool = True
    needs_inputs: bool = False

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The model with random weights, in training mode; every residual branch does something."""
        torch.manual_seed(seed)
        config = CONFIG_MAPPING[self.model_type](**self.config, num_labels=NUM_LABELS)
        model = getattr(transformers, self.model_class)(config)
        for parameter in model.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        self._settle_statistics(model.train())
        return model

    def _settle_statistics(self, model: PreTrainedModel) -> None:
        """Give BatchNorm the statistics of a batch and weights of 1: as initialized, deep branches fade to nothing."""
        norms = {norm: norm.momentum for norm in model.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)}
        if norms:
            for norm in norms:
                norm.momentum = 1.0
                nn.init.ones_(norm.weight)
            with torch.no_grad():
                model(**self.batch(8, seed=0))
            for norm, momentum in norms.items():
                norm.momentum = momentum

    def batch(self, size: int = 2, seed: int = 1) -> Batch:
        """Random inputs without labels."""
        return self.make_batch(size, self.image_size, torch.Generator().manual_seed(seed))

    def labeled(self, size: int = 2, seed: int = 1) -> Batch:
        """Random inputs with labels."""
        return {**self.batch(size, seed), "labels": torch.arange(size) % NUM_LABELS}


def images(size: int, side: int, generator: torch.Generator) -> Batch:
    return {"pixel_values": torch.randn(size, 3, side, side, generator=generator)}


def _color_clusters(size: int, _side: int, generator: torch.Generator) -> Batch:
    return {"input_ids": torch.randint(16, (size, 16), generator=generator)}


def _patches(size: int, _side: int, generator: torch.Generator) -> Batch:
    return {
        "pixel_values": torch.randn(size, 16, 3 * 4 * 4, generator=generator),
        "pixel_attention_mask": torch.ones(size, 16, dtype=torch.long),
        "spatial_shapes": torch.full((size, 2), 4),
    }


def _prompt(size: int, side: int, generator: torch.Generator) -> Batch:
    # An image is 4 placeholder tokens (60) between its begin (61) and end (62).
    tokens = torch.tensor([2, 61, 60, 60, 60, 60, 62, 5, 6, 7]).expand(size, -1)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": (tokens == 60).long(),
        **images(size, side, generator),
    }


def _layers(name: str, indices: int | Iterable[int]) -> tuple[str, ...]:
    return tuple(name.format(index) for index in (range(indices) if isinstance(indices, int) else indices))


def _stages(name: str, *stages: Iterable[int]) -> tuple[str, ...]:
    return tuple(name.format(stage, layer) for stage, layers in enumerate(stages) for layer in layers)


_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
_BEIT = {**_VIT, "drop_path_rate": 0.0, "layer_scale_init_value": 0.5}
_DINO = {key: value for key, value in _VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_CLIP = {"vision_config": {**_VIT, "projection_dim": 16}, "text_config": _TEXT, "projection_dim": 16}
_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [2, 3],
    "num_heads": [1, 2],
    "window_size": 4,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
}
_PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [2, 1],
    "hidden_sizes": [8, 16],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "drop_path_rate": 0.0,
}
_CONVNEXT = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [2, 3]}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 3], "layer_type": "basic"}
_REGNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 3], "groups_width": 4}
_BIT = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 3], "num_groups": 4}
_LEVIT = {
    "image_size": 64,
    "hidden_sizes": [16, 16, 16],
    "num_attention_heads": [2, 2, 2],
    "depths": [1, 2, 1],
    "key_dim": [4, 4, 4],
}
_MOBILEVIT = {
    "image_size": 64,
    "hidden_sizes": [16, 16, 16],
    "num_attention_heads": 2,
    "neck_hidden_sizes": [8, 16, 16, 16, 24, 24, 32],
}
_PERCEIVER = {
    "num_latents": 4,
    "d_latents": 16,
    "num_blocks": 2,
    "num_self_attends_per_block": 3,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
    "image_size": 8,
}
_POOLFORMER = {
    "num_encoder_blocks": 2,
    "depths": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "padding": [2, 1],
}
_FOCALNET = {
    "image_size": 32,
    "embed_dim": 8,
    "depths": [2, 1],
    "focal_levels": [1, 1],
    "focal_windows": [3, 3],
    "drop_path_rate": 0.0,
}

# Attention and MLP are separate blocks; the attention that subsamples, at the end of a stage, has no shortcut,
# the MLP behind it has one.
_LEVIT_BLOCKS = _stages("levit.encoder.stages.{}.layers.{}", (0, 1, 3), (0, 1, 2, 3, 5), (0, 1))
# Three parts of the encoder are transformers of 2, 4 and 3 layers, whatever the config.
_MOBILEVIT_TRANSFORMERS = (
    *_layers("mobilevit.encoder.layer.2.transformer.layer.{}", 2),
    *_layers("mobilevit.encoder.layer.3.transformer.layer.{}", 4),
    *_layers("mobilevit.encoder.layer.4.transformer.layer.{}", 3),
)
_BEYOND_FIRST = ((1,), (1, 2))
_RESNET_NAME, _REGNET_NAME = "resnet.encoder.stages.{}.layers.{}", "regnet.encoder.stages.{}.layers.{}"
_PERCEIVER_BLOCKS = _layers("perceiver.encoder.self_attends.{}", 3)


def _vit_like(
    model_type: str, model_class: str, blocks: str, config: dict[str, Any], name: str = "", **more: Any
) -> Architecture:
    return Architecture(name or model_type, model_type, model_class, config, _layers(blocks, 3), **more)


def _perceiver(kind: str, **more: Any) -> Architecture:
    return Architecture(
        f"perceiver-{kind.lower()}",
        "perceiver",
        f"PerceiverForImageClassification{kind}",
        _PERCEIVER,
        _PERCEIVER_BLOCKS,
        num_outputs=1,
        **{"image_size": 8, **more},
    )


ARCHITECTURES = (
    _vit_like("beit", "BeitForImageClassification", "beit.layers.{}", _BEIT),
    _vit_like(
        "beit",
        "BeitForImageClassification",
        "beit.layers.{}",
        {**_BEIT, "use_relative_position_bias": True},
        name="beit-relative",
    ),
    # The first layer of a stage has a downsampling shortcut, of equal width too.
    Architecture(
        "bit-preactivation",
        "bit",
        "BitForImageClassification",
        {**_BIT, "layer_type": "preactivation"},
        _stages("bit.encoder.stages.{}.layers.{}", *_BEYOND_FIRST),
    ),
    Architecture(
        "bit-bottleneck",
        "bit",
        "BitForImageClassification",
        {**_BIT, "layer_type": "bottleneck"},
        _stages("bit.encoder.stages.{}.layers.{}", *_BEYOND_FIRST),
        activation="Relu",
        branch="drop_path",
    ),
    _vit_like("clip", "CLIPForImageClassification", "vision_model.encoder.layers.{}", _CLIP),
    Architecture(
        "convnext",
        "convnext",
        "ConvNextForImageClassification",
        {**_CONVNEXT, "layer_scale_init_value": 0.5},
        _stages("convnext.encoder.stages.{}.layers.{}", range(2), range(3)),
    ),
    Architecture(
        "convnextv2",
        "convnextv2",
        "ConvNextV2ForImageClassification",
        _CONVNEXT,
        _stages("convnextv2.encoder.stages.{}.layers.{}", range(2), range(3)),
    ),
    Architecture(
        "cvt",
        "cvt",
        "CvtForImageClassification",
        {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
        _stages("cvt.encoder.stages.{}.layers.{}", range(1), range(2), range(3)),
    ),
    _vit_like(
        "data2vec-vision",
        "Data2VecVisionForImageClassification",
        "data2vec_vision.encoder.layer.{}",
        _BEIT,
        num_outputs=2,
    ),
    _vit_like(
        "data2vec-vision",
        "Data2VecVisionForImageClassification",
        "data2vec_vision.encoder.layer.{}",
        {**_BEIT, "attn_implementation": "eager"},
        name="data2vec-vision-eager",
        num_outputs=1,
    ),
    _vit_like("deit", "DeiTForImageClassification", "deit.layers.{}", _VIT),
    _vit_like(
        "deit",
        "DeiTForImageClassificationWithTeacher",
        "deit.layers.{}",
        _VIT,
        name="deit-teacher",
        returns_loss=False,
    ),
    _vit_like("dinov2", "Dinov2ForImageClassification", "dinov2.encoder.layer.{}", _DINO),
    _vit_like(
        "dinov2",
        "Dinov2ForImageClassification",
        "dinov2.encoder.layer.{}",
        {**_DINO, "use_swiglu_ffn": True},
        name="dinov2-swiglu",
    ),
    _vit_like(
        "dinov2_with_registers",
        "Dinov2WithRegistersForImageClassification",
        "dinov2_with_registers.encoder.layer.{}",
        _DINO,
    ),
    Architecture(
        "donut-swin",
        "donut-swin",
        "DonutSwinForImageClassification",
        _SWIN,
        _stages("donut.encoder.layers.{}.blocks.{}", range(2), range(3)),
        num_outputs=1,
    ),
    # The first block of each of the two groups, 0 and 2, has no shortcut, of equal width too.
    Architecture(
        "efficientnet",
        "efficientnet",
        "EfficientNetForImageClassification",
        {
            "image_size": 32,
            "width_coefficient": 0.1,
            "depth_coefficient": 1.0,
            "kernel_sizes": [3, 3],
            "in_channels": [80, 80],
            "out_channels": [80, 160],
            "strides": [1, 2],
            "num_block_repeats": [2, 3],
            "expand_ratios": [1, 4],
            "hidden_dim": 128,
        },
        _layers("efficientnet.encoder.blocks.{}", (1, 3, 4)),
    ),
    Architecture(
        "focalnet",
        "focalnet",
        "FocalNetForImageClassification",
        _FOCALNET,
        _stages("focalnet.encoder.stages.{}.layers.{}", range(2), range(1)),
    ),
    Architecture(
        "focalnet-postnorm",
        "focalnet",
        "FocalNetForImageClassification",
        {**_FOCALNET, "use_post_layernorm": True, "use_layerscale": True, "layerscale_value": 0.5},
        _stages("focalnet.encoder.stages.{}.layers.{}", range(2), range(1)),
    ),
    Architecture(
        "hgnet_v2",
        "hgnet_v2",
        "HGNetV2ForImageClassification",
        {
            "embedding_size": 8,
            "depths": [2, 3],
            "hidden_sizes": [16, 32],
            "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 16],
            "stage_mid_channels": [4, 4],
            "stage_out_channels": [16, 32],
            "stage_num_blocks": [2, 3],
            "stage_downsample": [False, True],
            "stage_downsample_strides": [2, 2],
            "stage_light_block": [False, True],
            "stage_kernel_size": [3, 3],
            "stage_numb_of_layers": [2, 2],
        },
        _stages("encoder.stages.{}.blocks.{}", *_BEYOND_FIRST),
    ),
    # The first layer of the second stage pools and widens.
    Architecture(
        "hiera",
        "hiera",
        "HieraForImageClassification",
        {
            "embed_dim": 8,
            "image_size": [32, 32],
            "depths": [2, 3],
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "masked_unit_size": [2, 2],
            "masked_unit_attention": [True, False],
            "mlp_ratio": 2.0,
        },
        _stages("hiera.encoder.stages.{}.layers.{}", range(2), (1, 2)),
        num_outputs=2,
    ),
    _vit_like("ijepa", "IJepaForImageClassification", "ijepa.layers.{}", _VIT),
    Architecture(
        "imagegpt",
        "imagegpt",
        "ImageGPTForImageClassification",
        {
            "vocab_size": 17,
            "n_positions": 16,
            "n_embd": 16,
            "n_layer": 3,
            "n_head": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        _layers("transformer.h.{}", 3),
        num_outputs=2,
        make_batch=_color_clusters,
    ),
    Architecture("levit", "levit", "LevitForImageClassification", _LEVIT, _LEVIT_BLOCKS, image_size=64),
    Architecture(
        "levit-teacher",
        "levit",
        "LevitForImageClassificationWithTeacher",
        _LEVIT,
        _LEVIT_BLOCKS,
        image_size=64,
        returns_loss=False,
    ),
    _vit_like("metaclip_2", "MetaClip2ForImageClassification", "vision_model.encoder.layers.{}", _CLIP),
    Architecture(
        "mobilenet_v1",
        "mobilenet_v1",
        "MobileNetV1ForImageClassification",
        {"image_size": 32, "depth_multiplier": 0.25},
    ),
    # 16 layers of fixed widths; the others change the width or the resolution.
    Architecture(
        "mobilenet_v2",
        "mobilenet_v2",
        "MobileNetV2ForImageClassification",
        {"image_size": 32, "depth_multiplier": 0.25},
        _layers("mobilenet_v2.layer.{}", (1, 3, 4, 6, 7, 8, 10, 11, 13, 14)),
    ),
    Architecture(
        "mobilevit",
        "mobilevit",
        "MobileViTForImageClassification",
        _MOBILEVIT,
        (*_layers("mobilevit.encoder.layer.1.layer.{}", (1, 2)), *_MOBILEVIT_TRANSFORMERS),
        image_size=64,
    ),
    # A first layer of equal widths has a shortcut too.
    Architecture(
        "mobilevit-equal-neck",
        "mobilevit",
        "MobileViTForImageClassification",
        {**_MOBILEVIT, "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]},
        (
            "mobilevit.encoder.layer.0.layer.0",
            *_layers("mobilevit.encoder.layer.1.layer.{}", (1, 2)),
            *_MOBILEVIT_TRANSFORMERS,
        ),
        image_size=64,
    ),
    Architecture(
        "mobilevitv2",
        "mobilevitv2",
        "MobileViTV2ForImageClassification",
        {
            "image_size": 64,
            "width_multiplier": 0.25,
            "base_attn_unit_dims": [32, 32, 32],
            "n_attn_blocks": [1, 2, 1],
        },
        (
            # Widths of 16 and 16 at this multiplier.
            "mobilevitv2.encoder.layer.0.layer.0",
            "mobilevitv2.encoder.layer.1.layer.1",
            "mobilevitv2.encoder.layer.2.transformer.layer.0",
            "mobilevitv2.encoder.layer.3.transformer.layer.0",
            "mobilevitv2.encoder.layer.3.transformer.layer.1",
            "mobilevitv2.encoder.layer.4.transformer.layer.0",
        ),
        image_size=64,
    ),
    # The self-attention layers run `num_blocks` times with the same weights: one name each.
    _perceiver("Learned"),
    _perceiver("Fourier"),
    _perceiver("ConvProcessing", image_size=16),
    Architecture(
        "poolformer",
        "poolformer",
        "PoolFormerForImageClassification",
        {**_POOLFORMER, "layer_scale_init_value": 0.5},
        _stages("poolformer.encoder.block.{}.{}", range(2), range(1)),
        num_outputs=1,
    ),
    Architecture(
        "poolformer-unscaled",
        "poolformer",
        "PoolFormerForImageClassification",
        {**_POOLFORMER, "use_layer_scale": False},
        _stages("poolformer.encoder.block.{}.{}", range(2), range(1)),
        num_outputs=1,
    ),
    Architecture(
        "pp_lcnet",
        "pp_lcnet",
        "PPLCNetForImageClassification",
        {"scale": 0.25, "class_expand": 32},
        returns_loss=False,
    ),
    Architecture(
        "pvt",
        "pvt",
        "PvtForImageClassification",
        {**_PYRAMID, "image_size": 32, "patch_sizes": [4, 2], "sequence_reduction_ratios": [2, 1]},
        _stages("pvt.encoder.block.{}.{}", range(2), range(1)),
        num_outputs=1,
    ),
    Architecture(
        "pvt_v2",
        "pvt_v2",
        "PvtV2ForImageClassification",
        {**_PYRAMID, "image_size": 32, "patch_sizes": [7, 3], "sr_ratios": [2, 1]},
        _stages("pvt_v2.encoder.layers.{}.blocks.{}", range(2), range(1)),
        num_outputs=1,
    ),
    Architecture(
        "pvt_v2-linear",
        "pvt_v2",
        "PvtV2ForImageClassification",
        {**_PYRAMID, "image_size": 32, "patch_sizes": [7, 3], "sr_ratios": [2, 1], "linear_attention": True},
        _stages("pvt_v2.encoder.layers.{}.blocks.{}", range(2), range(1)),
        num_outputs=1,
    ),
    Architecture(
        "regnet-y",
        "regnet",
        "RegNetForImageClassification",
        {**_REGNET, "layer_type": "y"},
        _stages(_REGNET_NAME, *_BEYOND_FIRST),
        activation="Relu",
        branch="layer",
    ),
    # A first stage that does not downsample keeps width and resolution.
    Architecture(
        "regnet-x",
        "regnet",
        "RegNetForImageClassification",
        {**_REGNET, "layer_type": "x", "downsample_in_first_stage": False},
        _stages(_REGNET_NAME, (0, 1), (1, 2)),
        activation="Relu",
        branch="layer",
    ),
    Architecture(
        "regnet-gelu",
        "regnet",
        "RegNetForImageClassification",
        {**_REGNET, "hidden_act": "gelu"},
        _stages(_REGNET_NAME, *_BEYOND_FIRST),
        exact=False,
        activation="Gelu",
        branch="layer",
    ),
    Architecture(
        "resnet-basic",
        "resnet",
        "ResNetForImageClassification",
        _RESNET,
        _stages(_RESNET_NAME, (0, 1), (1, 2)),
        activation="Relu",
        branch="layer",
    ),
    Architecture(
        "resnet-bottleneck",
        "resnet",
        "ResNetForImageClassification",
        {**_RESNET, "layer_type": "bottleneck", "hidden_sizes": [16, 32]},
        _stages(_RESNET_NAME, *_BEYOND_FIRST),
        activation="Relu",
        branch="layer",
    ),
    Architecture(
        "resnet-gelu",
        "resnet",
        "ResNetForImageClassification",
        {**_RESNET, "hidden_act": "gelu"},
        _stages(_RESNET_NAME, (0, 1), (1, 2)),
        exact=False,
        activation="Gelu",
        branch="layer",
    ),
    Architecture(
        "segformer",
        "segformer",
        "SegformerForImageClassification",
        {**_PYRAMID, "patch_sizes": [7, 3], "sr_ratios": [2, 1]},
        _stages("segformer.stages.{}.blocks.{}", range(2), range(1)),
    ),
    Architecture(
        "shieldgemma2",
        "shieldgemma2",
        "ShieldGemma2ForImageClassification",
        {
            "text_config": {**_TEXT, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8},
            "vision_config": {**_VIT, "num_hidden_layers": 2},
            "mm_tokens_per_image": 4,
            "image_token_index": 60,
            "boi_token_index": 61,
            "eoi_token_index": 62,
            "yes_token_index": 8,
            "no_token_index": 9,
        },
        (
            *_layers("model.model.vision_tower.encoder.layers.{}", 2),
            *_layers("model.model.language_model.layers.{}", 2),
        ),
        make_batch=_prompt,
        returns_loss=False,
        needs_inputs=True,
    ),
    _vit_like(
        "siglip",
        "SiglipForImageClassification",
        "vision_model.encoder.layers.{}",
        {"vision_config": _VIT, "text_config": _TEXT},
    ),
    _vit_like(
        "siglip2",
        "Siglip2ForImageClassification",
        "vision_model.encoder.layers.{}",
        {
            "vision_config": {key: value for key, value in _VIT.items() if key != "image_size"}
            | {"patch_size": 4, "num_patches": 16},
            "text_config": _TEXT,
        },
        make_batch=_patches,
        needs_inputs=True,
    ),
    # Between the stages stand patch embeddings, in the same list.
    Architecture(
        "swiftformer",
        "swiftformer",
        "SwiftFormerForImageClassification",
        {
            "image_size": 32,
            "depths": [2, 3],
            "embed_dims": [8, 16],
            "downsamples": [True, True],
            "mlp_ratio": 2,
            "layer_scale_init_value": 0.5,
        },
        (
            *_layers("swiftformer.encoder.network.0.blocks.{}", 2),
            *_layers("swiftformer.encoder.network.2.blocks.{}", 3),
        ),
    ),
    Architecture(
        "swin",
        "swin",
        "SwinForImageClassification",
        _SWIN,
        _stages("swin.encoder.layers.{}.blocks.{}", range(2), range(3)),
        num_outputs=2,
    ),
    Architecture(
        "swinv2",
        "swinv2",
        "Swinv2ForImageClassification",
        _SWIN,
        _stages("swinv2.encoder.layers.{}.blocks.{}", range(2), range(3)),
        num_outputs=1,
    ),
    # Its "identity" branch is a batch normalization.
    Architecture(
        "textnet",
        "textnet",
        "TextNetForImageClassification",
        {"image_size": 32, "stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 8, 8]},
    ),
    _vit_like("vit", "ViTForImageClassification", "vit.layers.{}", _VIT),
    _vit_like("vit_msn", "ViTMSNForImageClassification", "vit.layers.{}", _VIT),
)

WITH_BLOCKS = tuple(architecture for architecture in ARCHITECTURES if architecture.blocks)
SKIPPABLE = tuple(architecture for architecture in WITH_BLOCKS if architecture.exact)
