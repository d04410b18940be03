"""Checks of a model, its blocks and a schedule by `FeatureReuse`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import nn
from transformers.utils import logging

from hf_featreuse.errors import BlockError, ConfigurationError
from hf_featreuse.method.blocks import ResidualBlock
from hf_featreuse.method.schedule import FeatureReuseSchedule

logger = logging.get_logger(__name__)


def check_checkpointing(model: nn.Module) -> None:
    """Raise `ConfigurationError` if the model uses reentrant activation checkpointing."""
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        # If it is missing or `None`, torch uses `True`.
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant") is not False:
            raise ConfigurationError(
                f"{name or type(model).__name__} uses reentrant activation checkpointing, which fails or loses "
                "gradients if the input of a checkpointed part is frozen. Set "
                '`activation_checkpointing_kwargs={"use_reentrant": False}`, called `gradient_checkpointing_kwargs` '
                "before transformers 5.23."
            )


def check_window(schedule: FeatureReuseSchedule) -> None:
    """Warn if the window is too short for one cycle, so that some kinds of step never take place."""
    if not schedule.alternates or schedule.last_step is None:
        return
    steps = max(schedule.last_step - schedule.first_step + 1, 0)
    if steps < schedule.steps_per_cycle:
        logger.warning(
            f"The window from `first_step={schedule.first_step}` to `last_step={schedule.last_step}` has {steps} "
            f"optimizer steps and holds no cycle of {schedule.steps_per_cycle}, so not all kinds of step take place. "
            "Widen the window, or shorten the cycle."
        )


def check_blocks(model: nn.Module, blocks: Sequence[ResidualBlock], schedule: FeatureReuseSchedule) -> None:
    """Raise `BlockError` unless the blocks are disjoint and trainable, and their number is that of the schedule."""
    if not blocks and schedule.alternates:
        raise BlockError(
            f"`blocks` is empty, but the schedule drops blocks, of which it expects {schedule.num_blocks}. Pass "
            "`trainable_blocks(model, find_residual_blocks(model))` and a schedule for their number, or train plainly "
            "with `FeatureReuseSchedule(0, drop_rate=0)`."
        )
    if len(blocks) != schedule.num_blocks:
        raise BlockError(
            f"The schedule is for {schedule.num_blocks} blocks, but {len(blocks)} were passed. Build it with "
            f"`FeatureReuseSchedule({len(blocks)}, ...)`."
        )
    modules = {id(module) for module in model.modules()}
    seen: dict[int, str] = {}
    for block in blocks:
        if id(block.module) not in modules:
            raise BlockError(
                f"Block {block.name} is not a part of this {type(model).__name__}: it was found in another model, or "
                "the model was replaced since. Call `find_residual_blocks` on the model that trains."
            )
        if not block.has_trainable_parameters and schedule.alternates:
            raise BlockError(
                f"Block {block.name} holds no parameter that requires gradients. Filter the blocks with "
                "`trainable_blocks(model, blocks)`."
            )
        for module in block.module.modules():
            if id(module) in seen:
                raise BlockError(
                    f"Blocks {seen[id(module)]} and {block.name} share modules. Pass each block once, and none "
                    "that contains another."
                )
            seen[id(module)] = block.name
