"""Measure the time of a plain step and of each block, and predict the time of every kind of step.

`measure_step_costs` counts operations. On a GPU the time per operation differs between kernels, so the share of the
arithmetic is not the share of the time. Here each block is timed in each state that it can have in a step.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import nn

from hf_featreuse.method.blocks import ResidualBlock
from hf_featreuse.method.compiling import run_eagerly
from hf_featreuse.method.cost import (
    STATES,
    BlockCost,
    StepCosts,
    measure_step_costs,
    replay,
    scalar_of,
)
from hf_featreuse.method.dummy_forward import model_inputs, undisturbed
from hf_featreuse.method.frozen_buffers import copied_buffers
from hf_featreuse.method.schedule import TrainTrunk
from hf_featreuse.method.skipping import skip_blocks

_NANOSECONDS = 1e9
_MOST_WARM_UPS = 8
_NOTHING = BlockCost(0, 0, 0, 0)
# The share of a plain step that the trunk takes at most: on a busy machine, noise could leave nothing for the blocks.
_MOST_OF_TRUNK = 0.9
# Two runs in a row that differ by less are stable.
_STABLE = 0.1
# Runs that a device gets at once, as in training, where nobody waits for a single block.
_QUEUED = 4


def measure_step_times(
    model: nn.Module,
    blocks: Sequence[ResidualBlock],
    inputs: Mapping[str, Any],
    *,
    train_trunk: TrainTrunk | bool = "all",
    autocast: torch.dtype | None = None,
    repeats: int = 5,
) -> StepCosts:
    """Time the forward and backward of the model, of its trunk and of each block, without an optimizer step.

    The model is timed in training mode on its device; afterwards modes, buffers, gradients and torch's random state
    are restored. Each time is the median of several runs after a warm-up. Blocks of one class with the same operations
    are timed once; compiled blocks are timed compiled. The times of blocks are scaled so that blocks and trunk add up
    to the plain step. On a GPU several runs are queued at once; the times include waits of the device for the host.

    Args:
        model (`torch.nn.Module`): the model, not wrapped yet.
        blocks (`list[ResidualBlock]`): its blocks in forward order.
        inputs (`dict[str, torch.Tensor]`): a batch of the size used in training, on the model's device, with or
            without `labels`.
        train_trunk (`"all"`, `"head"` or `"none"`, defaults to `"all"`): which part of the trunk trains in
            masked-freeze steps.
        autocast (`torch.dtype`, *optional*): dtype of mixed precision, such as `torch.bfloat16`; by default none.
        repeats (`int`, defaults to 5): measured runs of each.

    Returns:
        `StepCosts`: in nanoseconds instead of operations. `share(plan)` is the expected time of a step as a share of
            that of a plain step.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import StepKind, StepPlan, find_residual_blocks
        >>> from hf_featreuse.method.step_times import measure_step_times
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
        >>> model = ViTForImageClassification(config)
        >>> batch = {"pixel_values": torch.randn(2, 3, 224, 224), "labels": torch.tensor([0, 1])}
        >>> times = measure_step_times(model, find_residual_blocks(model), batch, repeats=1)
        >>> 0 < times.share(StepPlan(StepKind.STOCHASTIC_DEPTH, (0,))) < 1
        True
    """
    device = next(model.parameters()).device
    stopwatch = _Stopwatch(device, repeats)
    without_labels = {name: value for name, value in inputs.items() if name != "labels"}
    few = {name: value[:1] if torch.is_tensor(value) else value for name, value in without_labels.items()}
    counted = measure_step_costs(model, blocks, few, train_trunk=train_trunk)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    args, kwargs = model_inputs(model, without_labels)

    def step() -> None:
        output = model(**inputs) if "labels" in inputs else model(*args, **kwargs)
        torch.autograd.grad(scalar_of(output), trainable, allow_unused=True)

    def forward() -> None:
        with torch.no_grad():
            model(*args, **kwargs)

    precision = contextlib.nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    # Buffers are copied, because kernels change running statistics.
    with undisturbed(model), copied_buffers(model), precision:
        model.train()
        with run_eagerly(model), _recorded_calls(blocks) as calls, torch.no_grad():
            model(*args, **kwargs)
        plain = stopwatch.time(step)
        with skip_blocks(blocks, allow_inexact=True):
            rest = stopwatch.time(step if any(counted.trunk_trains) else forward)
        known: dict[Any, BlockCost] = {}
        costs = []
        for block, operations, block_calls in zip(blocks, counted.blocks, calls, strict=True):
            key = type(block.module), operations, len(block_calls)
            if key not in known:
                totals = (
                    sum(stopwatch.time(replay(block, *call, *state)) for call in block_calls) for state in STATES
                )
                known[key] = BlockCost(*totals)
            costs.append(known[key])
    rest = min(rest, _MOST_OF_TRUNK * plain)
    operations = replace(counted, blocks=(_NOTHING,) * len(blocks)).sum_of_parts or 1
    trunk = tuple(round(part * rest / operations) for part in counted.trunk)
    # Blocks take longer one by one than inside of a step, where nobody waits for them.
    alone = replace(counted, blocks=tuple(costs), trunk=(0,) * len(trunk)).sum_of_parts
    inside = (_scaled(cost, (plain - rest) / alone) for cost in costs)
    return replace(counted, vanilla=plain, blocks=tuple(inside), trunk=trunk)


def _scaled(cost: BlockCost, factor: float) -> BlockCost:
    return BlockCost(*(round(value * factor) for value in astuple(cost)))


@contextlib.contextmanager
def _recorded_calls(blocks: Sequence[ResidualBlock]) -> Iterator[list[list[tuple[tuple, dict[str, Any]]]]]:
    """Record the arguments of each block's calls in forward passes inside the context."""
    calls: list[list[tuple[tuple, dict[str, Any]]]] = [[] for _ in blocks]
    handles = [
        block.module.register_forward_pre_hook(
            lambda _module, args, kwargs, into=into: into.append((args, kwargs)), with_kwargs=True
        )
        for block, into in zip(blocks, calls, strict=True)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class _Stopwatch:
    """Times a function on a device, in nanoseconds."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def time(self, function: Callable[[], Any]) -> int:
        """Return the median of several runs, after a warm-up until two in a row take about as long."""
        last = self._once(function)
        for _ in range(_MOST_WARM_UPS):
            before, last = last, self._once(function)
            if abs(last - before) < _STABLE * before:
                break
        return round(statistics.median(self._once(function) for _ in range(self.repeats)) * _NANOSECONDS)

    def _once(self, function: Callable[[], Any]) -> float:
        runs = 1 if self.device.type == "cpu" else _QUEUED
        self._wait()
        started = time.perf_counter()
        for _ in range(runs):
            function()
        self._wait()
        return (time.perf_counter() - started) / runs

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
