"""Arithmetic of each kind of step as a share of a vanilla step.

Counted once with torch's `FlopCounterMode`: matrix products, convolutions and attention of a forward and backward of
a batch of one. The cost for any set D is the sum of its parts:

- stochastic depth: a dropped block costs nothing, forward and backward.
- masked freeze: the whole forward pass; input gradients from the loss down to the lowest block that trains; weight
  gradients of the blocks that train.

Not counted are recomputation by activation checkpointing and the fused attention of the CPU, which torch's counter
does not support.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from transformers import Cache

from hf_featreuse.errors import BlockError
from hf_featreuse.method.blocks import ResidualBlock
from hf_featreuse.method.compiling import run_eagerly
from hf_featreuse.method.dummy_forward import model_inputs, undisturbed
from hf_featreuse.method.freezing import freeze, own_parameters, trunk_modules
from hf_featreuse.method.per_sample import FROZEN, RESTS, TRAINS, sample_groups
from hf_featreuse.method.schedule import StepKind, StepPlan, TrainTrunk, trunk_option


@dataclass(frozen=True)
class BlockCost:
    """Floating-point operations, forward and backward, of one residual block on the measured batch.

    Args:
        trained (`int`): if it trains and the gradient continues below it.
        lowest (`int`): if it trains and nothing below it does.
        frozen (`int`): if only the gradient of its input is needed.
        resting (`int`): if nothing in it or below it trains: only its forward.

    Example:
        >>> from hf_featreuse import BlockCost
        >>> BlockCost(trained=300, lowest=200, frozen=200, resting=100).resting
        100
    """

    trained: int
    lowest: int
    frozen: int
    resting: int


@dataclass(frozen=True)
class StepCosts:
    """Cost of the kinds of step of one model, from [`measure_step_costs`].

    Args:
        vanilla (`int`): floating-point operations of forward and backward of a plain step.
        blocks (`tuple[BlockCost, ...]`): of the residual blocks in forward order.
        trunk (`tuple[int, ...]`): forward operations of the parts of the trunk: before, between and after the blocks.
        trunk_trains (`tuple[bool, ...]`): whether each of these parts has parameters that train.
        train_trunk (`"all"`, `"head"` or `"none"`): which part of the trunk trains in masked-freeze steps.

    Example:
        >>> from hf_featreuse import BlockCost, StepCosts, StepKind, StepPlan
        >>> block = BlockCost(trained=300, lowest=200, frozen=200, resting=100)
        >>> costs = StepCosts(vanilla=600, blocks=(block, block), trunk=(0, 0, 0), trunk_trains=(True, True, True))
        >>> costs.share(StepPlan(StepKind.STOCHASTIC_DEPTH, (0,)))
        0.5
    """

    vanilla: int
    blocks: tuple[BlockCost, ...]
    trunk: tuple[int, ...]
    trunk_trains: tuple[bool, ...]
    train_trunk: TrainTrunk | bool = "none"

    def share(self, plan: StepPlan) -> float:
        """Return the arithmetic of a step as a share of a vanilla step, from 0 to 1.

        Args:
            plan (`StepPlan`): the plan of the step.

        Example:
            >>> from hf_featreuse import BlockCost, StepCosts, StepKind, StepPlan
            >>> block = BlockCost(trained=300, lowest=200, frozen=200, resting=100)
            >>> costs = StepCosts(vanilla=600, blocks=(block, block), trunk=(0, 0, 0), trunk_trains=(True, True, True))
            >>> costs.share(StepPlan(StepKind.MASKED_FREEZE, (1,)))
            0.5
        """
        frozen = plan.frozen_below
        if not self.vanilla or (plan.kind is StepKind.VANILLA and not frozen):
            return 1.0
        freezing = plan.kind is StepKind.MASKED_FREEZE
        trunk = trunk_option(self.train_trunk) if freezing else "all"
        if frozen:
            # Of the trunk, only what follows the last block trains.
            trunk = "head" if trunk == "all" else trunk
            return self._sum(self._of_unfreezing(plan), 1, trunk) / self.vanilla
        if (masks := plan.sample_masks) is None:
            samples, counts = 1, self._of_one_set(plan.dropped, freezing, trunk == "all")
        else:
            groups = sample_groups(masks, freezing=freezing, gradient_everywhere=trunk == "all")
            # A sample that drops a block in stochastic depth is not computed there.
            present = (TRAINS, FROZEN, RESTS) if freezing else (TRAINS, FROZEN)
            by_group = [(groups == group).sum(0) for group in present]
            by_group += [np.zeros_like(by_group[0])] * (3 - len(present))
            samples, counts = len(masks), np.stack(by_group, axis=1).tolist()
        total = self._sum(counts, samples, trunk) + (self._stem_rest * samples if trunk == "all" else 0)
        return total / (self.vanilla * samples)

    def _of_one_set(
        self, dropped: Sequence[int], freezing: bool, gradient_everywhere: bool
    ) -> list[tuple[int, int, int]]:
        """Return the same as `sample_groups` for one set, without arrays, because it runs in every step."""
        if not freezing:
            return [(int(index not in dropped), 0, 0) for index in range(len(self.blocks))]
        lowest = -1 if gradient_everywhere else min(dropped, default=len(self.blocks))
        return [
            (1, 0, 0) if index in dropped else (0, 1, 0) if index > lowest else (0, 0, 1)
            for index in range(len(self.blocks))
        ]

    def _of_unfreezing(self, plan: StepPlan) -> list[tuple[int, int, int]]:
        """Return the same for a step in which the lowest blocks are frozen."""
        if plan.kind is StepKind.MASKED_FREEZE:
            return self._of_one_set(plan.dropped, True, False)
        groups = self._of_one_set(plan.dropped, False, False)
        return [(0, 0, count[0]) if index < plan.frozen_below else count for index, count in enumerate(groups)]

    def _sum(self, groups: Sequence[Sequence[int]], samples: int, trunk: TrainTrunk) -> int:
        """Return the operations of a step, summed from the input up, without backward below the lowest trained part.

        Args:
            groups: for each block, how many samples train it, are frozen in it, and need only its forward.
            samples: samples in the batch.
            trunk: which part of the trunk trains.
        """
        count, gradient_goes_on = 0, False
        for index, forward in enumerate(self.trunk):
            is_trained_part = trunk == "all" or (trunk == "head" and index == len(self.blocks))
            trains = is_trained_part and self.trunk_trains[index]
            # For linear layers and convolutions, the gradients of input and weights each cost as much as the forward.
            # Between and after the blocks a norm comes first, whose weights need the gradient of the layer above it.
            count += samples * forward * (1 + (gradient_goes_on or (trains and index > 0)) + trains)
            gradient_goes_on |= trains
            if index == len(self.blocks):
                continue
            block, (training, frozen, resting) = self.blocks[index], groups[index]
            count += training * (block.trained if gradient_goes_on else block.lowest)
            count += frozen * (block.frozen if gradient_goes_on else block.resting) + resting * block.resting
            gradient_goes_on |= training > 0
        return count

    @property
    def sum_of_parts(self) -> int:
        """Cost of a plain step, summed over blocks and trunk."""
        return self._sum([(1, 0, 0)] * len(self.blocks), 1, "all")

    @cached_property
    def _stem_rest(self) -> int:
        """Cost of a plain step beyond the sum: gradients inside a first part of the trunk with several layers."""
        return self.vanilla - self.sum_of_parts if self.trunk_trains[0] else 0


def measure_step_costs(
    model: nn.Module,
    blocks: Sequence[ResidualBlock],
    inputs: Mapping[str, Any] | torch.Tensor | None = None,
    *,
    train_trunk: TrainTrunk | bool = "all",
) -> StepCosts:
    """Count the arithmetic of forward and backward of a small batch, block by block.

    This takes about one forward and backward of the batch, and four of each block that is not equal to an earlier one.
    The model, including gradients, is not changed; on the meta device a model is counted without any arithmetic.

    Args:
        model (`torch.nn.Module`): the model, not wrapped yet.
        blocks (`list[ResidualBlock]`): its blocks in forward order.
        inputs (`dict[str, torch.Tensor]` or `torch.Tensor`, *optional*): a small batch without labels; by default a
            batch of one is made from `model.config`.
        train_trunk (`"all"`, `"head"` or `"none"`, defaults to `"all"`): which part of the trunk trains in
            masked-freeze steps.

    Raises:
        BlockError: no batch can be made, or the model returns no output to run backward from.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import StepKind, StepPlan, find_residual_blocks, measure_step_costs
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
        >>> model = ViTForImageClassification(config)
        >>> costs = measure_step_costs(model, find_residual_blocks(model))
        >>> 0 < costs.share(StepPlan(StepKind.STOCHASTIC_DEPTH, (1,))) < costs.share(
        ...     StepPlan(StepKind.MASKED_FREEZE, (1,))) < 1
        True
    """
    args, kwargs = model_inputs(model, inputs)
    recorder = _Recorder(model, blocks)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with undisturbed(model), run_eagerly(model):
        handles = recorder.attach()
        try:
            with recorder.counter:
                output = model(*args, **kwargs)
                forward = recorder.counter.get_total_flops()
                torch.autograd.grad(scalar_of(output), trainable, allow_unused=True, retain_graph=True)
                total = recorder.counter.get_total_flops()
        finally:
            for handle in handles:
                handle.remove()
        costs = recorder.replay_all(model)
    trunk = (*recorder.before, forward - recorder.ended)
    return StepCosts(total, tuple(costs), trunk, tuple(recorder.trunk_trains), trunk_option(train_trunk))


def flop_counter() -> FlopCounterMode:
    """Create the counter of operations for all costs.

    It is torch's with one corrected formula: torch 2.13 counts the weight gradient of a grouped convolution as if it
    were dense, `groups` times too much. Each gradient of a convolution costs as much as its forward.

    Example:
        >>> import torch
        >>> from hf_featreuse.method.cost import flop_counter
        >>> with flop_counter() as counter:
        ...     _ = torch.nn.Conv2d(8, 8, 3, groups=8)(torch.zeros(1, 8, 3, 3))
        >>> counter.get_total_flops()
        144
    """
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _convolution_backward(
    grad_shape, x_shape, w_shape, _bias, _stride, _padding, _dilation, transposed, _out_padding, _groups, wanted, **_
) -> int:
    """Return the operations of the required gradients of a convolution's input and weight."""
    return conv_flop_count(x_shape, w_shape, grad_shape, transposed=transposed) * (wanted[0] + wanted[1])


class _Recorder:
    """Hooks that count the forward's operations per block and record each block's arguments."""

    def __init__(self, model: nn.Module, blocks: Sequence[ResidualBlock]) -> None:
        self.blocks = blocks
        trunk = itertools.chain(*trunk_modules(model, blocks))
        self.trunk = [module for module in trunk if any(p.requires_grad for p in own_parameters([module]))]
        self.trunk_trains = [False] * (len(blocks) + 1)
        self.next_block = 0
        self.counter = flop_counter()
        self.before = [0] * len(blocks)
        self.calls: list[list[tuple[tuple, dict[str, Any]]]] = [[] for _ in blocks]
        # Operations of each call in this forward, and the count at the end of the last call.
        self.counted: list[list[int]] = [[] for _ in blocks]
        self.ended = 0

    def attach(self) -> list[Any]:
        handles = []
        for index, block in enumerate(self.blocks):
            handles.append(block.module.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            handles.append(block.module.register_forward_hook(self._leave(index)))
        handles += [module.register_forward_pre_hook(self._enter_trunk) for module in self.trunk]
        return handles

    def _enter_trunk(self, _module: nn.Module, _args: tuple) -> None:
        self.trunk_trains[self.next_block] = True

    def _enter(self, index: int):
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            begun = self.counter.get_total_flops()
            self.before[index] += begun - self.ended
            self.counted[index].append(-begun)
            self.calls[index].append((args, kwargs))
            self.next_block = index + 1

        return hook

    def _leave(self, index: int):
        def hook(_module: nn.Module, _args: tuple, _output: Any) -> None:
            self.ended = self.counter.get_total_flops()
            self.counted[index][-1] += self.ended

        return hook

    def replay_all(self, model: nn.Module) -> list[BlockCost]:
        """Return the costs of all blocks; those of one class and shape with equal operations are run once."""
        known: dict[Any, list[int]] = {}
        by_module = self.counter.get_flop_counts()
        costs = []
        for block, calls, counted in zip(self.blocks, self.calls, self.counted, strict=True):
            totals = [0] * 4
            # Of forward and backward: blocks with weights of the same shapes may compute different functions.
            operations = str(by_module.get(f"{type(model).__name__}.{block.name}"))
            for (args, kwargs), forward in zip(calls, counted, strict=True):
                stream = block.stream(args, kwargs)
                shapes = [(tuple(p.shape), p.requires_grad) for p in block.module.parameters()]
                key = (type(block.module), tuple(stream.shape), str(shapes), forward, operations)
                if key not in known:
                    known[key] = [_count(replay(block, args, kwargs, *state)) for state in STATES]
                totals = [total + count for total, count in zip(totals, known[key], strict=True)]
            costs.append(BlockCost(*totals))
        return costs


# (the block trains, the gradient continues below it), in the order of BlockCost's fields.
STATES = ((True, True), (True, False), (False, True), (False, False))


def replay(
    block: ResidualBlock, args: tuple, kwargs: dict[str, Any], trains: bool, goes_on: bool
) -> Callable[[], None]:
    """Return a function that repeats forward and backward of one call of a block, with the recorded arguments.

    Attention kernels depend on what requires gradients, so each state is run.

    Args:
        block (`ResidualBlock`): the block.
        args (`tuple`): arguments of the call.
        kwargs (`dict[str, Any]`): keyword arguments of the call.
        trains (`bool`): whether the block trains.
        goes_on (`bool`): whether its input gets a gradient.
    """
    original = block.stream(args, kwargs)
    leaf = original.detach().requires_grad_(goes_on)
    weights = [parameter for parameter in block.module.parameters() if parameter.requires_grad]
    wanted = [leaf] * goes_on + weights * trains

    def run() -> None:
        # The counter's module tracker cannot take a leaf as a module's input.
        stream = leaf.clone()

        def replace(value: Any) -> Any:
            if isinstance(value, Cache):
                # It already has the keys and values of the forward, and each replay would extend it.
                return None
            return stream if value is original else value.detach() if isinstance(value, torch.Tensor) else value

        with freeze([] if trains else weights, []):
            output = block.module(*map(replace, args), **{key: replace(value) for key, value in kwargs.items()})
            if wanted:
                torch.autograd.grad(
                    scalar_of(output), wanted, allow_unused=True, retain_graph=_keeps_graph(block.module)
                )

    return run


def _keeps_graph(module: nn.Module) -> bool:
    """Whether the graph of a call can be needed again: models such as LeViT keep tensors of theirs between calls.

    Compiled code does not keep it, and torch 2.14 refuses to run backward as if it did.
    """
    return all(getattr(part, "_compiled_call_impl", None) is None for part in module.modules())


def _count(run: Callable[[], None]) -> int:
    """Return the operations of a function."""
    counter = flop_counter()
    with counter:
        run()
    return counter.get_total_flops()


def scalar_of(output: Any) -> torch.Tensor:
    """Return a scalar to run backward from: the sum of the first output that has a graph."""
    values = [output] if isinstance(output, torch.Tensor) else output
    values = values.values() if isinstance(values, Mapping) else values
    for value in values:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return value.sum()
    raise BlockError(
        "The model returned no tensor with gradients, so its backward cannot be counted. Unfreeze some parameters, or "
        "check the model's outputs."
    )
