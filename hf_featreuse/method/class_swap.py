"""Let modules answer their calls by a rule inside a context, and restore them afterwards.

A bound module gets a subclass of its own class, of the same name, that applies the rule of the instance first. Unlike
an attribute of the instance, a subclass can change `__call__`, and a deep copy or pickle made meanwhile has the plain
class.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_featreuse.errors import StepError
from hf_featreuse.method.blocks import ResidualBlock

# What a bound module does with its plain method, and the arguments and keyword arguments of a call.
Rule = Callable[[Callable, tuple, Mapping[str, Any]], Any]
# "__call__" is outside of module hooks and activation checkpointing, "forward" inside.
Method = Literal["__call__", "forward"]

# Attributes of bound instances start with this, and are left out of copies.
_OURS = "_feature_reuse_"
_RULE = f"{_OURS}rule"
_DIVISOR = f"{_OURS}divisor"
# Attributes of the instance that are hidden while it is bound.
_ASIDE = f"{_OURS}aside"
# The plain class of each bound class.
_plain: dict[type[nn.Module], type[nn.Module]] = {}


@contextlib.contextmanager
def bind_rules(rules: Sequence[tuple[ResidualBlock, Rule]], method: Method) -> Iterator[None]:
    """Apply a rule before a method of each block until the exit.

    Raises:
        StepError: a block is bound already.
    """
    bound: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for block, rule in rules:
            module, attributes = block.module, block.module.__dict__
            if _RULE in attributes:
                raise StepError(f"Block {block.name} is being skipped or scaled already. Leave that context first.")
            plain = type(module)
            bound.append((module, plain))
            call = types.MethodType(getattr(plain, method), module)
            # A forward set on the instance, such as by a library that patches it, would hide the subclass's.
            if method == "forward" and "forward" in attributes:
                call = attributes.pop("forward")
                attributes[_ASIDE] = {"forward": call}
            attributes[_RULE] = functools.partial(rule, call)
            set_class(module, _rule_class(plain, method))
        yield
    finally:
        for module, plain in reversed(bound):
            set_class(module, plain)
            module.__dict__.pop(_RULE, None)
            module.__dict__.update(module.__dict__.pop(_ASIDE, {}))


@contextlib.contextmanager
def divide_outputs(divisors: Sequence[tuple[nn.Module, torch.Tensor]]) -> Iterator[None]:
    """Divide the output of each module by a scalar tensor until the exit, also inside compiled code.

    Forward hooks are not an option: graphs that are already compiled ignore a hook that is added later.
    """
    bound: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module, divisor in divisors:
            plain = type(module)
            if _DIVISOR in module.__dict__:
                raise StepError(f"A {plain.__name__} is being scaled already. Leave that context first.")
            bound.append((module, plain))
            module.__dict__[_DIVISOR] = divisor
            set_class(module, _dividing_class(plain))
        yield
    finally:
        for module, plain in reversed(bound):
            set_class(module, plain)
            module.__dict__.pop(_DIVISOR, None)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module without `nn.Module.__setattr__`, which first searches parameters and buffers."""
    object.__setattr__(module, "__class__", cls)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has when it is not bound."""
    return _plain.get(type(module), type(module))


@functools.cache
def _rule_class(plain: type[nn.Module], method: Method) -> type[nn.Module]:
    """Return the bound class of a module class whose method applies the instance's rule."""

    @functools.wraps(getattr(plain, method))
    def bound(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_RULE](args, kwargs)

    if method == "forward" and issubclass(plain, GradientCheckpointingLayer):
        # Since transformers 5.23 only the forward that this base class wrapped last is checkpointed.
        wrapped = type(plain.__name__, (GradientCheckpointingLayer,), {"forward": bound})
        return bound_class(plain, {"forward": wrapped.forward})
    return bound_class(plain, {method: bound})


@functools.cache
def _dividing_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the bound class of a module class whose output is divided by a tensor of the instance."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return plain.__call__(self, *args, **kwargs) / self.__dict__[_DIVISOR]

    return bound_class(plain, {"__call__": __call__})


class _Quiet(nn.Module):
    """First base of bound classes, so that no `__init_subclass__` of a module's class runs, which may register it."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def bound_class(plain: type[nn.Module], members: Mapping[str, Any]) -> type[nn.Module]:
    """Return a subclass with these members and the name of its parent, which FSDP's wrap policy and reprs expect.

    Copies and pickles of its instances have the plain class. Keep the result: each call makes a new class.
    """
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    copied = {"__deepcopy__": _deepcopy, "__reduce_ex__": _reduce_ex}
    bases = (plain,) if plain in _plain else (_Quiet, plain)
    # Without the metaclass, which may register classes too.
    subclass = type.__new__(type(plain), plain.__name__, bases, {**names, **copied, **members})
    _plain[subclass] = _plain.get(plain, plain)
    return subclass


@contextlib.contextmanager
def _as_plain(module: nn.Module) -> Iterator[None]:
    """Restore a bound module to its unbound state until the exit."""
    bound, attributes = type(module), module.__dict__
    ours = {name: attributes.pop(name) for name in list(attributes) if name.startswith(_OURS)}
    aside = ours.get(_ASIDE, {})
    attributes.update(aside)
    set_class(module, plain_class(module))
    try:
        yield
    finally:
        set_class(module, bound)
        for name in aside:
            del attributes[name]
        attributes.update(ours)


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    with _as_plain(module):
        return copy.deepcopy(module, memo)


def _reduce_ex(module: nn.Module, protocol: Any) -> Any:
    with _as_plain(module):
        reduced: Any = module.__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        # A class that returns its `__dict__` itself would get our attributes again at the exit.
        function, *parts = (dict(part) if part is module.__dict__ else part for part in reduced)
    # Not `copyreg.__newobj__`: pickle requires that its class is that of the instance.
    return (object.__new__ if function is vars(copyreg)["__newobj__"] else function, *parts)
