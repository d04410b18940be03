"""A Trainer over the engines that can run feature reuse: what is refused, what is set, and what ranks exchange."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend, TorchDynamoPlugin
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from hf_featreuse.config import FeatureReuseArguments
from hf_featreuse.distribution import (
    check_ddp_options,
    check_ranks_agree,
    find_lone_launch,
    reduce_active_gradients,
    tell_ranks_of_failure,
)
from hf_featreuse.engine import FeatureReuse
from hf_featreuse.exact_trainer import ExactTrainer
from hf_featreuse.refusals import check_engine, check_optimizer

logger = logging.get_logger(__name__)


class EngineTrainer(ExactTrainer):
    """`ExactTrainer` on one process or several, compiled block by block or not; base of [`FeatureReuseTrainer`].

    Plain training, with both step counts 0, is left as it is.

    Raises:
        ConfigurationError: an engine, an optimizer or an option of DDP cannot run feature reuse, or ranks disagree.
    """

    # How to compile the blocks; `None` where nothing is compiled, or the whole model in plain training.
    _dynamo_plugin: TorchDynamoPlugin | None = None

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
        if self.accelerator.num_processes == 1:
            return bind()
        try:
            reuse = bind()
        except Exception as error:
            tell_ranks_of_failure(error)
            raise
        check_ranks_agree(reuse)
        return reuse

    def _send_active_gradients(self, reuse: FeatureReuse) -> None:
        """Let DDP send the gradients of what trains in a step alone."""
        wrapped = self.model_wrapped
        if reuse.blocks and isinstance(wrapped, DistributedDataParallel):
            if not reduce_active_gradients(wrapped, reuse):
                logger.warning_once(
                    "DistributedDataParallel has a communication hook already, which stays: all gradients travel, "
                    "not those of the active blocks alone. Leave `comm_hook` unset for that."
                )
