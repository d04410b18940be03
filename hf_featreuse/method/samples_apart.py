"""Raise for blocks in which samples depend on others of the batch, such as normalization over the batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from hf_featreuse.errors import BlockError, ConfigurationError
from hf_featreuse.method.batch_arguments import Split, take_apart
from hf_featreuse.method.blocks import ResidualBlock
from hf_featreuse.method.frozen_buffers import copied_buffers

# Blocks that passed the check that each sample is computed independently.
_apart: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_per_sample(model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
    """Raise `BlockError` unless the samples of a batch can be computed separately."""
    found = next(((name, module) for name, module in model.named_modules() if _is_batch_norm(module)), None)
    if found is not None:
        raise _not_apart(f"train {type(model).__name__}: `{found[0]}` is a {type(found[1]).__name__}")
    wrong = next((block for block in blocks if not block.has_batch_first), None)
    if wrong is not None:
        raise BlockError(
            f'`drop_granularity="sample"` cannot separate the samples in block {wrong.name}: the first dimension of '
            'its residual stream is not the batch. Set `drop_granularity="batch"`, or exclude the block with '
            "`target_blocks`."
        )


def _not_apart(what: str) -> BlockError:
    return BlockError(
        f'`drop_granularity="sample"` cannot {what}, which normalizes over the batch or mixes its samples, so the '
        'output for a sample would depend on the others in its group. Set `drop_granularity="batch"`.'
    )


def _is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is BatchNorm, or by its name or running statistics a similar norm that is not frozen."""
    if isinstance(module, _NormBase):
        return isinstance(module, _BatchNorm)
    name = type(module).__name__.lower()
    looks_like_one = "batchnorm" in name or "running_var" in module._buffers
    return looks_like_one and "frozen" not in name and not any(module.children())


def check_samples(blocks: Sequence[ResidualBlock], masks: np.ndarray) -> None:
    """Check what `FeatureReuse` checks at construction, for calls without it."""
    if masks.ndim != 2 or masks.shape[1] != len(blocks):
        raise ConfigurationError(
            f"`masks` has the shape {masks.shape} for {len(blocks)} blocks. Pass one row per sample and one column "
            "per block."
        )
    for block in blocks:
        check_per_sample(block.module, [block])


def check_apart(block: ResidualBlock, call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raise `BlockError` if the output for one sample depends on another; each block is checked once."""
    stream = block.stream(args, kwargs)
    if block.module in _apart or type(stream) is not torch.Tensor:
        return
    # Activation checkpointing counts saved tensors, and must not count those of this check.
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    random_state = torch.random.fork_rng([stream.device] if stream.is_cuda else [])
    with unseen, random_state, copied_buffers(block.module), torch.enable_grad():
        rows = torch.arange(2, device=stream.device)
        (args, kwargs), *_ = take_apart(block.unbatched, args, kwargs, Split(len(stream), [rows], rest=False))
        pair = block.stream(args, kwargs)
        leaf = pair.detach().requires_grad_()
        # Not the leaf itself, because blocks may change their input in place.
        watched = leaf.clone()
        args = tuple(watched if value is pair else value for value in args)
        kwargs = {key: watched if value is pair else value for key, value in kwargs.items()}
        output = call(*args, **kwargs)
        first = (output if isinstance(output, torch.Tensor) else output[0])[0]
        # Different weights, because the plain sum of a normalized tensor does not depend on its input.
        weights = torch.linspace(0.5, 1.5, first.numel(), device=first.device).view(first.shape)
        (gradient,) = torch.autograd.grad((first * weights).sum(), leaf)
    if bool((gradient[1] != 0).any() & gradient.isfinite().all()):
        raise _not_apart(f"train block {block.name}: it contains something")
    _apart.add(block.module)
