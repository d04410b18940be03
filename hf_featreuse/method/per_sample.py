"""Drop path per sample: every sample of a batch has its own set D of residual blocks.

Inside a block the batch is sorted into groups of samples, the block runs on each group as the step asks, and the
outputs are put back in order. In stochastic depth a block is computed on the samples that keep it, and no others. In
masked freeze it trains on the samples that dropped it and is frozen for the rest; a sample needs no gradient below the
first block that it trains.

Sources: drop path per sample is timm's `drop_path` and torchvision's `stochastic_depth` in mode "row", which compute
every sample and mask some; computing only the samples that are kept, DINOv2 (arXiv 2304.07193, section 5).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_featreuse.errors import ConfigurationError, StepError
from hf_featreuse.method.batch_arguments import Split, put_together, take_apart, with_items
from hf_featreuse.method.blocks import ResidualBlock, check_exact, check_outputs
from hf_featreuse.method.class_swap import Rule, bind_rules
from hf_featreuse.method.freezing import freeze
from hf_featreuse.method.frozen_buffers import copied_buffers
from hf_featreuse.method.samples_apart import check_apart, check_samples
from hf_featreuse.method.skipping import Scaling, shortcut

# Groups of samples, as seen by one block.
TRAINS, FROZEN, RESTS = 0, 1, 2


def sample_groups(masks: np.ndarray, *, freezing: bool, gradient_everywhere: bool) -> np.ndarray:
    """The group of each sample at each block, of the shape of the masks, (samples, L).

    Args:
        masks (`numpy.ndarray`): `True` where the sample drops the block.
        freezing (`bool`): masked freeze, not stochastic depth. In stochastic depth a sample that dropped the block
            rests and the others train; in masked freeze it trains, and of the others those are frozen that train a
            block before this one, while the rest needs no gradient at all.
        gradient_everywhere (`bool`): in masked freeze, give every sample its gradient down to the input.
    """
    if not freezing:
        return np.where(masks, RESTS, TRAINS).astype(np.int8)
    before = np.zeros_like(masks)
    np.logical_or.accumulate(masks[:, :-1], axis=1, out=before[:, 1:])
    return np.where(masks, TRAINS, np.where(before | gradient_everywhere, FROZEN, RESTS)).astype(np.int8)


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
    """Compute each block only on the samples that keep it, in every forward and backward inside the context.

    Args:
        blocks (`list[ResidualBlock]`): L blocks in forward order.
        masks (`numpy.ndarray`): of shape (samples, L), `True` where a sample drops a block.
        device (`torch.device`): of the batch.
        survival (`list[float]`, *optional*): survival probability of each block, by which the increments of the
            samples that keep it are divided; by default they are not.
        allow_inexact (`bool`, defaults to `False`): skip blocks too whose shortcut is not a bitwise identity.
        checked (`bool`, defaults to `False`): leave out the checks of the blocks and masks, which were made before.

    Raises:
        BlockError: a block is inexact, normalises over the batch, or its stream does not begin with the batch.
        StepError: when called, a batch has another number of samples.
        ConfigurationError: `masks` or `survival` does not fit `blocks`, or what a block adds cannot be scaled.
    """
    if not checked:
        check_outputs(blocks)
        if not allow_inexact:
            check_exact(blocks)
    scaling = Scaling(blocks, [1.0] * len(blocks) if survival is None else survival)
    if not checked:
        check_samples(blocks, masks)
    splits = _splits(sample_groups(masks, freezing=False, gradient_everywhere=True), device)
    rules = [
        (block, _in_groups(block, split, {TRAINS: kept or _plain, RESTS: shortcut(block)}))
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
    """Train each block only on the samples that dropped it, in every forward and backward inside the context.

    What lies outside the blocks is not touched; freeze it yourself.

    Args:
        blocks (`list[ResidualBlock]`): L blocks in forward order.
        masks (`numpy.ndarray`): of shape (samples, L), `True` where a sample dropped a block.
        device (`torch.device`): of the batch.
        gradient_everywhere (`bool`, defaults to `False`): give every sample its gradient down to the input, for a
            trunk that trains.
        checked (`bool`, defaults to `False`): leave out the checks of the blocks and masks, which were made before.

    Raises:
        BlockError: a block normalises over the batch, or its stream does not begin with the batch.
        StepError: when called, a batch has another number of samples.
        ConfigurationError: `masks` does not fit `blocks`.
    """
    if not checked:
        check_samples(blocks, masks)
    # Blocks that are called again, as with shared weights, have no place in one order.
    everywhere = gradient_everywhere or any(block.num_calls > 1 for block in blocks)
    splits = _splits(sample_groups(masks, freezing=True, gradient_everywhere=everywhere), device)
    rules = [
        (block, _in_groups(block, split, {TRAINS: _plain, FROZEN: _frozen(block), RESTS: _resting(block)}))
        for block, split in zip(blocks, splits, strict=True)
    ]
    with _bound(rules):
        yield


def _bound(rules: list[tuple[ResidualBlock, Rule]]) -> contextlib.AbstractContextManager[None]:
    """The rules at forward: module hooks see the whole batch, and activation checkpointing runs the groups again."""
    compiled = next((block for block, _ in rules if block.module._compiled_call_impl is not None), None)
    if compiled is not None:
        raise ConfigurationError(
            f'Block {compiled.name} is compiled, and `drop_granularity="sample"` runs a block on parts of the batch, '
            "each in a way of its own, which its graphs do not hold. Set `torch_compile=False`, or "
            '`drop_granularity="batch"`.'
        )
    block, last = rules[-1]
    return bind_rules([*rules[:-1], (block, _with_graph(last))], "forward")


def _splits(groups: np.ndarray, device: torch.device) -> list[Split]:
    """One split a block; all indices go to the device at once."""
    by_block = np.ascontiguousarray(groups.T)
    sizes = np.stack([(by_block == group).sum(1) for group in (TRAINS, FROZEN, RESTS)], axis=1).tolist()
    order = np.argsort(by_block, axis=1, kind="stable")
    inverse = np.empty_like(order)
    np.put_along_axis(inverse, order, np.arange(order.shape[1])[None], axis=1)
    indices = torch.from_numpy(np.stack([order, inverse])).to(device, non_blocking=True)
    rows = indices[0].reshape(-1).split_with_sizes([size for of_block in sizes for size in of_block])
    rows = [rows[first : first + 3] for first in range(0, len(rows), 3)]
    return [Split(*parts) for parts in zip(sizes, rows, indices[1].unbind(), strict=True)]


def _in_groups(block: ResidualBlock, split: Split, actions: Mapping[int, Rule]) -> Rule:
    """What a block does when called: each group of samples by its own action."""
    present = [(group, size) for group, size in enumerate(split.sizes) if size]

    def rule(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        count = block.stream(args, kwargs).shape[0]
        if count != split.num_samples:
            raise StepError(
                f"Block {block.name} was called with {count} samples in a step that was planned for "
                f"{split.num_samples}. Pass the number of samples of the micro-batch as `batch_size`; where the model "
                'runs on another number, use `drop_granularity="batch"`.'
            )
        if len(present) == 1:
            return actions[present[0][0]](call, args, kwargs)
        if block.module.training and torch.is_grad_enabled():
            check_apart(block, call, args, kwargs)
        calls = take_apart(block.unbatched, args, kwargs, split)
        outputs = [actions[group](call, *calls[group]) for group, _ in present]
        return put_together(outputs, [size for _, size in present], split)

    return rule


def _plain(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return call(*args, **kwargs)


def _frozen(block: ResidualBlock) -> Rule:
    """Run the block with its parameters frozen; the gradient of its input goes on."""

    def rule(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        trained = [parameter for parameter in block.module.parameters() if parameter.requires_grad]
        with freeze(trained, []), copied_buffers(block.module):
            return call(*args, **kwargs)

    return rule


def _resting(block: ResidualBlock) -> Rule:
    """Run the block for samples that need no gradient of it or of anything before it."""

    def rule(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        with torch.no_grad(), copied_buffers(block.module):
            return call(*args, **kwargs)

    return rule


def _with_graph(rule: Rule) -> Rule:
    """The same with an output that backward can start from, where no sample of the batch trains anything."""

    def anchored(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        output = rule(call, args, kwargs)
        first = output if isinstance(output, torch.Tensor) else output[0]
        if not torch.is_grad_enabled() or first.requires_grad:
            return output
        first = first.detach().requires_grad_()
        return first if isinstance(output, torch.Tensor) else with_items(output, (first, *output[1:]))

    return anchored
