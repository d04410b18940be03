"""Skip residual blocks for a while: they are not computed and act as their shortcut.

A skipped block gets a subclass of its own class, of the same name, whose `__call__` returns the residual stream. The
call is the outermost place there is: the block's own module hooks, activation checkpointing and a sharded engine's
communication all stay inside it and are skipped too.

Source: stochastic depth, Huang et al. 2016 (arXiv 1603.09382). Dividing the increment of a kept block by its survival
probability is the convention of timm's `drop_path` and torchvision's `stochastic_depth`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_featreuse.blocks import ResidualBlock, check_exact, check_scalable
from hf_featreuse.errors import BlockError, ConfigurationError, StepError

_RULE = "_feature_reuse_rule"
_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


@contextlib.contextmanager
def skip_blocks(
    dropped: Sequence[ResidualBlock],
    *,
    kept: Sequence[ResidualBlock] = (),
    survival: Sequence[float] | None = None,
    allow_inexact: bool = False,
) -> Iterator[None]:
    """Leave out residual blocks in every forward and backward inside the context.

    Hold it through backward: activation checkpointing runs the forward again there. On exit the model is as before:
    classes, attributes, hooks and `state_dict` keys. A deep copy or pickle made inside holds plain classes.

    Args:
        dropped (`list[ResidualBlock]`): blocks that return their residual stream at once.
        kept (`list[ResidualBlock]`, defaults to none): blocks whose residual increment is scaled.
        survival (`list[float]`, *optional*): survival probability, above 0 and up to 1, of each block of `kept`; a
            block's output becomes `x + (block(x) - x) / survival`.
        allow_inexact (`bool`, defaults to `False`): skip blocks too whose shortcut is no identity to the bit. They
            return their input as it is, without the activation that follows the addition.

    Raises:
        BlockError: a block is inexact or stands in both lists; when called, a scaled block changes its input in place.
        ConfigurationError: `survival` does not fit `kept`, or an activation follows the addition of a block in `kept`.
        StepError: a block is being skipped already.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import find_residual_blocks, skip_blocks
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> model = ViTForImageClassification(config)
        >>> blocks = find_residual_blocks(model)
        >>> with skip_blocks(blocks[:1]):
        ...     model(torch.zeros(1, 3, 224, 224)).logits.sum().backward()
        >>> all(parameter.grad is None for parameter in blocks[0].module.parameters())
        True
    """
    rules: list[tuple[ResidualBlock, Callable]] = [(block, _shortcut(block)) for block in dropped]
    rules += [
        (block, _scaled(block, probability))
        for block, probability in zip(kept, _check(dropped, kept, survival, allow_inexact), strict=True)
        if probability != 1
    ]
    bound: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for block, rule in rules:
            module = block.module
            if _RULE in module.__dict__:
                raise StepError(f"Block {block.name} is being skipped or scaled already; leave that context first.")
            bound.append((module, type(module)))
            module.__class__ = _subclass(type(module))
            module.__dict__[_RULE] = rule
        yield
    finally:
        for module, plain in reversed(bound):
            module.__class__ = plain
            module.__dict__.pop(_RULE, None)


def _check(
    dropped: Sequence[ResidualBlock],
    kept: Sequence[ResidualBlock],
    survival: Sequence[float] | None,
    allow_inexact: bool,
) -> Sequence[float]:
    if not allow_inexact:
        check_exact(dropped)
    check_scalable(kept)
    both = {id(block.module) for block in dropped} & {id(block.module) for block in kept}
    if both:
        name = next(block.name for block in dropped if id(block.module) in both)
        raise BlockError(f"Block {name} is in `dropped` and in `kept`; pass it in one of them.")
    probabilities = list(survival or ())
    if len(probabilities) != len(kept):
        raise ConfigurationError(
            f"`survival` has {len(probabilities)} entries for {len(kept)} kept blocks. Pass one probability for each."
        )
    wrong = [p for p in probabilities if not 0 < p <= 1]
    if wrong:
        raise ConfigurationError(f"`survival` holds {wrong[0]!r}. A survival probability is above 0 and at most 1.")
    return probabilities


def _shortcut(block: ResidualBlock) -> Callable:
    """What a dropped block does when called: the residual stream, in the shape of the block's own output."""

    def rule(_call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        stream = block.stream(args, kwargs)
        if block.num_outputs is None:
            return stream
        # Asked for attentions, a block returns them second, and its caller takes them from there.
        count = max(block.num_outputs, 2) if _asks_for_attentions(block, args, kwargs) else block.num_outputs
        return (stream, *(None,) * (count - 1))

    return rule


def _asks_for_attentions(block: ResidualBlock, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call passes a true `output_attentions`, by keyword or by position."""
    if "output_attentions" in kwargs:
        return bool(kwargs["output_attentions"])
    names = _parameter_names(type(block.module).forward)
    position = names.index("output_attentions") if "output_attentions" in names else len(args)
    return position < len(args) and bool(args[position])


@functools.cache
def _parameter_names(forward: Callable) -> list[str]:
    """Names of the parameters of a forward after `self`."""
    return list(inspect.signature(forward).parameters)[1:]


def _scaled(block: ResidualBlock, survival: float) -> Callable:
    """What a kept block does when called: its increment divided by its survival probability."""

    def rule(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        stream = block.stream(args, kwargs)
        version = stream._version
        output = call(*args, **kwargs)
        if stream._version != version:
            raise BlockError(
                f"Block {block.name} changes its input in place, so what it adds cannot be scaled. Set "
                "`scale_kept=False`."
            )
        first = output if isinstance(output, torch.Tensor) else output[0]
        scaled = (stream + (first - stream) / survival).to(first.dtype)
        return scaled if isinstance(output, torch.Tensor) else (scaled, *output[1:])

    return rule


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it is outside of `skip_blocks`."""
    return type(module).__bases__[0] if _RULE in module.__dict__ else type(module)


def _subclass(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module class, of the same name, that asks the instance's rule before anything else."""
    if plain in _subclasses:
        return _subclasses[plain]

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_RULE](functools.partial(plain.__call__, self), args, kwargs)

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        rule = self.__dict__.pop(_RULE)
        self.__class__ = plain
        try:
            return copy.deepcopy(self, memo)
        finally:
            self.__class__ = subclass
            self.__dict__[_RULE] = rule

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # Not `copyreg.__newobj__`: pickle insists that its class is the instance's own.
        state = {key: value for key, value in self.__dict__.items() if key != _RULE}
        return object.__new__, (plain,), state

    methods = {"__call__": __call__, "__deepcopy__": __deepcopy__, "__reduce_ex__": __reduce_ex__}
    # FSDP's wrap policy and reprs go by the class name.
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    subclass = type(plain.__name__, (plain,), {**names, **methods})
    _subclasses[plain] = subclass
    return subclass
