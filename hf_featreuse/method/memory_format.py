"""Keep convolutional models in the memory format that a GPU's convolutions are fast in."""

from __future__ import annotations

import torch
from torch import nn

from hf_featreuse.errors import ConfigurationError

# Of the layers with weights, those that are two-dimensional convolutions, above which a model counts as convolutional:
# a ViT has one for its patches, a ConvNeXt a third, a ResNet all but its head.
_CONVOLUTIONAL = 0.25


def set_memory_format(model: nn.Module, channels_last: bool | None, device: torch.device, *, in_shards: bool) -> bool:
    """Lay a model out channels last if asked to, or if that is likely to be faster; return whether it now is.

    Activations follow from the weights of convolutions, so inputs need no conversion. Results differ by rounding.

    Args:
        model (`torch.nn.Module`): the model, not wrapped yet.
        channels_last (`bool`, *optional*): as asked for; `None` decides by device and model.
        device (`torch.device`): the model trains on.
        in_shards (`bool`): whether a backend will cut the weights into shards.

    Raises:
        ConfigurationError: it was asked for, and a backend will cut the weights into shards.

    Example:
        >>> import torch
        >>> from hf_featreuse.method.memory_format import set_memory_format
        >>> model = torch.nn.Conv2d(3, 8, 3)
        >>> set_memory_format(model, True, torch.device("cpu"), in_shards=False)
        True
        >>> model.weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    if channels_last and in_shards:
        raise ConfigurationError(
            "`channels_last=True` does not work with FSDP2, which shards contiguous weights only. Leave "
            "`channels_last` unset, or train with DistributedDataParallel."
        )
    if channels_last is None:
        channels_last = device.type == "cuda" and not in_shards and is_convolutional(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # missing in torch's stubs
    return channels_last


def is_convolutional(model: nn.Module) -> bool:
    """Return whether many of the layers of a model are two-dimensional convolutions."""
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    others = sum(isinstance(module, nn.Linear) for module in model.modules())
    return convolutions > _CONVOLUTIONAL * (convolutions + others)
