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
from torch import nn
from transformers import Cache

from hf_featreuse.errors import BlockError, ConfigurationError, StepError
from hf_featreuse.method.blocks import ResidualBlock
from hf_featreuse.method.class_swap import Rule, bind_rules
from hf_featreuse.method.freezing import freeze
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
) -> Iterator[None]:
    """Compute each block only on the samples that keep it, in every forward and backward inside the context.

    Args:
        blocks (`list[ResidualBlock]`): L blocks in forward order.
        masks (`numpy.ndarray`): of shape (samples, L), `True` where a sample drops a block.
        device (`torch.device`): of the batch.
        survival (`list[float]`, *optional*): survival probability of each block, by which the increments of the
            samples that keep it are divided; by default they are not.

    Raises:
        StepError: when called, a batch has another number of samples.
        ConfigurationError: `survival` does not fit `blocks`, or what a block adds cannot be scaled.
    """
    scaling = Scaling(blocks, [1.0] * len(blocks) if survival is None else survival)
    splits = _splits(sample_groups(masks, freezing=False, gradient_everywhere=True), device)
    rules = [
        (block, _in_groups(block, split, {TRAINS: kept or _plain, RESTS: shortcut(block)}))
        for (block, kept), split in zip(scaling.rules, splits, strict=True)
    ]
    with scaling.branches(), _bound(rules):
        yield


@contextlib.contextmanager
def train_samples(
    blocks: Sequence[ResidualBlock], masks: np.ndarray, device: torch.device, *, gradient_everywhere: bool = False
) -> Iterator[None]:
    """Train each block only on the samples that dropped it, in every forward and backward inside the context.

    What lies outside the blocks is not touched; freeze it yourself.

    Args:
        blocks (`list[ResidualBlock]`): L blocks in forward order.
        masks (`numpy.ndarray`): of shape (samples, L), `True` where a sample dropped a block.
        device (`torch.device`): of the batch.
        gradient_everywhere (`bool`, defaults to `False`): give every sample its gradient down to the input, for a
            trunk that trains.

    Raises:
        StepError: when called, a batch has another number of samples.
    """
    # Blocks that are called again, as with shared weights, have no place in one order.
    everywhere = gradient_everywhere or any(block.num_calls > 1 for block in blocks)
    splits = _splits(sample_groups(masks, freezing=True, gradient_everywhere=everywhere), device)
    rules = [
        (block, _in_groups(block, split, {TRAINS: _plain, FROZEN: _frozen(block), RESTS: _resting}))
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


def check_per_sample(model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
    """Raise `BlockError` unless the samples of a batch can be computed apart."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise BlockError(
                f'`drop_granularity="sample"` cannot train {type(model).__name__}: `{name}` is a '
                f"{type(module).__name__}, which normalises over the batch, so what a sample gives would depend on "
                'which others are computed with it. Set `drop_granularity="batch"`.'
            )
    wrong = next((block for block in blocks if not block.has_batch_first), None)
    if wrong is not None:
        raise BlockError(
            f'`drop_granularity="sample"` cannot take apart the samples in block {wrong.name}: the first dimension of '
            'its residual stream is not the batch. Set `drop_granularity="batch"`, or leave it out with '
            "`target_blocks`."
        )


class _Split:
    """The samples of a batch in groups, for one block: how many, which rows, and where each row ends up."""

    def __init__(self, sizes: list[int], order: torch.Tensor, inverse: torch.Tensor) -> None:
        self.num_samples = sum(sizes)
        self.sizes = sizes
        self.rows = order.split(sizes)
        self.inverse = inverse


def _splits(groups: np.ndarray, device: torch.device) -> list[_Split]:
    """One split a block; all indices go to the device at once."""
    by_block = np.ascontiguousarray(groups.T)
    sizes = np.stack([(by_block == group).sum(1) for group in (TRAINS, FROZEN, RESTS)], axis=1).tolist()
    order = np.argsort(by_block, axis=1, kind="stable")
    inverse = np.empty_like(order)
    np.put_along_axis(inverse, order, np.arange(order.shape[1])[None], axis=1)
    indices = torch.from_numpy(np.stack([order, inverse])).to(device, non_blocking=True)
    return [_Split(*parts) for parts in zip(sizes, indices[0].unbind(), indices[1].unbind(), strict=True)]


def _in_groups(block: ResidualBlock, split: _Split, actions: Mapping[int, Rule]) -> Rule:
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
        calls = _take_apart(block, args, kwargs, split)
        outputs = [actions[group](call, *calls[group]) for group, _ in present]
        return _put_together(outputs, [size for _, size in present], split)

    return rule


def _take_apart(
    block: ResidualBlock, args: tuple, kwargs: Mapping[str, Any], split: _Split
) -> list[tuple[tuple, dict[str, Any]]]:
    """The arguments of a call for each group: tensors whose first dimension is the batch are split, others shared."""

    def walk(path: str, value: Any) -> list[Any]:
        if isinstance(value, torch.Tensor):
            batched = path not in block.unbatched and value.shape[:1] == (split.num_samples,)
            return [_select(value, rows) for rows in split.rows] if batched else [value] * 3
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            parts = [walk(f"{path}.{index}", item) for index, item in enumerate(value)]
            return [type(value)(part[group] for part in parts) for group in range(3)]
        if type(value) is dict:
            named = {key: walk(f"{path}.{key}", item) for key, item in value.items()}
            return [{key: part[group] for key, part in named.items()} for group in range(3)]
        # A cache of keys and values of the whole batch has no part for a group, and training no use for one.
        return [None if isinstance(value, Cache) else value] * 3

    positional = [walk(str(index), value) for index, value in enumerate(args)]
    by_name = {key: walk(key, value) for key, value in kwargs.items()}
    return [
        (tuple(part[group] for part in positional), {key: part[group] for key, part in by_name.items()})
        for group in range(3)
    ]


def _select(value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor in the memory format that it has: kernels differ by it, some in speed by several times."""
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return value.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return value.index_select(0, rows)


def _put_together(outputs: list[Any], sizes: list[int], split: _Split) -> Any:
    """One output for the batch, in its own order, from those of the groups."""
    if isinstance(outputs[0], torch.Tensor):
        return _select(torch.cat(outputs), split.inverse)
    merged: list[Any] = [_select(torch.cat([output[0] for output in outputs]), split.inverse)]
    for index in range(1, len(outputs[0])):
        values = [output[index] for output in outputs]
        example = next((value for value in values if value is not None), None)
        if isinstance(example, torch.Tensor) and all(
            value is None or value.shape[:1] == (size,) for value, size in zip(values, sizes, strict=True)
        ):
            # What a block did not compute for some samples, such as their attention weights, is zero for them.
            filled = [
                example.new_zeros(size, *example.shape[1:]) if value is None else value
                for value, size in zip(values, sizes, strict=True)
            ]
            merged.append(_select(torch.cat(filled), split.inverse))
        else:
            merged.append(example)
    return type(outputs[0])(merged)


def _plain(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return call(*args, **kwargs)


def _frozen(block: ResidualBlock) -> Rule:
    """Run the block with its parameters frozen; the gradient of its input goes on."""

    def rule(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        with freeze([parameter for parameter in block.module.parameters() if parameter.requires_grad], []):
            return call(*args, **kwargs)

    return rule


def _resting(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Run the block for samples that need no gradient of it or of anything before it."""
    with torch.no_grad():
        return call(*args, **kwargs)


def _with_graph(rule: Rule) -> Rule:
    """The same with an output that backward can start from, where no sample of the batch trains anything."""

    def anchored(call: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        output = rule(call, args, kwargs)
        first = output if isinstance(output, torch.Tensor) else output[0]
        if not torch.is_grad_enabled() or first.requires_grad:
            return output
        first = first.detach().requires_grad_()
        return first if isinstance(output, torch.Tensor) else type(output)((first, *output[1:]))

    return anchored
