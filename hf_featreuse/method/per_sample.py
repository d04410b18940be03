"""Drop path per sample: every sample of a batch has its own set D of residual blocks.

Inside a block the batch is divided into groups of samples, the block runs on each group as the step requires, and the
outputs are put back in order. In stochastic depth a block is computed only on the samples that keep it. In masked
freeze it trains on the samples that dropped it and is frozen for the rest, which form one group whatever they train
elsewhere: kernel libraries select kernels again for each new number of samples, so a block should see few.

Sources: drop path per sample is timm's `drop_path` and torchvision's `stochastic_depth` in mode "row", which compute
every sample and mask some; computing only the kept samples is from DINOv2 (arXiv 2304.07193, section 5).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_featreuse.errors import ConfigurationError, StepError
from hf_featreuse.method.batch_arguments import Split, put_together, take_apart, with_items
from hf_featreuse.method.blocks import ResidualBlock, check_exact, check_outputs
from hf_featreuse.method.class_swap import Rule, bind_rules
from hf_featreuse.method.freezing import freeze
from hf_featreuse.method.frozen_buffers import copied_buffers
from hf_featreuse.method.samples_apart import check_apart, check_samples
from hf_featreuse.method.skipping import Scaling, shortcut

# The states of a block for a sample.
TRAINS, FROZEN, RESTS = 0, 1, 2


def sample_groups(masks: np.ndarray, *, freezing: bool, gradient_everywhere: bool) -> np.ndarray:
    """Return the group of each sample at each block, in the shape of the masks; at most two groups per block.

    Args:
        masks (`numpy.ndarray`): of shape (samples, L), `True` where the sample drops the block.
        freezing (`bool`): masked freeze, not stochastic depth. In stochastic depth samples that dropped the block are
            in `RESTS` and the others in `TRAINS`; in masked freeze they are in `TRAINS`, and the others in `FROZEN` if
            any sample trains an earlier block, else in `RESTS`, without backward.
        gradient_everywhere (`bool`): in masked freeze, compute gradients of every sample down to the input.
    """
    if not freezing:
        return np.where(masks, RESTS, TRAINS).astype(np.int8)
    before = np.full(masks.shape[1], gradient_everywhere)
    before[1:] |= np.logical_or.accumulate(masks.any(0))[:-1]
    return np.where(masks, TRAINS, np.where(before, FROZEN, RESTS)).astype(np.int8)


@contextlib.contextmanager
def skip_samples(
    blocks: Sequence[ResidualBlock],
    masks: np.ndarray,
    device: torch.device,
    *,
    survival: Sequence[float] | None = None,
    allow_inexact: bool = False,
    checked: bool = False,
) -> Iterator[None]:
    """Compute each block only on the samples that keep it, in every forward and backward pass inside the context.

    Args:
        blocks (`list[ResidualBlock]`): L blocks in forward order.
        masks (`numpy.ndarray`): of shape (samples, L), `True` where a sample drops a block.
        device (`torch.device`): device of the batch.
        survival (`list[float]`, *optional*): survival probability of each block, by which the increments of the
            samples that keep it are divided; by default they are not.
        allow_inexact (`bool`, defaults to `False`): also skip blocks whose shortcut is not a bitwise identity.
        checked (`bool`, defaults to `False`): skip the checks of blocks and masks, which were done before.

    Raises:
        BlockError: a block is inexact, normalizes over the batch, or the first dimension of its stream is not the
            batch.
        StepError: when called, a batch has another number of samples.
        ConfigurationError: `masks` or `survival` does not fit `blocks`, or the increment of a block cannot be scaled.
    """
    if not checked:
        check_outputs(blocks)
        if not allow_inexact:
            check_exact(blocks)
    scaling = Scaling(blocks, [1.0] * len(blocks) if survival is None else survival)
    if not checked:
        check_samples(blocks, masks)
    splits = _splits(~masks, device, rest=True)
    rules = [
        (block, _in_groups(block, split, kept or _plain, shortcut(block)))
        for (block, kept), split in zip(scaling.rules, splits, strict=True)
    ]
    with scaling.branches(), _bound(rules):
        yield


@contextlib.contextmanager
def train_samples(
    blocks: Sequence[ResidualBlock],
    masks: np.ndarray,
    device: torch.device,
    *,
    gradient_everywhere: bool = False,
    checked: bool = False,
) -> Iterator[None]:
    """Train each block only on the samples that dropped it, in every forward and backward pass inside the context.

    Parameters outside the blocks are not frozen.

    Args:
        blocks (`list[ResidualBlock]`): L blocks in forward order.
        masks (`numpy.ndarray`): of shape (samples, L), `True` where a sample dropped a block.
        device (`torch.device`): device of the batch.
        gradient_everywhere (`bool`, defaults to `False`): compute gradients of every sample down to the input, for a
            trunk that trains.
        checked (`bool`, defaults to `False`): skip the checks of blocks and masks, which were done before.

    Raises:
        BlockError: a block normalizes over the batch, or the first dimension of its stream is not the batch.
        StepError: when called, a batch has another number of samples.
        ConfigurationError: `masks` does not fit `blocks`.
    """
    if not checked:
        check_samples(blocks, masks)
    # Blocks that are called several times, as with shared weights, have no single place in the order.
    everywhere = gradient_everywhere or any(block.num_calls > 1 for block in blocks)
    rests = (sample_groups(masks, freezing=True, gradient_everywhere=everywhere) == RESTS).any(0)
    rules = [
        (block, _in_groups(block, split, _plain, _resting(block) if resting else _frozen(block)))
        for block, split, resting in zip(blocks, _splits(masks, device, rest=False), rests, strict=True)
    ]
    with _bound(rules):
        yield


def _bound(rules: list[tuple[ResidualBlock, Rule]]) -> contextlib.AbstractContextManager[None]:
    """Bind the rules at `forward`: module hooks get the whole batch, and activation checkpointing repeats the groups.

    For compiled blocks bind them at the call: each group runs a graph, with hooks and checkpointing inside.
    """
    block, last = rules[-1]
    rules = [*rules[:-1], (block, _with_graph(last))]
    if not any(_is_compiled(block) for block, _ in rules):
        return bind_rules(rules, "forward")
    checkpointed = next((block for block, _ in rules if _is_checkpointed_outside(block.module)), None)
    if checkpointed is not None:
        raise ConfigurationError(
            f'Block {checkpointed.name} is compiled and checkpointed, which `drop_granularity="sample"` supports from '
            "transformers 5.23 on: before, backward would recompute frozen samples as ones that train. Set "
            '`torch_compile=False` or `gradient_checkpointing=False`, or `drop_granularity="batch"`.'
        )
    return bind_rules(rules, "__call__")


def _is_compiled(block: ResidualBlock) -> bool:
    return block.module._compiled_call_impl is not None


def _is_checkpointed_outside(module: nn.Module) -> bool:
    """Return whether activation checkpointing is around the call of a module, as before transformers 5.23."""
    layer = GradientCheckpointingLayer
    return "__call__" in vars(layer) and isinstance(module, layer) and module.gradient_checkpointing


def _splits(trains: np.ndarray, device: torch.device, *, rest: bool) -> list[Split]:
    """Return one split per block: the samples that it trains on and, without `rest`, the others."""
    return [Split(len(trains), rows[: 2 - rest], rest) for rows in index_rows(trains, device)]


def index_rows(chosen: np.ndarray, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the chosen and the other samples of each block, copied to the device at once.

    Args:
        chosen (`numpy.ndarray`): of shape (samples, L).
        device (`torch.device`): device of the batch.
    """
    order = torch.from_numpy(np.ascontiguousarray(np.argsort(~chosen.T, axis=1, kind="stable")))
    if device.type == "cuda":
        # Otherwise the host would wait for the copy.
        order = order.pin_memory()
    samples, counts = len(chosen), chosen.sum(0).tolist()
    sizes = [size for count in counts for size in (count, samples - count)]
    rows = iter(order.to(device, non_blocking=True).view(-1).split_with_sizes(sizes))
    return list(zip(rows, rows, strict=True))


def _in_groups(block: ResidualBlock, split: Split, trains: Rule, other: Rule) -> Rule:
    """Return the rule of a block: one rule for the samples that it trains on, another for the others."""
    training = len(split.rows[0])

    def rule(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        count = block.stream(args, kwargs).shape[0]
        if count != split.num_samples:
            raise StepError(
                f"Block {block.name} was called with {count} samples in a step that was planned for "
                f"{split.num_samples}. Pass the number of samples of the micro-batch as `batch_size`; if the model "
                'runs on another number, use `drop_granularity="batch"`.'
            )
        if training in (0, count):
            return (trains if training else other)(call, args, kwargs)
        if block.module.training and torch.is_grad_enabled():
            # Checked eagerly: a compiled block would compile graphs for two samples.
            check_apart(block, block.module.forward if _is_compiled(block) else call, args, kwargs)
        first, second = take_apart(block.unbatched, args, kwargs, split)
        return put_together([trains(call, *first), other(call, *second)], split)

    return rule


def _plain(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return call(*args, **kwargs)


def _frozen(block: ResidualBlock) -> Rule:
    """Run the block with frozen parameters; the gradient of its input is still computed."""

    def rule(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        trained = [parameter for parameter in block.module.parameters() if parameter.requires_grad]
        with freeze(trained, []), copied_buffers(block.module):
            return call(*args, **kwargs)

    return rule


def _resting(block: ResidualBlock) -> Rule:
    """Run the block for samples that need no gradient of it or of earlier parts."""
    if _is_compiled(block):
        # Without gradients it would need another graph; the output of a frozen one is detached instead.
        return _frozen(block)

    def rule(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        with torch.no_grad(), copied_buffers(block.module):
            return call(*args, **kwargs)

    return rule


def _with_graph(rule: Rule) -> Rule:
    """Return the rule with an output from which backward can start even if no sample of the batch trains anything."""

    def anchored(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        output = rule(call, args, kwargs)
        first = output if isinstance(output, torch.Tensor) else output[0]
        if not torch.is_grad_enabled() or first.requires_grad:
            return output
        first = first.detach().requires_grad_()
        return first if isinstance(output, torch.Tensor) else with_items(output, (first, *output[1:]))

    return anchored
