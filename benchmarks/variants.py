"""Open choices of the method that the package does not offer: tried here first, on the same footing as those it does.

- `second_batch="same"`: the masked-freeze step of a cycle takes the batch of its stochastic-depth step again.
- `join_gradients=True`: both passes run on one batch, and one optimizer step takes both gradients: the blocks that
  were kept learn from the thinned network, those that were dropped from the whole one.
- `freeze_learning_rate`: the learning rate of masked-freeze steps, relative to that of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainerCallback

from hf_featreuse import FeatureReuseConfig, FeatureReuseTrainer, StepCosts, StepKind, StepPlan, train_only

VARIANTS = ("second_batch", "join_gradients", "freeze_learning_rate")


@dataclass
class VariantConfig(FeatureReuseConfig):
    """`FeatureReuseConfig` and the choices above; one micro-batch an optimizer step."""

    second_batch: str = "fresh"
    join_gradients: bool = False
    freeze_learning_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.second_batch not in ("fresh", "same"):
            raise ValueError(f"`second_batch={self.second_batch!r}` is unknown. Pass 'fresh' or 'same'.")
        if self.join_gradients:
            # A step of the first kind in every cycle; the second pass follows within it.
            self.stochastic_depth_steps, self.masked_freeze_steps = 1, 0
        super().__post_init__()


class VariantTrainer(FeatureReuseTrainer):
    """`FeatureReuseTrainer` with the choices of `VariantConfig`."""

    args: VariantConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first_batch: dict[str, Any] | None = None
        if self.args.freeze_learning_rate != 1:
            self.add_callback(_FreezeLearningRate(self))

    def training_step(self, model, inputs, num_items_in_batch=None):
        plan = self._plan(self.state.global_step)
        if self.args.second_batch == "same":
            if plan.kind is StepKind.STOCHASTIC_DEPTH:
                self._first_batch = inputs
            elif plan.kind is StepKind.MASKED_FREEZE and self._first_batch is not None:
                inputs = self._first_batch
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.join_gradients and plan.kind is StepKind.STOCHASTIC_DEPTH:
            blocks = self.feature_reuse.blocks
            dropped = [blocks[index] for index in plan.dropped]
            with train_only(self.model, dropped, train_trunk=self.args.train_trunk, all_blocks=blocks):
                Trainer.training_step(self, model, inputs, num_items_in_batch)
        return loss

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
    """Mean arithmetic of an optimizer step, as a share of a plain one, of a run of so many steps."""
    schedule = args.schedule(num_blocks, steps, args.seed)
    plans = [schedule.plan(step, batch_size=args.per_device_train_batch_size) for step in range(steps)]
    shares = [costs.share(plan) for plan in plans]
    if args.join_gradients:
        shares += [costs.share(StepPlan(StepKind.MASKED_FREEZE, plan.dropped)) for plan in plans if plan.dropped]
    return sum(shares) / steps
