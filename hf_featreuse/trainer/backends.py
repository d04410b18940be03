"""Adapt distributed backends and compilation to training whose active blocks change from step to step.

These are functions of accelerate's and torch's own objects; `FeatureReuseTrainer` calls each from a hook of Trainer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend, TorchDynamoPlugin
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from hf_featreuse.distributed import (
    check_ddp_options,
    check_ranks_agree,
    find_lone_launch,
    reduce_active_gradients,
    tell_ranks_of_failure,
)
from hf_featreuse.errors import ConfigurationError
from hf_featreuse.method.class_swap import plain_class
from hf_featreuse.method.feature_reuse import FeatureReuse
from hf_featreuse.method.fsdp import sharded_modules, without_unknown_embeddings

logger = logging.get_logger(__name__)


def take_dynamo_plugin(accelerator_arguments: dict[str, Any]) -> TorchDynamoPlugin | None:
    """Remove the requested compilation from accelerate's arguments, because accelerate compiles the whole model.

    The returned plugin includes the options of `accelerate launch`; it is `None` if nothing is to be compiled.
    """
    plugin = accelerator_arguments["dynamo_plugin"]
    if plugin.backend == DynamoBackend.NO:
        return None
    accelerator_arguments["dynamo_plugin"] = TorchDynamoPlugin(backend=DynamoBackend.NO)
    return plugin


def search_unused_parameters(accelerator_arguments: dict[str, Any]) -> None:
    """Let DDP search for unused parameters with activation checkpointing too, where Trainer disables the search."""
    for handler in accelerator_arguments["kwargs_handlers"]:
        if isinstance(handler, DistributedDataParallelKwargs):
            handler.find_unused_parameters = True


def check_accelerator(accelerator: Accelerator, drop_granularity: str) -> None:
    """Raise `ConfigurationError` if options of DDP or FSDP2 do not allow steps with different active blocks."""
    options = accelerator.ddp_handler
    # MULTI_CPU, MULTI_GPU and the like; FSDP, DeepSpeed and others have other names.
    if accelerator.distributed_type.value.startswith("MULTI_") and options is not None:
        check_ddp_options(static_graph=options.static_graph, find_unused_parameters=options.find_unused_parameters)
    if accelerator.distributed_type.value == "FSDP" and drop_granularity == "sample":
        raise ConfigurationError(
            '`drop_granularity="sample"` does not work with FSDP2: a rank on which every sample drops a block would '
            "not take part in gathering its weights, and the others would wait for it. Set "
            '`drop_granularity="batch"`, or train with DistributedDataParallel.'
        )


def check_sharding(model: nn.Module | None, accelerator: Accelerator, fsdp_was_asked_for: bool) -> None:
    """Raise if a model is sharded before its blocks are found; warn if FSDP was requested but does not shard."""
    if model is not None and sharded_modules(model):
        raise ConfigurationError(
            f"This {type(model).__name__} is sharded already: it was loaded with a `distributed_config`, or "
            "`train()` ran before. Its blocks can only be found in whole weights. Load it without a "
            "`distributed_config`, create a new trainer for each `train()`, and pass "
            '`fsdp=True, fsdp_config={"version": 2}` to shard it.'
        )
    kind = accelerator.distributed_type.value
    if fsdp_was_asked_for and kind != "FSDP":
        logger.warning_once(
            f"FSDP was requested, but accelerate shards only on GPUs and similar devices, and uses {kind} here: every "
            "process holds the whole model."
        )


def bind_on_every_rank(bind: Callable[[], FeatureReuse], num_processes: int) -> FeatureReuse:
    """Bind blocks and schedule; stop on every rank if one of them fails or differs."""
    if (alone := find_lone_launch(os.environ, num_processes)) is not None:
        logger.warning_once(alone)
    try:
        reuse = bind()
    except Exception as error:
        tell_ranks_of_failure(error)
        raise
    check_ranks_agree(reuse)
    return reuse


@contextlib.contextmanager
def sharded_by_block(accelerator: Accelerator, model: nn.Module, reuse: FeatureReuse) -> Iterator[None]:
    """Let FSDP2 gather the weights of each block separately, so that those of skipped blocks are not gathered."""
    plugin: Any = accelerator.state.fsdp_plugin
    classes = sorted({plain_class(block.module).__name__ for block in reuse.blocks})
    with without_unknown_embeddings(model):
        if plugin is None or plugin.transformer_cls_names_to_wrap is not None or not classes:
            yield
            return
        # The model's own list may nest units, which is an error in accelerate 1.15 for ViT, or miss the blocks.
        plugin.transformer_cls_names_to_wrap = classes
        try:
            yield
        finally:  # The plugin outlives this trainer; the next one may have another model.
            plugin.transformer_cls_names_to_wrap = None


@contextlib.contextmanager
def whole_state_dict(accelerator: Accelerator) -> Iterator[None]:
    """Save a sharded model as a whole, whatever `state_dict_type` its checkpoints have."""
    plugin: Any = accelerator.state.fsdp_plugin
    kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = kind


def send_active_gradients(wrapped: nn.Module, reuse: FeatureReuse) -> None:
    """Let DDP send the gradients of only the parameters that train in a step."""
    if reuse.blocks and isinstance(wrapped, DistributedDataParallel) and not reduce_active_gradients(wrapped, reuse):
        logger.warning_once(
            "DistributedDataParallel already has a communication hook, which stays: all gradients are sent, not only "
            "those of the active blocks. Leave `comm_hook` unset to send less."
        )


def plain_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
