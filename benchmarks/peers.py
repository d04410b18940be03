"""Drop path of other libraries around the blocks of a model, for comparison."""

from __future__ import annotations

import copy

import torch
from torch import nn

from hf_featreuse import find_residual_blocks


def with_drop_path(model: nn.Module, rates: list[float], drop_path: type[nn.Module]) -> nn.Module:
    """Return a copy of the model with drop path of another library around its residual blocks."""
    model = copy.deepcopy(model)
    for block, rate in zip(find_residual_blocks(model), rates, strict=True):
        layer = drop_path(rate)

        def hook(_module, args, kwargs, output, block=block, layer=layer):
            stream = block.stream(args, kwargs)
            first = output if isinstance(output, torch.Tensor) else output[0]
            first = stream + layer(first - stream)
            return first if isinstance(output, torch.Tensor) else (first, *output[1:])

        block.module.register_forward_hook(hook, with_kwargs=True)
    return model
