"""Measure the accuracy of a model on labeled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from hf_featreuse.errors import DataError
from hf_featreuse.method.dummy_forward import model_device


def accuracy_on(batches: Iterable[Mapping[str, torch.Tensor]]) -> Callable[[nn.Module], float]:
    """Return a function that measures a model's top-1 accuracy, for `prune_blocks` and `rank_removals`.

    Args:
        batches (`Iterable[dict[str, torch.Tensor]]`): inputs of the model's forward and `labels`. It is read once per
            measurement: pass a list or a `DataLoader`, not an iterator.

    Returns:
        `Callable[[torch.nn.Module], float]`: from a model to its accuracy, 0 to 1.

    Raises:
        DataError: raised by the function: there is no sample, or a batch has no `labels`.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import accuracy_on
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=8, patch_size=4, num_labels=1)
        >>> batch = {"pixel_values": torch.zeros(4, 3, 8, 8), "labels": torch.zeros(4, dtype=torch.long)}
        >>> accuracy_on([batch])(ViTForImageClassification(config))
        1.0
    """

    def evaluate(model: nn.Module) -> float:
        device, correct, total = model_device(model), 0, 0
        with torch.no_grad():
            for batch in batches:
                if "labels" not in batch:
                    raise DataError(f"A batch has no `labels`, only {sorted(batch)}. Pass labeled validation data.")
                inputs = {key: value.to(device) for key, value in batch.items()}
                labels = inputs.pop("labels")
                correct += int((model(**inputs)[0].argmax(-1) == labels).sum())
                total += len(labels)
        if not total:
            raise DataError(
                "There is no batch to measure accuracy on. Pass a list or a DataLoader, not an iterator that was read "
                "before."
            )
        return correct / total

    return evaluate
