"""Let modules answer their calls by a rule for a while, and be what they were afterwards.

A bound module gets a subclass of its own class, of the same name, that asks the rule of the instance first. Unlike an
attribute of the instance, a subclass can change `__call__`, and a deep copy or pickle made meanwhile is of the plain
class.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from hf_featreuse.errors import StepError
from hf_featreuse.method.blocks import ResidualBlock

# What a bound module does, given its plain method, the arguments and the keyword arguments of a call.
Rule = Callable[[Callable, tuple, Mapping[str, Any]], Any]
# "__call__" is outside of module hooks and activation checkpointing, "forward" inside.
Method = Literal["__call__", "forward"]

_RULE = "_feature_reuse_rule"
_DIVISOR = "_feature_reuse_divisor"
_subclasses: dict[tuple[type[nn.Module], Method], type[nn.Module]] = {}


@contextlib.contextmanager
def bind_rules(rules: Sequence[tuple[ResidualBlock, Rule]], method: Method) -> Iterator[None]:
    """Put a rule before a method of each block until the exit.

    Raises:
        StepError: a block is bound already.
    """
    bound: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    try:
        for block, rule in rules:
            module = block.module
            if _RULE in module.__dict__:
                raise StepError(f"Block {block.name} is being skipped or scaled already; leave that context first.")
            # A forward set on the instance, as by a library that patches it, would hide the subclass's.
            patched = (
                {"forward": module.__dict__.pop("forward")}
                if "forward" in module.__dict__ and method == "forward"
                else {}
            )
            plain = type(module)
            bound.append((module, plain, patched))
            call = patched.get(method) or functools.partial(getattr(plain, method), module)
            module.__dict__[_RULE] = functools.partial(rule, call)
            module.__class__ = _subclass(plain, method)
        yield
    finally:
        for module, plain, patched in reversed(bound):
            module.__class__ = plain
            module.__dict__.pop(_RULE, None)
            module.__dict__.update(patched)


@contextlib.contextmanager
def divide_outputs(divisors: Sequence[tuple[nn.Module, torch.Tensor]]) -> Iterator[None]:
    """Divide the output of each module by a scalar tensor until the exit, inside compiled code too.

    A forward hook would not do: graphs that are compiled already ignore one that is added later.
    """
    bound: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module, divisor in divisors:
            plain = type(module)
            if _DIVISOR in module.__dict__:
                raise StepError(f"A {plain.__name__} is being scaled already; leave that context first.")
            bound.append((module, plain))
            module.__dict__[_DIVISOR] = divisor
            module.__class__ = _dividing_subclass(plain)
        yield
    finally:
        for module, plain in reversed(bound):
            module.__class__ = plain
            module.__dict__.pop(_DIVISOR, None)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it is while no rule is bound."""
    return type(module).__bases__[0] if _RULE in module.__dict__ else type(module)


def _subclass(plain: type[nn.Module], method: Method) -> type[nn.Module]:
    """The subclass of a module class, of the same name, whose method asks the instance's rule."""
    if (plain, method) in _subclasses:
        return _subclasses[plain, method]

    @functools.wraps(getattr(plain, method))
    def bound(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_RULE](args, kwargs)

    subclass = _subclasses[plain, method] = _copied_as_plain(plain, method, bound, _RULE)
    return subclass


@functools.cache
def _dividing_subclass(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module class, of the same name, whose output is divided by a tensor of the instance."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return plain.__call__(self, *args, **kwargs) / self.__dict__[_DIVISOR]

    return _copied_as_plain(plain, "__call__", __call__, _DIVISOR)


def _copied_as_plain(plain: type[nn.Module], method: Method, function: Callable, attribute: str) -> type[nn.Module]:
    """A subclass with another method, whose copies and pickles are of the plain class and lack an attribute."""

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        value = self.__dict__.pop(attribute)
        self.__class__ = plain
        try:
            return copy.deepcopy(self, memo)
        finally:
            self.__class__ = subclass
            self.__dict__[attribute] = value

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        value = self.__dict__.pop(attribute)
        try:
            # Leaves out what the class does not pickle, such as the compiled call of a module.
            state = self.__getstate__()
        finally:
            self.__dict__[attribute] = value
        # Not `copyreg.__newobj__`: pickle insists that its class is the instance's own.
        return object.__new__, (plain,), state

    methods = {method: function, "__deepcopy__": __deepcopy__, "__reduce_ex__": __reduce_ex__}
    subclass = same_named_subclass(plain, methods)
    return subclass


def same_named_subclass(plain: type[nn.Module], methods: Mapping[str, Any]) -> type[nn.Module]:
    """A subclass with these methods that goes by the name of its parent, as FSDP's wrap policy and reprs expect."""
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), {**names, **methods})
