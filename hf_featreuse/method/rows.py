"""Take rows out of a batch and put them back, with a backward that moves rows the other way.

Each row belongs to one group, so backward can copy each gradient to its only place. PyTorch's backward of
`index_select` adds to zeros, with slow atomic additions on a GPU. Nothing here synchronizes host and device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def take_rows(tensor: torch.Tensor, rows: Sequence[torch.Tensor], *, rest: bool = False) -> list[torch.Tensor]:
    """Return a copy of the rows of each group, in the memory format of the tensor.

    Args:
        tensor (`torch.Tensor`): of any shape.
        rows (`list[torch.Tensor]`): indices of the rows of each group; no row is in two groups.
        rest (`bool`, defaults to `False`): return the tensor itself as the last item, as the `base` of `put_rows` with
            the same rows. Nothing else may use it: its gradients for these rows are ignored.

    Example:
        >>> import torch
        >>> from hf_featreuse.method.rows import put_rows, take_rows
        >>> first, last = take_rows(torch.arange(4), [torch.tensor([0, 2]), torch.tensor([1, 3])])
        >>> put_rows([first * 10, last], [torch.tensor([0, 2]), torch.tensor([1, 3])])
        tensor([ 0,  1, 20,  3])
    """
    if torch.compiler.is_compiling():
        # The compiler of torch 2.11 loses the gradients of a function whose gradients may be missing.
        return [tensor.index_select(0, of_group) for of_group in rows] + [tensor] * rest
    if torch.is_grad_enabled() and tensor.requires_grad:
        return list(_Take.apply(tensor, rest, *rows))
    return [_gathered(tensor, of_group) for of_group in rows] + [tensor] * rest


def put_rows(
    values: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], base: torch.Tensor | None = None
) -> torch.Tensor:
    """Return one batch with the values of each group in its rows.

    Args:
        values (`list[torch.Tensor]`): the values of each group.
        rows (`list[torch.Tensor]`): indices of the rows of each group; no row is in two groups.
        base (`torch.Tensor`, *optional*): the values of the other rows: the last tensor of `take_rows`; by default the
            groups cover all rows.
    """
    held = values if base is None else (base, *values)
    if len({value.dtype for value in held}) > 1:
        dtype = functools.reduce(torch.promote_types, (value.dtype for value in held))
        values, base = [value.to(dtype) for value in values], None if base is None else base.to(dtype)
    if not torch.compiler.is_compiling():
        return _Put.apply(base, *rows, *values)
    if base is None:
        return torch.cat(list(values)).index_select(0, torch.cat(list(rows)).argsort())
    for of_group, value in zip(rows, values, strict=True):
        base = base.index_copy(0, of_group, value)
    return base


class _Take(torch.autograd.Function):
    """Return copies of rows, and the tensor itself with `rest`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        tensor, rest, *rows = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rows)
        ctx.rest, ctx.shape, ctx.format = rest, tensor.shape, _memory_format(tensor)
        parts = [_gathered(tensor, of_group) for of_group in rows]
        return (*parts, tensor) if rest else tuple(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows = ctx.saved_tensors
        example = next((gradient for gradient in grad_outputs if gradient is not None), None)
        if example is None:
            return (None,) * (2 + len(rows))
        whole = grad_outputs[-1] if ctx.rest else None
        if whole is not None:
            found = whole.clone(memory_format=ctx.format)
        else:
            found = torch.empty(ctx.shape, dtype=example.dtype, device=example.device, memory_format=ctx.format)
            if ctx.rest:
                found.zero_()
        # Without the rest, the groups cover all rows.
        for of_group, gradient in zip(rows, grad_outputs, strict=False):
            if gradient is None:
                found.index_fill_(0, of_group, 0)
            else:
                found.index_copy_(0, of_group, gradient)
        return found, *(None,) * (1 + len(rows))


class _Put(torch.autograd.Function):
    """Put the groups in their rows; backward takes them out."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        base, *groups = args
        rows, values = groups[: len(groups) // 2], groups[len(groups) // 2 :]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rows)
        if base is None:
            count = sum(len(value) for value in values)
            found = _empty((count, *values[0].shape[1:]), values[0])
        else:
            found = base.clone()
        for of_group, value in zip(rows, values, strict=True):
            found.index_copy_(0, of_group, value)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = grad_outputs
        rows = ctx.saved_tensors
        if gradient is None:
            return (None,) * (1 + 2 * len(rows))
        wanted = ctx.needs_input_grad[1 + len(rows) :]
        parts = [_gathered(gradient, of_group) if want else None for of_group, want in zip(rows, wanted, strict=True)]
        return gradient if ctx.needs_input_grad[0] else None, *(None,) * len(rows), *parts


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """Return channels last or contiguous, because the speed of some kernels differs several times between them."""
    is_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last and not tensor.is_contiguous() else torch.contiguous_format


def _empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_memory_format(like))


def _gathered(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return rows of a tensor without autograd, in its memory format."""
    if _memory_format(tensor) is torch.contiguous_format:
        return tensor.index_select(0, rows)
    return torch.index_select(tensor, 0, rows, out=_empty((len(rows), *tensor.shape[1:]), tensor))
