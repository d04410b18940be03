"""Let activation checkpointing count the batches of BatchNorm layers once.

A checkpointed part runs in forward and again in backward, so its running statistics would move twice for a batch, in
plain training too. Here the second run moves copies.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hf_featreuse.method.class_swap import same_named_subclass


@contextlib.contextmanager
def count_batches_once(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Let running statistics move in forwards only, not in the recomputation of a backward inside the context.

    Statistics, `num_batches_tracked` and gradients are those without checkpointing, to the bit. On exit the layers are
    as before.

    Args:
        norms (`list[torch.nn.Module]`): normalisation layers with running statistics.

    Example:
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> from hf_featreuse.method.batch_norm import count_batches_once
        >>> norm, x = torch.nn.BatchNorm1d(2), torch.randn(4, 2, requires_grad=True)
        >>> with count_batches_once([norm]):
        ...     checkpoint(norm, x, use_reentrant=False).square().sum().backward()
        >>> norm.num_batches_tracked.item()
        1
    """
    classes = [type(norm) for norm in norms]
    try:
        for norm, plain in zip(norms, classes, strict=True):
            # Past `nn.Module.__setattr__`, which looks through parameters and buffers first.
            object.__setattr__(norm, "__class__", _subclass(plain))
        yield
    finally:
        for norm, plain in zip(norms, classes, strict=True):
            object.__setattr__(norm, "__class__", plain)


@functools.cache
def _subclass(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module class, of the same name, whose buffers stay as they are in calls inside a backward.

    A class, unlike a function set on the layer, also serves its replicas.
    """

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The compiler keeps buffers out of what it recomputes.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return plain.__call__(self, *args, **kwargs)
        moving = self._buffers
        # Without statistics the call would save fewer tensors than the forward has, which torch refuses.
        self.__dict__["_buffers"] = {name: None if b is None else b.clone() for name, b in moving.items()}
        try:
            return plain.__call__(self, *args, **kwargs)
        finally:
            self.__dict__["_buffers"] = moving

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # Copies and pickles made inside are of the plain class, without which pickle would not find them either.
        return object.__new__, (plain,), self.__dict__

    return same_named_subclass(plain, {"__call__": __call__, "__reduce_ex__": __reduce_ex__})
