"""Options of the method that the package does not offer, for trying them in the same comparison.

- `second_batch="same"`: all steps of a cycle use the batch of its first step.
- `join_gradients=True`: one optimizer step sums the gradients of two passes over one batch. The dropped blocks get
  theirs from the whole network, the kept blocks from the network without the dropped ones, the trunk from both.
- `distillation`: weight, from 0 to 1, of the distillation loss from the whole network to the network without the
  dropped blocks, on the same batch. The loss of that pass is then
  `(1 - weight) * loss + weight * cross_entropy(logits, softmax(logits of the full pass))`, without gradient to the
  teacher. The full pass must come first: in a joined step it does, otherwise it is a plain step at the start of the
  cycle (`vanilla_steps`). Source: cosub, arXiv 2212.04884, without its extra forward pass.
- `freeze_learning_rate`: learning rate of masked-freeze steps, relative to that of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from hf_featreuse import FeatureReuseConfig, FeatureReuseTrainer, StepCosts, StepKind, StepPlan, train_only

VARIANTS = ("second_batch", "join_gradients", "distillation", "freeze_learning_rate")


@dataclass
class VariantConfig(FeatureReuseConfig):
    """`FeatureReuseConfig` and the options above, for one micro-batch per optimizer step."""

    second_batch: str = "fresh"
    join_gradients: bool = False
    distillation: float = 0.0
    freeze_learning_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.second_batch not in ("fresh", "same"):
            raise ValueError(f"`second_batch={self.second_batch!r}` is unknown. Pass 'fresh' or 'same'.")
        if self.join_gradients:
            if self.drop_granularity != "batch":
                raise ValueError('`join_gradients=True` needs one set per batch. Pass `drop_granularity="batch"`.')
            # The full pass runs within the stochastic-depth step.
            self.stochastic_depth_steps, self.masked_freeze_steps = 1, 0
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"`distillation={self.distillation!r}` is not a weight. Pass a value from 0 to 1.")
        full_pass_first = self.vanilla_steps > 0 and self.second_batch == "same"
        if self.distillation and not self.join_gradients and not full_pass_first:
            raise ValueError(
                "`distillation` needs a full pass over the same batch first. Pass `join_gradients=True`, or "
                '`vanilla_steps=1` with `second_batch="same"`.'
            )
        super().__post_init__()


class VariantTrainer(FeatureReuseTrainer):
    """`FeatureReuseTrainer` with the options of `VariantConfig`."""

    args: VariantConfig
    # The batch of the first step of the cycle, and the logits of the last full pass over it.
    _cycle_batch: dict[str, Any] | None = None
    _teacher: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.freeze_learning_rate != 1:
            self.add_callback(_FreezeLearningRate(self))

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.args.second_batch == "same" and self._cycle_batch is not None and self._continues_cycle():
            inputs = self._cycle_batch
        else:
            self._cycle_batch, self._teacher = inputs, None
        plan = self._plan(self.state.global_step)
        if not self.args.join_gradients or plan.kind is not StepKind.STOCHASTIC_DEPTH or not plan.dropped:
            return super().training_step(model, inputs, num_items_in_batch)
        dropped = [self.feature_reuse.blocks[index] for index in plan.dropped]
        self._full_pass(model, inputs, num_items_in_batch, dropped)
        # The stochastic-depth step expects no gradients in the blocks that it drops.
        parameters = [parameter for block in dropped for parameter in block.module.parameters()]
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        loss = super().training_step(model, inputs, num_items_in_batch)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _full_pass(self, model, inputs, num_items_in_batch, dropped) -> None:
        """Forward and backward of the whole network, in which only the dropped blocks and the trunk train."""
        with train_only(
            self.model,
            dropped,
            train_trunk=self.args.train_trunk,
            all_blocks=self.feature_reuse.blocks,
            frozen_batch_norm=self.args.frozen_batch_norm,
        ):
            Trainer.training_step(self, model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.args.distillation and model.training:
            logits, plan = outputs["logits"], self.feature_reuse.current_plan
            if plan is None or plan.kind is not StepKind.STOCHASTIC_DEPTH:
                self._teacher = logits.detach()
            elif self._teacher is not None:
                taught = torch.nn.functional.cross_entropy(logits.float(), self._teacher.float().softmax(-1))
                loss = (1 - self.args.distillation) * loss + self.args.distillation * taught
        return (loss, outputs) if return_outputs else loss

    def _continues_cycle(self) -> bool:
        """Return whether this step is in the window and not the first of its cycle."""
        schedule, step = self.feature_reuse.schedule, self.state.global_step
        after_end = schedule.last_step is not None and step > schedule.last_step
        if not schedule.alternates or step < schedule.first_step or after_end:
            return False
        return (step - schedule.first_step) % schedule.steps_per_cycle > 0

    def _plan(self, step: int) -> StepPlan:
        return self.feature_reuse.plan(step, batch_size=self.args.per_device_train_batch_size)


class _FreezeLearningRate(TrainerCallback):
    """Scale the learning rate around the optimizer steps of masked freeze."""

    def __init__(self, trainer: VariantTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates = [group["lr"] for group in optimizer.param_groups]
        if self.trainer._plan(state.global_step).kind is StepKind.MASKED_FREEZE:
            for group in optimizer.param_groups:
                group["lr"] *= args.freeze_learning_rate

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate


def mean_share(args: VariantConfig, costs: StepCosts, num_blocks: int, steps: int) -> float:
    """Return the mean arithmetic of an optimizer step in a run of so many steps, as a share of a plain step.

    A joined step that drops a block costs two passes; one that drops nothing has a single pass over all blocks, which
    costs as much as a plain step.
    """
    schedule = args.schedule(num_blocks, steps, args.seed)
    plans = [schedule.plan(step, batch_size=args.per_device_train_batch_size) for step in range(steps)]
    shares = [costs.share(plan) for plan in plans]
    if args.join_gradients:
        shares += [costs.share(StepPlan(StepKind.MASKED_FREEZE, plan.dropped)) for plan in plans if plan.dropped]
    return sum(shares) / steps
