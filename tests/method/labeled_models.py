"""Tiny models of every kind of block, each with the names of the blocks that a reader finds in it."""

import pytest
import torch
from tiny_models import NUM_LABELS, build
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_featreuse import ResidualBlock

TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": NUM_LABELS,
}
CONVNEXT = {"num_stages": 3, "hidden_sizes": [8, 8, 16], "depths": [1, 2, 1], "num_labels": NUM_LABELS}


def vit() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(**TRANSFORMER))


def deit() -> PreTrainedModel:
    return DeiTForImageClassification(DeiTConfig(**TRANSFORMER))


def beit() -> PreTrainedModel:
    return BeitForImageClassification(BeitConfig(**TRANSFORMER))


def dinov2() -> PreTrainedModel:
    config = {key: value for key, value in TRANSFORMER.items() if key != "intermediate_size"}
    return Dinov2ForImageClassification(Dinov2Config(mlp_ratio=2, **config))


def convnext() -> PreTrainedModel:
    return build("convnext")


def convnextv2() -> PreTrainedModel:
    return ConvNextV2ForImageClassification(ConvNextV2Config(**CONVNEXT))


def resnet(layer_type: str = "basic", hidden_act: str = "relu") -> PreTrainedModel:
    sizes = [8, 16] if layer_type == "basic" else [16, 32]
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=sizes,
        depths=[2, 3],
        layer_type=layer_type,
        hidden_act=hidden_act,
        num_labels=NUM_LABELS,
    )
    return ResNetForImageClassification(config)


def bottleneck() -> PreTrainedModel:
    return resnet("bottleneck")


def swin(image_size: int = 32, window_size: int = 4) -> PreTrainedModel:
    config = SwinConfig(
        image_size=image_size,
        patch_size=4,
        embed_dim=8,
        depths=[1, 2],
        num_heads=[1, 2],
        window_size=window_size,
        num_labels=NUM_LABELS,
    )
    return SwinForImageClassification(config)


def mobilenet_v2() -> PreTrainedModel:
    config = MobileNetV2Config(
        image_size=32, depth_multiplier=0.25, depth_divisible_by=4, min_depth=4, num_labels=NUM_LABELS
    )
    return MobileNetV2ForImageClassification(config)


def mobilenet_v1() -> PreTrainedModel:
    return MobileNetV1ForImageClassification(
        MobileNetV1Config(image_size=32, depth_multiplier=0.25, num_labels=NUM_LABELS)
    )


MODELS = {
    "vit": (vit, [f"vit.layers.{i}" for i in range(3)]),
    "deit": (deit, [f"deit.layers.{i}" for i in range(3)]),
    "dinov2": (dinov2, [f"dinov2.encoder.layer.{i}" for i in range(3)]),
    "beit": (beit, [f"beit.layers.{i}" for i in range(3)]),
    "convnext": (
        convnext,
        [f"convnext.encoder.stages.{s}.layers.{i}" for s, i in ((0, 0), (0, 1), (1, 0), (1, 1))],
    ),
    # Stages of one block each: no sibling to compare with.
    "convnextv2": (
        convnextv2,
        [f"convnextv2.encoder.stages.{s}.layers.{i}" for s, i in ((0, 0), (1, 0), (1, 1), (2, 0))],
    ),
    # The first block of a stage that changes size has a projection as its shortcut and is left out.
    "resnet": (resnet, [f"resnet.encoder.stages.{s}.layers.{i}" for s, i in ((0, 0), (0, 1), (1, 1), (1, 2))]),
    "bottleneck": (bottleneck, [f"resnet.encoder.stages.{s}.layers.{i}" for s, i in ((0, 1), (1, 1), (1, 2))]),
    "swin": (swin, [f"swin.encoder.layers.{s}.blocks.{i}" for s, i in ((0, 0), (1, 0), (1, 1))]),
    "mobilenet_v2": (mobilenet_v2, [f"mobilenet_v2.layer.{i}" for i in (1, 3, 4, 6, 7, 8, 10, 11, 13, 14)]),
}
every_model = pytest.mark.parametrize("kind", MODELS)
ADAPTED = {
    "vit": ["q_proj", "v_proj"],
    "convnext": ["pwconv1"],
    "swin": ["q_proj", "v_proj"],
    "resnet": ["convolution"],
}


def names(blocks: list[ResidualBlock]) -> list[str]:
    return [block.name for block in blocks]


class InPlace(nn.Module):
    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.linear(x)
        if self.early:
            x += branch
            return x
        branch += x
        return branch
