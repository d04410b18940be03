"""The method for one optimizer step at a time, with or without a Trainer."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers.utils import logging

from hf_featreuse.errors import ConfigurationError, StepError
from hf_featreuse.method.batch_norm import count_batches_once, norm_layers
from hf_featreuse.method.binding_checks import check_blocks, check_checkpointing, check_window
from hf_featreuse.method.blocks import ResidualBlock, check_exact, check_outputs, check_scalable
from hf_featreuse.method.freezing import FrozenBatchNorm, changing_layers, freeze, own_parameters, trunk_modules
from hf_featreuse.method.frozen_buffers import FrozenBuffers
from hf_featreuse.method.fsdp import ready_shards, sharded_modules
from hf_featreuse.method.late_backward import backward_inside
from hf_featreuse.method.per_sample import skip_samples, train_samples
from hf_featreuse.method.samples_apart import check_per_sample
from hf_featreuse.method.schedule import (
    VANILLA_PLAN,
    FeatureReuseSchedule,
    StepKind,
    StepPlan,
    TrainTrunk,
    trunk_option,
)
from hf_featreuse.method.skipping import skip_blocks

logger = logging.get_logger(__name__)


class FeatureReuse:
    """Run each optimizer step of a training loop according to a schedule.

    Args:
        model (`torch.nn.Module`): the model that trains. It may be wrapped later, but not replaced.
        blocks (`list[ResidualBlock]`): b0..b(L-1), as from `trainable_blocks(model, find_residual_blocks(model))`.
            `plan.dropped` indexes this list; every other part of the model is the trunk.
        schedule (`FeatureReuseSchedule`): for L blocks.
        scale_kept (`bool`, defaults to `True`): in stochastic-depth steps, divide the residual increment of each kept
            block by its survival probability, `plan.survival`.
        train_trunk (`"all"`, `"head"` or `"none"`, defaults to `"all"`): which part of the trunk trains in
            masked-freeze steps: all, only what follows the last block, or none. `True` means `"all"`, `False` means
            `"none"`.
        frozen_batch_norm (`"batch"` or `"inference"`, defaults to `"batch"`): statistics with which frozen BatchNorm
            layers normalize in masked-freeze steps; their running statistics do not change either way. Other buffers
            of frozen modules, such as those of InstanceNorm and spectral norm, are restored at the end of the step.
        allow_inexact_skip (`bool`, defaults to `False`): also accept blocks whose shortcut is not a bitwise identity.

    Attributes:
        current_plan (`StepPlan`, *optional*): the plan of the current step.
        trunk_trains (`bool`): whether any parameter outside the blocks requires gradients now; inside a step, when it
            was entered.

    Raises:
        BlockError: a block is not part of the model, inexact, inside another, or holds nothing that trains; the
            schedule is for another number of blocks; or it draws a set for every sample and the model has BatchNorm.
        ConfigurationError: `scale_kept` with a block that cannot be scaled, an unknown `train_trunk`, or reentrant
            activation checkpointing.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import FeatureReuse, FeatureReuseSchedule, find_residual_blocks
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=8, patch_size=4)
        >>> model = ViTForImageClassification(config)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> blocks = find_residual_blocks(model)
        >>> reuse = FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks), drop_rate=0.5, seed=0))
        >>> for step in range(4):
        ...     with reuse.step(step) as plan:
        ...         model(torch.ones(2, 3, 8, 8), labels=torch.tensor([0, 1])).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad(set_to_none=True)
        ...     print(plan.kind.value)
        stochastic_depth
        stochastic_depth
        stochastic_depth
        masked_freeze
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[ResidualBlock],
        schedule: FeatureReuseSchedule,
        *,
        scale_kept: bool = True,
        train_trunk: TrainTrunk | bool = "all",
        frozen_batch_norm: FrozenBatchNorm = "batch",
        allow_inexact_skip: bool = False,
    ) -> None:
        check_blocks(model, blocks, schedule)
        check_window(schedule)
        if schedule.alternates or schedule.unfreezes:
            check_checkpointing(model)
        if schedule.alternates:
            check_outputs(blocks)
            if not allow_inexact_skip:
                check_exact(blocks)
            if scale_kept:
                check_scalable(blocks)
            if schedule.drop_granularity == "sample":
                check_per_sample(model, blocks)
        self.model = model
        self.blocks = list(blocks)
        self.schedule = schedule
        self.scale_kept = scale_kept
        self.train_trunk: TrainTrunk = trunk_option(train_trunk)
        self.frozen_batch_norm: FrozenBatchNorm = frozen_batch_norm
        self.allow_inexact_skip = allow_inexact_skip
        self.current_plan: StepPlan | None = None
        self._warned = False
        # The last finished step, and the versions of one weight of each part at its end.
        self._left: tuple[int, list[int]] | None = None
        self._read_parameters()

    def _read_parameters(self) -> None:
        """Walk the modules once, so that a step costs only a few attribute writes per parameter."""
        parts = [list(block.module.modules()) for block in self.blocks]
        parts += trunk_modules(self.model, self.blocks)
        self._sharded = sharded_modules(self.model)
        self._parameters = [list(own_parameters(part)) for part in parts]
        self._changing = [changing_layers(part) for part in parts]
        self._norms = [norm for part in parts for norm in norm_layers(part)]
        self._buffers = FrozenBuffers(parts)
        self._trunk = [parameter for part in self._parameters[len(self.blocks) :] for parameter in part]
        self._trainable = {id(p) for part in self._parameters for p in part if p.requires_grad}
        counted = Counter(id(p) for part in self._parameters for p in set(part))
        self._has_shared = max(counted.values(), default=1) > 1
        held = ((module, name, p) for part in parts for module in part for name, p in module._parameters.items())
        self._witness = next(((module, name, p) for module, name, p in held if p is not None), None)

    @property
    def _is_distributed(self) -> bool:
        distributed = torch.distributed
        return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

    @property
    def trunk_trains(self) -> bool:
        # Inside a masked-freeze step the trunk may be frozen for only this step.
        if self.current_plan is None:
            self._trunk_trains = any(parameter.requires_grad for parameter in self._trunk)
        return self._trunk_trains

    @property
    def _head_trains(self) -> bool:
        """Whether any parameter after the last block requires gradients outside of steps."""
        return any(id(parameter) in self._trainable for parameter in self._parameters[-1])

    def plan(self, global_step: int, *, batch_size: int | None = None, position: int = 0) -> StepPlan:
        """Return the plan of an optimizer step: the schedule's, unless it would leave nothing to train.

        If the user froze the whole trunk, as with adapters only in the blocks, a cycle that drops every block is
        vanilla, and the survival probabilities are those given that some block is kept. If what follows the last block
        is frozen, gradual unfreezing begins with that block. Takes the arguments of
        [`FeatureReuseSchedule.plan`].
        """
        # Custom schedules that draw per batch need no arguments for samples.
        samples = {} if self.schedule.drop_granularity == "batch" else {"batch_size": batch_size, "position": position}
        plan = self.schedule.plan(global_step, **samples)
        if plan.frozen_below and not self._head_trains:
            plan = self._with_a_block(plan)
        if self.trunk_trains or not self.blocks or plan.sample_masks is not None:
            return plan
        if len(plan.dropped) == len(self.blocks):
            return replace(VANILLA_PLAN, frozen_below=plan.frozen_below)
        if plan.survival is None:
            return plan
        some_kept = 1 - math.prod(1 - probability for probability in plan.survival)
        return replace(plan, survival=tuple(min(probability / some_kept, 1.0) for probability in plan.survival))

    def _with_a_block(self, plan: StepPlan) -> StepPlan:
        """Train the last block from the start if nothing after it trains, and never drop all blocks that train."""
        frozen = min(plan.frozen_below, len(self.blocks) - 1)
        trains = set(range(frozen, len(self.blocks)))
        if plan.kind is StepKind.STOCHASTIC_DEPTH and trains <= set(plan.dropped):
            return StepPlan(StepKind.VANILLA, frozen_below=frozen)
        return replace(plan, frozen_below=frozen)

    @contextlib.contextmanager
    def step(self, global_step: int, *, batch_size: int | None = None, position: int = 0) -> Iterator[StepPlan]:
        """Wrap forward and backward of one optimizer step, every micro-batch of it in turn.

        The optimizer step may follow inside or outside. Before the next step, call
        `optimizer.zero_grad(set_to_none=True)`.

        Args:
            global_step (`int`): number of optimizer steps taken before this one.
            batch_size (`int`, *optional*): samples in this micro-batch; needed, and used, with
                `drop_granularity="sample"`.
            position (`int`, defaults to 0): of the first of them in the global batch of the optimizer step: on W
                ranks, whose full micro-batches have B samples, `(micro_batch * W + rank) * B`, also for a smaller
                last one.

        Yields:
            `StepPlan`: the kind of step and the set D.

        Raises:
            StepError: another step is open, or a parameter that must not move in this step still holds a gradient; or,
                in backward, the step was left already.
            ConfigurationError: `batch_size` is needed and missing.
        """
        if self.current_plan is not None:
            raise StepError(
                f"`step({global_step})` was entered inside another step ({self.current_plan.kind.value}). Leave the "
                "first one before entering the next; micro-batches of one optimizer step enter it in turn."
            )
        plan = self.plan(global_step, batch_size=batch_size, position=position)
        self._follow_shards()
        with contextlib.ExitStack() as stack:
            if self._norms:
                stack.enter_context(count_batches_once(self._norms))
            for context in self._contexts(plan, global_step):
                stack.enter_context(context)
            self.current_plan = plan
            try:
                yield plan
            finally:
                self.current_plan = None
                self._left = global_step, self._versions()

    def _follow_shards(self) -> None:
        """Read the parameters again if sharding the model has replaced them."""
        ready_shards(self._sharded)
        if self._witness is not None:
            module, name, parameter = self._witness
            if module._parameters.get(name) is not parameter:
                self._read_parameters()
                ready_shards(self._sharded)

    def _versions(self) -> list[int]:
        """Return a version number of one weight of each part, which an optimizer step changes."""
        return [parameters[-1]._version for parameters in self._parameters if parameters]

    def _contexts(self, plan: StepPlan, global_step: int) -> Iterator[contextlib.AbstractContextManager[None]]:
        """Yield the contexts that are open during a step."""
        if plan.sample_masks is not None and self._is_distributed:
            self._check_some_sample_trains(plan, global_step)
        if plan.kind is not StepKind.VANILLA or plan.frozen_below:
            yield backward_inside(self.model, f"step({global_step})")
        if plan.kind is StepKind.STOCHASTIC_DEPTH:
            held = [p for index in plan.dropped for p in self._parameters[index] if p.grad is not None]
            if held:
                # A parameter shared with a part that trains may hold the gradient of an earlier micro-batch.
                active = {id(p) for index in self._active_parts(plan) for p in self._parameters[index]}
                self._check_gradients(plan, global_step, [p for p in held if id(p) not in active])
            yield self._skip(plan)
        if plan.kind is StepKind.MASKED_FREEZE or plan.frozen_below:
            # If every sample has its own set, any block may train, and is frozen sample by sample.
            kept = self._active_parts(plan)
            if plan.kind is StepKind.STOCHASTIC_DEPTH:
                kept |= set(plan.dropped)  # which are not computed
            frozen = [index for index in range(len(self._parameters)) if index not in kept]
            parameters = self._frozen_parameters(frozen)
            self._check_gradients(plan, global_step, parameters)
            yield self._buffers.kept(frozen)
            layers = [layer for index in frozen for layer in self._changing[index]]
            yield freeze(parameters, layers, self.frozen_batch_norm)
            if plan.kind is StepKind.MASKED_FREEZE and plan.sample_masks is not None:
                everywhere, device = self.train_trunk == "all", self._parameters[0][0].device
                yield train_samples(
                    self.blocks, plan.sample_masks, device, gradient_everywhere=everywhere, checked=True
                )

    def _check_some_sample_trains(self, plan: StepPlan, global_step: int) -> None:
        """Raise `StepError` if nothing in this process gets a gradient; the other processes would wait for it."""
        assert plan.sample_masks is not None
        body = len(self.blocks)
        trunk = [p for index in self._active_parts(plan) if index >= body for p in self._parameters[index]]
        trains = plan.sample_masks if plan.kind is StepKind.MASKED_FREEZE else ~plan.sample_masks
        if not trains.any() and not any(parameter.requires_grad for parameter in trunk):
            raise StepError(
                f"No sample of this process trains a block in step {global_step}, and the trunk does not train, so "
                "the other processes would wait for its gradients. Use a multiple of 16 samples per micro-batch, of "
                'which some always train, set `train_trunk="head"` or `"all"`, or set `drop_granularity="batch"`.'
            )

    def _skip(self, plan: StepPlan) -> contextlib.AbstractContextManager[None]:
        survival = plan.survival if self.scale_kept else None
        if self.scale_kept and survival is None:
            self._warn_unscaled()
        if survival is not None and len(survival) != len(self.blocks):
            raise ConfigurationError(
                f"`survival` of the step's plan has {len(survival)} entries for {len(self.blocks)} blocks. Pass one "
                "probability for each, including dropped blocks."
            )
        if plan.sample_masks is not None:
            device = self._parameters[0][0].device
            return skip_samples(self.blocks, plan.sample_masks, device, survival=survival, checked=True)
        dropped = [self.blocks[index] for index in plan.dropped]
        kept = [] if survival is None else [i for i in range(len(self.blocks)) if i not in plan.dropped]
        return skip_blocks(
            dropped,
            kept=[self.blocks[index] for index in kept],
            survival=[survival[index] for index in kept] if survival else None,
            allow_inexact=self.allow_inexact_skip,
        )

    def _warn_unscaled(self) -> None:
        """Warn once that the plans of a schedule have no survival probabilities."""
        if not self._warned:
            self._warned = True
            logger.warning(
                f"The plans of {type(self.schedule).__name__} have no `survival`, so stochastic-depth steps do not "
                "scale the blocks that they keep, and the whole network differs from those that train. Add the "
                "survival probability of every block to each plan, or set `scale_kept=False`."
            )

    def active_parameters(self, plan: StepPlan) -> list[nn.Parameter]:
        """Return the parameters that a step may change: those of the parts that are computed and train.

        They are known before the forward pass, and the same on every rank with the same plan. If every sample has its
        own set, a block may train on any sample, so all blocks are active.

        Args:
            plan (`StepPlan`): of the step, as [`step`] yields it.
        """
        active = {id(p): p for index in self._active_parts(plan) for p in self._parameters[index]}
        return [parameter for parameter in active.values() if id(parameter) in self._trainable]

    def _active_parts(self, plan: StepPlan) -> set[int]:
        """Return the indices of the parts that are computed and train: blocks, then trunk up to the head, and head."""
        body = len(self.blocks)
        everything, dropped = set(range(body + 2)), set(plan.dropped)
        frozen = {body, *range(plan.frozen_below)} if plan.frozen_below else set()
        if plan.kind is not StepKind.MASKED_FREEZE:
            return everything - dropped - frozen
        blocks = everything - {body, body + 1} if plan.sample_masks is not None else dropped
        return (blocks | {"all": {body, body + 1}, "head": {body + 1}, "none": set()}[self.train_trunk]) - frozen

    def _frozen_parameters(self, frozen: list[int]) -> list[nn.Parameter]:
        """Return the parameters to freeze: those of the frozen parts that no other part shares."""
        parameters = [p for index in frozen for p in self._parameters[index] if p.requires_grad]
        if not self._has_shared:
            return parameters
        # A parameter that is shared with a training part trains.
        active = {id(p) for index, part in enumerate(self._parameters) if index not in frozen for p in part}
        return [parameter for parameter in parameters if id(parameter) not in active]

    def _check_gradients(self, plan: StepPlan, global_step: int, inactive: list[nn.Parameter]) -> None:
        stale = next((parameter for parameter in inactive if parameter.grad is not None), None)
        if stale is None:
            return
        name = next(name for name, parameter in self.model.named_parameters() if parameter is stale)
        cause = ""
        if self._left is not None and self._left[0] != global_step and self._left[1] == self._versions():
            cause = (
                f"No weight has changed since `step({self._left[0]})`. If {global_step} is the index of a "
                "micro-batch, pass the number of optimizer steps taken, as in `step(index // accumulation_steps)`; "
                "otherwise call `optimizer.step()` first. "
            )
        raise StepError(
            f"`{name}` must not change in this {plan.kind.value} step but has an earlier gradient, which the "
            f"optimizer would apply. {cause}Call `optimizer.zero_grad(set_to_none=True)` after every optimizer step."
        )
