"""Let frozen convolutions save only their weight for backward.

The gradient of a convolution's input needs the weight and the shape of the input. PyTorch also saves the input, for a
weight gradient that is not computed. (A frozen Linear layer already saves only its weight.)

Source: `torch.nn.grad.conv2d_input` computes the same gradient from a shape.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from hf_featreuse.method.class_swap import bound_class


@functools.cache
def input_free_class(plain: type[_ConvNd]) -> type[nn.Module]:
    """Return the class of a convolution that does not save its input while its weight and bias are frozen.

    Outputs and gradients are bit-identical. Compiled code does not change: the compiler already saves only what
    backward uses.

    Args:
        plain (`type`): the class of a layer from `convolutions`.

    Example:
        >>> import torch
        >>> from hf_featreuse.method.class_swap import set_class
        >>> from hf_featreuse.method.frozen_convolution import input_free_class
        >>> layer, x = torch.nn.Conv2d(1, 1, 3).requires_grad_(False), torch.ones(1, 1, 3, 3, requires_grad=True)
        >>> set_class(layer, input_free_class(torch.nn.Conv2d))
        >>> torch.equal(*torch.autograd.grad(layer(x).sum(), x), layer.weight)
        True
    """

    def _conv_forward(
        layer: _ConvNd, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        # A single image has no batch dimension.
        if torch.compiler.is_compiling() or trains or inputs.dim() != weight.dim():
            return plain._conv_forward(layer, inputs, weight, bias)
        return _FrozenConvolution.apply(inputs, weight, bias, layer, plain)

    return bound_class(plain, {"_conv_forward": _conv_forward})


def convolutions(modules: Iterable[nn.Module]) -> list[_ConvNd]:
    """Return the convolutions that `input_free_class` works with: torch's own, padded with zeros."""
    found = (module for module in modules if isinstance(module, _ConvNd) and type(module) in _PLAIN)
    return [layer for layer in found if layer.padding_mode == "zeros" and not isinstance(layer.padding, str)]


_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _FrozenConvolution(torch.autograd.Function):
    """The layer's own forward, with a backward only to its input."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        inputs, weight, bias, layer, plain = args
        ctx.save_for_backward(weight)
        ctx.layer, ctx.shape, ctx.stride, ctx.dtype = layer, inputs.shape, inputs.stride(), inputs.dtype
        return plain._conv_forward(layer, inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,) = grad_outputs
        (weight,), layer = ctx.saved_tensors, ctx.layer
        # Only its strides are used, for the memory format. Under autocast it has the lower precision.
        inputs = torch.empty_strided(ctx.shape, ctx.stride, dtype=gradient.dtype, device=gradient.device)
        found, _, _ = torch.ops.aten.convolution_backward(
            gradient,
            inputs,
            weight.to(gradient.dtype),
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0] * len(layer.stride),
            layer.groups,
            [True, False, False],
        )
        return found.to(ctx.dtype), None, None, None, None
