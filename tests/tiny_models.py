"""Tiny random models and data that the tests share."""

import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

NUM_LABELS = 3
IMAGE_SIZE = 32
# ViT: plain tensors; ConvNeXt: stages; ResNet: BatchNorm and ReLU after the addition; Swin: tuple returns.
ARCHITECTURES = ("vit", "convnext", "resnet", "swin")
WITHOUT_BATCH_NORM = ("vit", "convnext", "swin")


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny image classifier with random weights; every residual branch does something."""
    torch.manual_seed(seed)
    if name == "vit":
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=IMAGE_SIZE,
            patch_size=8,
            num_labels=NUM_LABELS,
        )
        model = ViTForImageClassification(config)
    elif name == "convnext":
        # A layer scale of 1e-6, the default, would hide a branch that is wrongly kept.
        config = ConvNextConfig(
            num_stages=2, hidden_sizes=[8, 16], depths=[2, 2], layer_scale_init_value=0.5, num_labels=NUM_LABELS
        )
        model = ConvNextForImageClassification(config)
    elif name == "convnext_4_stages":
        config = ConvNextConfig(
            hidden_sizes=[8, 16, 24, 32], depths=[2, 2, 2, 2], layer_scale_init_value=0.5, num_labels=NUM_LABELS
        )
        model = ConvNextForImageClassification(config)
    elif name == "resnet":
        config = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[2, 3], layer_type="basic", num_labels=NUM_LABELS
        )
        model = ResNetForImageClassification(config)
    else:
        config = SwinConfig(
            image_size=IMAGE_SIZE,
            patch_size=4,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[1, 2],
            window_size=4,
            drop_path_rate=0.0,
            num_labels=NUM_LABELS,
        )
        model = SwinForImageClassification(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def batch(size: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "labels": torch.randint(NUM_LABELS, (size,), generator=generator),
    }


def examples(count: int = 64, seed: int = 2) -> list[dict]:
    """A training set as Trainer takes it."""
    data = batch(count, seed)
    return [{"pixel_values": data["pixel_values"][i], "labels": int(data["labels"][i])} for i in range(count)]


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a model that a step must leave as it was, weights and statistics aside."""
    return {
        "keys": list(model.state_dict()),
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for module in model.modules()
        ],
        "track_running_stats": [getattr(module, "track_running_stats", None) for module in model.modules()],
    }
