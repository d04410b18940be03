"""Raise an error if backward runs after the exit of a step, when blocks are no longer skipped or frozen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from hf_featreuse.errors import StepError
from hf_featreuse.method.class_swap import bound_class, set_class

_WATCH = "_feature_reuse_watch"


@contextlib.contextmanager
def backward_inside(model: nn.Module, step: str) -> Iterator[None]:
    """Make outputs that the model returns inside refuse a backward after the exit.

    Args:
        model (`torch.nn.Module`): the model that is called inside.
        step (`str`): name of the step, for the error.

    Raises:
        StepError: in a backward after the exit.
    """
    is_open = True

    def check(_gradient: torch.Tensor) -> None:
        if not is_open:
            raise StepError(
                f"Backward ran after `{step}` was left, when its blocks are no longer skipped or frozen, so gradients "
                "could be wrong. Call `loss.backward()` inside the `with` block of the step, after the forward."
            )

    def watch(output: Any) -> None:
        for value in _values(output):
            # A hook on a leaf, such as a parameter that is returned, would stay.
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                value.register_hook(check)

    plain = type(model)
    model.__dict__[_WATCH] = watch
    set_class(model, _watched_class(plain))
    try:
        yield
    finally:
        is_open = False
        set_class(model, plain)
        model.__dict__.pop(_WATCH, None)


@functools.cache
def _watched_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the bound class of a model whose outputs are watched."""

    @functools.wraps(plain.__call__)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = plain.__call__(self, *args, **kwargs)
        self.__dict__[_WATCH](output)
        return output

    return bound_class(plain, {"__call__": __call__})


def _values(output: Any) -> Iterable[Any]:
    """Return the values in a model's output: a tensor, or the items of a tuple, a dictionary or another object."""
    if isinstance(output, torch.Tensor):
        return (output,)
    if isinstance(output, (tuple, list)):
        return output
    return (output if isinstance(output, dict) else getattr(output, "__dict__", {})).values()
