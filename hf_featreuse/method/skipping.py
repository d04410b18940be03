"""Skip residual blocks inside a context: they are not computed and act as their shortcut.

A skipped block gets a subclass of its class, with the same name, whose `__call__` returns the residual stream. Module
hooks, activation checkpointing and the communication of sharded engines are all inside the call, so they are skipped
too.

Source: stochastic depth, Huang et al. 2016 (arXiv 1603.09382). Dividing the increment of a kept block by its survival
probability is the convention of timm's `drop_path` and torchvision's `stochastic_depth`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._guards import active_fake_mode

from hf_featreuse.errors import BlockError, ConfigurationError
from hf_featreuse.method.blocks import ResidualBlock, check_exact, check_outputs, check_scalable
from hf_featreuse.method.class_swap import Rule, bind_rules, divide_outputs


@contextlib.contextmanager
def skip_blocks(
    dropped: Sequence[ResidualBlock],
    *,
    kept: Sequence[ResidualBlock] = (),
    survival: Sequence[float] | None = None,
    allow_inexact: bool = False,
) -> Iterator[None]:
    """Skip residual blocks in every forward and backward pass inside the context.

    Keep it open through backward: activation checkpointing repeats the forward there. At exit the model is as before:
    classes, attributes, hooks and `state_dict` keys. A deep copy or pickle made inside has plain classes.

    Args:
        dropped (`list[ResidualBlock]`): blocks that return their residual stream without computing anything.
        kept (`list[ResidualBlock]`, defaults to none): blocks whose residual increment is scaled.
        survival (`list[float]`, *optional*): survival probability, above 0 and up to 1, of each block of `kept`; a
            block's output becomes `x + (block(x) - x) / survival` or, if an activation follows its addition,
            `activation(x + f(x) / survival)`.
        allow_inexact (`bool`, defaults to `False`): also skip blocks whose shortcut is not a bitwise identity. They
            return their input unchanged, without the activation that follows the addition.

    Raises:
        BlockError: a block is inexact or in both lists; when called, a scaled block changes its input in place.
        ConfigurationError: `survival` does not fit `kept`, or the increment of a block in `kept` cannot be scaled.
        StepError: a block is already skipped.

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
    check_outputs(dropped)
    if not allow_inexact:
        check_exact(dropped)
    both = {id(block.module) for block in dropped} & {id(block.module) for block in kept}
    if both:
        name = next(block.name for block in dropped if id(block.module) in both)
        raise BlockError(f"Block {name} is in `dropped` and in `kept`. Pass it in only one of them.")
    rules: list[tuple[ResidualBlock, Rule]] = [(block, shortcut(block)) for block in dropped]
    scaling = Scaling(kept, list(survival or ()))
    rules += [(block, rule) for block, rule in scaling.rules if rule is not None]
    with scaling.branches(), bind_rules(rules, "__call__"):
        yield


class Scaling:
    """Scale kept blocks: the branch of a block that ends in an activation, and the increment of any other block.

    Args:
        blocks (`list[ResidualBlock]`): the blocks.
        survival (`list[float]`): the survival probability of each.

    Attributes:
        rules (`list[tuple[ResidualBlock, Rule]]`): the rule for calls of each block; `None` for the plain call.

    Raises:
        ConfigurationError: the probabilities do not fit the blocks, or the increment of a block cannot be scaled.
    """

    def __init__(self, blocks: Sequence[ResidualBlock], survival: Sequence[float]) -> None:
        if len(survival) != len(blocks):
            raise ConfigurationError(
                f"`survival` has {len(survival)} entries for {len(blocks)} blocks. Pass one probability for each."
            )
        wrong = next((p for p in survival if not 0 < p <= 1), None)
        if wrong is not None:
            raise ConfigurationError(
                f"`survival` contains {wrong!r}, which is not a survival probability. Pass values above 0 and up to 1."
            )
        divided = [(block, p) for block, p in zip(blocks, survival, strict=True) if p != 1]
        check_scalable([block for block, _ in divided])
        # Under FakeTensorMode they must be fake tensors, which cannot be cached for other steps.
        scalar = _scalar if active_fake_mode() is None else _scalar.__wrapped__
        self._branches = [(block.branch, scalar(p)) for block, p in divided if block.branch is not None]
        self.rules: list[tuple[ResidualBlock, Rule | None]] = [
            (block, None if p == 1 or block.branch is not None else _scaled(block, scalar(p)))
            for block, p in zip(blocks, survival, strict=True)
        ]

    def branches(self) -> contextlib.AbstractContextManager[None]:
        """Scale the branches of the blocks that end in an activation inside the context."""
        return divide_outputs(self._branches) if self._branches else contextlib.nullcontext()


@functools.lru_cache(maxsize=1024)
def _scalar(value: float) -> torch.Tensor:
    """Return a probability as a 0-dimensional tensor, which does not change dtype and device of what it divides.

    Unlike a number, autograd saves it: if backward runs after the step was left, activation checkpointing then raises
    an error instead of computing wrong gradients. Compiled blocks also take a new value without a new graph.
    """
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float64, device="cpu")


def shortcut(block: ResidualBlock) -> Rule:
    """Return the rule of a dropped block: it returns the residual stream, structured like the block's output."""

    def rule(_call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        stream = block.stream(args, kwargs)
        if block.num_outputs is None:
            return stream
        # With `output_attentions`, the caller expects attentions as the second output.
        count = max(block.num_outputs, 2) if _asks_for_attentions(block, args, kwargs) else block.num_outputs
        others = [
            None if key is None else args[key] if isinstance(key, int) else kwargs[key] for key in block.passed_on
        ]
        return (stream, *others, *(None,) * (count - 1 - len(others)))

    return rule


def _asks_for_attentions(block: ResidualBlock, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call passes a true `output_attentions`, by keyword or by position."""
    if "output_attentions" in kwargs:
        return bool(kwargs["output_attentions"])
    names = _parameter_names(type(block.module).forward)
    position = names.index("output_attentions") if "output_attentions" in names else len(args)
    return position < len(args) and bool(args[position])


@functools.cache
def _parameter_names(forward: Callable) -> list[str]:
    """Return the names of the parameters of a forward after `self`."""
    return list(inspect.signature(forward).parameters)[1:]


def _scaled(block: ResidualBlock, survival: torch.Tensor) -> Rule:
    """Return the rule of a kept block: its increment is divided by its survival probability."""

    def rule(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        stream = block.stream(args, kwargs)
        version = None if stream.is_inference() else stream._version
        output = call(*args, **kwargs)
        if version is not None and stream._version != version:
            raise BlockError(
                f"Block {block.name} changes its input in place, so its increment cannot be scaled. Set "
                "`scale_kept=False`."
            )
        first = output if isinstance(output, torch.Tensor) else output[0]
        divided = _Divided.apply(stream, first, survival)
        return divided if isinstance(output, torch.Tensor) else (divided, *output[1:])

    return rule


class _Divided(torch.autograd.Function):
    """`stream + (output - stream) / survival` in the dtype of the output, in fewer operations than one by one."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        stream, output, survival = args
        ctx.save_for_backward(survival)
        ctx.dtype = stream.dtype
        return (output - stream).div_(survival).add_(stream).to(output.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,), (survival,) = grad_outputs, ctx.saved_tensors
        divided = gradient / survival
        return (gradient - divided).to(ctx.dtype) if ctx.needs_input_grad[0] else None, divided, None
