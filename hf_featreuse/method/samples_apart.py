"""Refuse blocks in which samples depend on others of the batch: norms over the batch, whatever their class."""

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

# Blocks that were seen to compute each sample by itself.
_apart: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_per_sample(model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
    """Raise `BlockError` unless the samples of a batch can be computed apart."""
    found = next(((name, module) for name, module in model.named_modules() if _is_batch_norm(module)), None)
    if found is not None:
        raise _not_apart(f"train {type(model).__name__}: `{found[0]}` is a {type(found[1]).__name__}")
    wrong = next((block for block in blocks if not block.has_batch_first), None)
    if wrong is not None:
        raise BlockError(
            f'`drop_granularity="sample"` cannot take apart the samples in block {wrong.name}: the first dimension of '
            'its residual stream is not the batch. Set `drop_granularity="batch"`, or leave it out with '
            "`target_blocks`."
        )


def _not_apart(what: str) -> BlockError:
    return BlockError(
        f'`drop_granularity="sample"` cannot {what}, which normalises over the batch or mixes its samples, so what a '
        'sample gives would depend on which others are computed with it. Set `drop_granularity="batch"`.'
    )


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is BatchNorm, or another norm by name or with running statistics, and not a frozen one."""
    if isinstance(module, _NormBase):
        return isinstance(module, _BatchNorm)
    name = type(module).__name__.lower()
    looks_like_one = "batchnorm" in name or "running_var" in module._buffers
    return looks_like_one and "frozen" not in name and not any(module.children())


def check_samples(blocks: Sequence[ResidualBlock], masks: np.ndarray) -> None:
    """What `FeatureReuse` checks at its construction, for a call without it."""
    if masks.ndim != 2 or masks.shape[1] != len(blocks):
        raise ConfigurationError(
            f"`masks` has the shape {masks.shape} for {len(blocks)} blocks. Pass one row per sample and one column "
            "per block."
        )
    for block in blocks:
        check_per_sample(block.module, [block])


def check_apart(block: ResidualBlock, call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raise `BlockError` if an output of one sample has a gradient for another; looked at once per block."""
    stream = block.stream(args, kwargs)
    if block.module in _apart or type(stream) is not torch.Tensor:
        return
    # Activation checkpointing counts what is saved.
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    random_state = torch.random.fork_rng([stream.device] if stream.is_cuda else [])
    with unseen, random_state, copied_buffers(block.module), torch.enable_grad():
        rows = torch.arange(2, device=stream.device)
        (args, kwargs), *_ = take_apart(block.unbatched, args, kwargs, Split(len(stream), [rows], rest=False))
        pair = block.stream(args, kwargs)
        leaf = pair.detach().requires_grad_()
        # Not the leaf itself, which could not be changed in place.
        watched = leaf.clone()
        args = tuple(watched if value is pair else value for value in args)
        kwargs = {key: watched if value is pair else value for key, value in kwargs.items()}
        output = call(*args, **kwargs)
        first = (output if isinstance(output, torch.Tensor) else output[0])[0]
        # Weights that differ: the sum of what was normalised does not depend on its input.
        weights = torch.linspace(0.5, 1.5, first.numel(), device=first.device).view(first.shape)
        (gradient,) = torch.autograd.grad((first * weights).sum(), leaf)
    if bool((gradient[1] != 0).any() & gradient.isfinite().all()):
        raise _not_apart(f"train block {block.name}: it contains something")
    _apart.add(block.module)
