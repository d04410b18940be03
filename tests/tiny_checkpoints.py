"""Tiny checkpoints on disk that the tests of commands share."""

import torch
from transformers import AutoModelForImageClassification

from hf_featreuse.small_models import small_config, small_image_processor

DIGITS = [str(digit) for digit in range(10)]


def save(folder, depth: int = 2, labels: list[str] = DIGITS, model_type: str = "vit", **overrides) -> str:
    """A tiny checkpoint with random weights, and its image processor."""
    torch.manual_seed(depth)
    if model_type == "vit":
        overrides = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, **overrides}
        overrides["num_hidden_layers"] = depth
    config = small_config(model_type, 8, len(labels), labels, overrides)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    small_image_processor(config, 8).save_pretrained(folder)
    return str(folder)
