"""A Trainer over the engines that can run feature reuse: what is refused, what is set, and what ranks exchange."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend, TorchDynamoPlugin
from torch.distributed.fsdp import StateDictType
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_featreuse.binding import plain_class
from hf_featreuse.config import FeatureReuseArguments
from hf_featreuse.distribution import (
    check_ddp_options,
    check_ranks_agree,
    find_lone_launch,
    reduce_active_gradients,
    tell_ranks_of_failure,
)
from hf_featreuse.engine import FeatureReuse
from hf_featreuse.errors import ConfigurationError
from hf_featreuse.exact_trainer import ExactTrainer
from hf_featreuse.refusals import check_engine, check_optimizer, fsdp_version
from hf_featreuse.sharding import complete_state, forget_state, sharded_modules, without_unknown_embeddings

logger = logging.get_logger(__name__)


class EngineTrainer(ExactTrainer):
    """`ExactTrainer` on one process or several, compiled block by block or not; base of [`FeatureReuseTrainer`].

    Plain training, with both step counts 0, is left as it is.

    Raises:
        ConfigurationError: an engine, an optimizer or an option of DDP cannot run feature reuse, or ranks disagree.
    """

    # How to compile the blocks; `None` where nothing is compiled, or the whole model in plain training.
    _dynamo_plugin: TorchDynamoPlugin | None = None
    # Parameters whose optimizer state in the last checkpoint is none of theirs.
    _without_state: Sequence[str] = ()
    # Units of FSDP2: the classes of the blocks that were found.
    _block_classes: Sequence[str] = ()

    @property
    def reuse_args(self) -> FeatureReuseArguments:
        """The options of feature reuse: those of `args`, or the defaults where it is a plain `TrainingArguments`."""
        return self.args if isinstance(self.args, FeatureReuseArguments) else FeatureReuseArguments()

    def create_accelerator_and_postprocess(self) -> None:
        """Refuse what cannot run feature reuse before there is an accelerator, then make it."""
        if self.reuse_args.alternates:
            check_engine(self.args, self.model)
        super().create_accelerator_and_postprocess()
        options = self.accelerator.ddp_handler
        if self.reuse_args.alternates and self._wraps_in_ddp and options is not None:
            check_ddp_options(static_graph=options.static_graph, find_unused_parameters=options.find_unused_parameters)
        if self.reuse_args.alternates and self.is_fsdp_enabled and self.reuse_args.drop_granularity == "sample":
            raise ConfigurationError(
                '`drop_granularity="sample"` does not go with FSDP2: a rank on which every sample drops a block would '
                "not take part in gathering its weights, and the others would wait for it. Set "
                '`drop_granularity="batch"`, or train with DistributedDataParallel.'
            )

    def _validate_args(self) -> None:
        # The optimizers passed are known only here.
        if self.reuse_args.alternates:
            check_optimizer(self.optimizer)
            check_optimizer((self.optimizer_cls_and_kwargs or (None,))[0])
        super()._validate_args()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # The plugin holds what `accelerate launch` was told, too. Left to accelerate, it compiles the whole model.
        arguments = super()._build_accelerator_args(**kwargs)
        plugin = arguments["dynamo_plugin"]
        self._dynamo_plugin = plugin if self.reuse_args.alternates and plugin.backend != DynamoBackend.NO else None
        if self._dynamo_plugin is not None:
            arguments["dynamo_plugin"] = TorchDynamoPlugin(backend=DynamoBackend.NO)
        if self.reuse_args.alternates and self.args.ddp_find_unused_parameters is None:
            # With activation checkpointing Trainer leaves the search out; it is needed, and goes with the kind of
            # checkpointing that feature reuse allows.
            for handler in arguments["kwargs_handlers"]:
                if isinstance(handler, DistributedDataParallelKwargs):
                    handler.find_unused_parameters = True
        return arguments

    @property
    def _wraps_in_ddp(self) -> bool:
        # MULTI_CPU, MULTI_GPU and their like; FSDP, DeepSpeed and others go by other names.
        return self.accelerator.distributed_type.value.startswith("MULTI_")

    def _bind_on_every_rank(self, bind: Callable[[], FeatureReuse]) -> FeatureReuse:
        """Bind blocks and schedule; stop on every rank if one fails to or has others."""
        if (alone := find_lone_launch(os.environ, self.accelerator.num_processes)) is not None:
            logger.warning_once(alone)
        if self.reuse_args.alternates:
            self._check_sharding()
        try:
            reuse = bind()
        except Exception as error:
            tell_ranks_of_failure(error)
            raise
        check_ranks_agree(reuse)
        self._block_classes = sorted({plain_class(block.module).__name__ for block in reuse.blocks})
        return reuse

    def _check_sharding(self) -> None:
        """Refuse a model that is sharded before its blocks are found; say if sharding was asked for in vain."""
        if self.model is not None and sharded_modules(self.model):
            raise ConfigurationError(
                f"This {type(self.model).__name__} is sharded already: it was loaded with a `distributed_config`, or "
                "`train()` ran before. Its blocks are found in whole weights. Load it without, make a new trainer for "
                'each `train()`, and pass `fsdp=True, fsdp_config={"version": 2}` to shard it.'
            )
        if fsdp_version(self.args) is not None and not self.is_fsdp_enabled:
            logger.warning_once(
                "FSDP was asked for, but accelerate shards on GPUs and their like only, and uses "
                f"{self.accelerator.distributed_type.value} here: every process holds the whole model."
            )

    @contextlib.contextmanager
    def _sharded_by_block(self) -> Iterator[None]:
        """Let FSDP2 gather the weights of each block alone, so that those of skipped blocks stay where they are."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin is None or plugin.transformer_cls_names_to_wrap is not None or not self._block_classes:
            yield
            return
        # The model's own list may nest units, at which accelerate 1.15 stops for ViT, or miss the blocks.
        plugin.transformer_cls_names_to_wrap = list(self._block_classes)
        try:
            yield
        finally:  # The plugin outlives this trainer; the next one may have another model.
            plugin.transformer_cls_names_to_wrap = None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_fsdp_enabled or self.model is None:
            return super()._prepare_for_training(*args, **kwargs)
        with without_unknown_embeddings(self.model), self._sharded_by_block():
            return super()._prepare_for_training(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.model is not None and self.optimizer is not None
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        with complete_state(self.model, self._plain_optimizer) as self._without_state:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_fsdp_enabled and self._resumed is not None:
            assert self.model is not None
            forget_state(self.model, self._plain_optimizer, self._resumed.get("without_state", []))

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside accelerate's."""
        return getattr(self.optimizer, "optimizer", self.optimizer)  # pyright: ignore[reportReturnType]

    def _resume_state(self) -> dict[str, Any]:
        return {**super()._resume_state(), "without_state": self._without_state}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does; a sharded model in whole, whatever `state_dict_type` checkpoints have."""
        folder = str(output_dir or self.args.output_dir)
        is_checkpoint = _internal_call and os.path.basename(folder).startswith(PREFIX_CHECKPOINT_DIR)
        if not self.is_fsdp_enabled or is_checkpoint:
            return super().save_model(output_dir, _internal_call)
        plugin: Any = self.accelerator.state.fsdp_plugin
        kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.state_dict_type = kind

    def _send_active_gradients(self, reuse: FeatureReuse) -> None:
        """Let DDP send the gradients of what trains in a step alone."""
        wrapped = self.model_wrapped
        if reuse.blocks and isinstance(wrapped, DistributedDataParallel):
            if not reduce_active_gradients(wrapped, reuse):
                logger.warning_once(
                    "DistributedDataParallel has a communication hook already, which stays: all gradients travel, "
                    "not those of the active blocks alone. Leave `comm_hook` unset for that."
                )
