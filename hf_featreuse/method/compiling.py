"""Compile residual blocks one by one, so that every set of dropped blocks runs the same few graphs.

A graph of the whole model would be valid for one set D only. A block's graph depends on what requires gradients: its
weights and its input. Below the lowest block that trains no input does; two of the four cases are avoided by passing
such a block a detached input that requires gradients:

- A frozen block below it runs the same graph as a frozen block above it, and its output is detached. This costs
  nothing, as no backward reaches it.
- The lowest block that trains runs the same graph as those above it. This adds the gradient of the input of its first
  layer: of a norm in transformers, of a depthwise convolution in ConvNeXt.

Two graphs for training and one for evaluation remain for blocks of the same shape. They take any batch size, so with
one set per sample they also run each group of samples; a single sample needs separate graphs. If an activation follows
the addition, stochastic-depth steps scale the branch inside the block and need one more graph for all survival
probabilities; other blocks are scaled outside of their graph.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._prims_common import make_contiguous_strides_for

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.method.blocks import ResidualBlock
from hf_featreuse.method.class_swap import plain_class
from hf_featreuse.method.dummy_forward import check_not_compiled

_COMPILED = "_compiled_call_impl"
# Graphs of blocks of one shape: four, four more for a batch of one, and some to spare.
_GRAPHS_PER_SHAPE = 16


@contextlib.contextmanager
def compile_blocks(blocks: Sequence[ResidualBlock], **options: Any) -> Iterator[None]:
    """Run residual blocks as compiled graphs, one block at a time, inside the context.

    Blocks of the same class and shapes share their graphs, which are compiled at first use. Enter it before the model
    is wrapped for distributed training, and keep it open as long as the model trains; use steps, skipping and freezing
    inside. At exit the model is as before. A deep copy or pickle made inside is not compiled.

    Args:
        blocks (`list[ResidualBlock]`): the blocks to compile; the rest of the model runs eagerly.
        options (`dict[str, Any]`): keyword arguments of `torch.compile`, such as `backend`, `mode` and `dynamic`.

    Raises:
        BlockError: a block or a part of it is already compiled.
        ConfigurationError: `mode` records CUDA graphs.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import compile_blocks, find_residual_blocks, skip_blocks
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=8, patch_size=4)
        >>> model = ViTForImageClassification(config)
        >>> blocks = find_residual_blocks(model)
        >>> with compile_blocks(blocks, backend="aot_eager"):
        ...     with skip_blocks(blocks[:1]):
        ...         model(torch.zeros(2, 3, 8, 8)).logits.sum().backward()
        >>> all(parameter.grad is None for parameter in blocks[0].module.parameters())
        True
    """
    check_mode(options.get("mode"))
    for block in blocks:
        check_not_compiled(block.module, block.name)
    any_batch_size = options.get("dynamic") is None
    options, settings = _for_this_torch({"recompile_limit": _GRAPHS_PER_SHAPE, **options})
    shared: dict[Any, Callable] = {}
    try:
        for block in blocks:
            shape = (type(block.module), tuple((name, p.shape) for name, p in block.module.named_parameters()))
            if shape not in shared:
                shared[shape] = torch.compile(_entry(block.name), **options)
            # `module.compile` also sets this attribute; torch leaves it out of copies and pickles.
            block.module.__dict__[_COMPILED] = _call(block, shared[shape], any_batch_size)
        with settings:
            yield
    finally:
        for block in blocks:
            block.module.__dict__.pop(_COMPILED, None)


@contextlib.contextmanager
def run_eagerly(model: nn.Module) -> Iterator[None]:
    """Run compiled parts of a model as they were before compiling, inside the context.

    While hooks or a counter of operations are active, torch does not compile a block, and until 2.13 never does after.
    """
    compiled = [(module, module.__dict__.pop(_COMPILED)) for module in model.modules() if _COMPILED in module.__dict__]
    try:
        yield
    finally:
        for module, call in compiled:
            module.__dict__[_COMPILED] = call


def check_mode(mode: str | None) -> None:
    """Raise `ConfigurationError` for a mode of `torch.compile` that records CUDA graphs.

    They are stored in a tree of the calls of an iteration, one branch for each sequence, and steps that drop random
    blocks rarely have the same sequence.
    """
    if mode in ("reduce-overhead", "max-autotune"):
        raise ConfigurationError(
            f'`torch_compile_mode="{mode}"` records a CUDA graph for every sequence of blocks that a step runs, but '
            "random sets give a new one in nearly every step. Leave the mode unset, or set it to "
            '"max-autotune-no-cudagraphs".'
        )


def _for_this_torch(options: dict[str, Any]) -> tuple[dict[str, Any], contextlib.AbstractContextManager]:
    """Split off the options of `torch.compile` that older versions of torch have only as global settings."""
    settings: dict[str, Any] = {}
    # Compared as versions, not as text.
    if torch.__version__ < "2.12":
        settings["recompile_limit"] = options.pop("recompile_limit")
    if torch.__version__ < "2.13":
        # Otherwise a graph of a frozen block would run a training block without gradients (pytorch/pytorch#139476).
        settings["skip_tensor_guards_with_matching_dict_tags"] = False
        settings["use_recursive_dict_tags_for_guards"] = False
    return options, torch._dynamo.config.patch(settings)


def _run(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a block with its hooks; this function is compiled."""
    return module._call_impl(*args, **kwargs)


def _entry(name: str) -> Callable:
    """Return a copy of `_run` with another name.

    torch stores graphs, their limit and what it knows about dynamic sizes per code object. A copy separates shapes,
    and its graphs are freed with it.
    """
    return types.FunctionType(_run.__code__.replace(co_name=name), globals(), name)


def _call(block: ResidualBlock, compiled: Callable, any_batch_size: bool) -> Callable:
    """Return the function that a call of a compiled block runs."""
    module = block.module

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = type(module)
        # A graph is valid for one class, so use the plain class also if the block is scaled.
        module.__class__ = plain_class(module)
        try:
            stream = block.stream(args, kwargs)
            no_backward = torch.is_grad_enabled() and not _requires_grad((args, kwargs))
            alias = _Alias.apply(stream.detach().requires_grad_() if no_backward else stream)
            if any_batch_size:
                torch._dynamo.maybe_mark_dynamic(alias, 0)
            args = tuple(alias if value is stream else value for value in args)
            kwargs = {key: alias if value is stream else value for key, value in kwargs.items()}
            output = compiled(module, args, kwargs)
            return _detached(output) if no_backward and not block.has_trainable_parameters else output
        finally:
            module.__class__ = bound

    return call


class _Alias(torch.autograd.Function):
    """Return the same tensor without properties that cause recompilation: view or leaf, strides of axes of size 1."""

    @staticmethod
    def forward(_ctx: Any, tensor: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if 1 in tensor.shape and tensor.is_contiguous():
            tensor = tensor.as_strided(tensor.shape, make_contiguous_strides_for(tensor.shape))
        return tensor.detach()

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient


def _requires_grad(value: Any) -> bool:
    """Return whether any tensor in a nested structure requires gradients."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        value = value.values()
    return isinstance(value, (tuple, list, type({}.values()))) and any(map(_requires_grad, value))


def _detached(output: Any) -> Any:
    """Return the output of a block, a tensor or a tuple, detached."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    return tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in output)
