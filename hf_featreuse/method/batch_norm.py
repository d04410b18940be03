"""Make activation checkpointing count each batch of BatchNorm layers once.

A checkpointed part runs in forward and again in backward, so its running statistics would be updated twice per batch,
also in plain training. Here the second run updates copies.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hf_featreuse.method.class_swap import bound_class, set_class


@contextlib.contextmanager
def count_batches_once(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Update running statistics only in forwards, not in the recomputation of a backward inside the context.

    Statistics, `num_batches_tracked` and gradients are bit-identical to those without checkpointing. On exit the
    layers are as before.

    Args:
        norms (`list[torch.nn.Module]`): normalization layers with running statistics.

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
            set_class(norm, _counting_class(plain))
        yield
    finally:
        for norm, plain in zip(norms, classes, strict=True):
            set_class(norm, plain)


@functools.cache
def _counting_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the bound class of a module class whose buffers do not change in calls inside a backward.

    A class, unlike a function set on the layer, also serves its replicas.
    """

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The compiler keeps buffers out of what it recomputes.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return plain.__call__(self, *args, **kwargs)
        moving = self._buffers
        # Without statistics the call would save fewer tensors than the forward did, which torch refuses.
        self.__dict__["_buffers"] = {name: None if b is None else b.clone() for name, b in moving.items()}
        try:
            return plain.__call__(self, *args, **kwargs)
        finally:
            self.__dict__["_buffers"] = moving

    return bound_class(plain, {"__call__": __call__})


def norm_layers(modules: Iterable[nn.Module]) -> list[_NormBase]:
    """Return the normalization layers among the modules whose running statistics change in training."""
    return [module for module in modules if isinstance(module, _NormBase) and module.track_running_stats]
