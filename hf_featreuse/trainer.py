"""A Trainer that alternates stochastic depth and masked freeze."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import nn
from transformers.utils import logging

from hf_featreuse.blocks import ResidualBlock, find_residual_blocks, trainable_blocks
from hf_featreuse.changed_plans import PlanSource, check_plans, check_scaling
from hf_featreuse.compiling import compile_blocks
from hf_featreuse.console import ConsoleCallback
from hf_featreuse.cost import StepCosts, measure_step_costs
from hf_featreuse.engine import FeatureReuse
from hf_featreuse.errors import BlockError, ConfigurationError, StepError
from hf_featreuse.hub import HubTrainer
from hf_featreuse.probing import own_drop_path_rate, takes_dummy_inputs, undisturbed
from hf_featreuse.recipe_trainer import RecipeTrainer
from hf_featreuse.resume_state import read_resume_state
from hf_featreuse.schedule import FeatureReuseSchedule, StepKind
from hf_featreuse.step_log import StepLog
from hf_featreuse.tracking import SchedulePicture

logger = logging.get_logger(__name__)


class FeatureReuseTrainer(HubTrainer, RecipeTrainer):
    """A drop-in for `transformers.Trainer` that trains with feature reuse.

    Takes every argument of `Trainer`. With a plain `TrainingArguments` the options of feature reuse have their
    defaults. Evaluation and prediction use the whole network. Logs gain `loss/stochastic_depth`,
    `loss/masked_freeze`, `loss/vanilla` (means since the last log of the steps of each kind; absent kinds are left
    out), `dropped_blocks` (mean size of the drawn set D a step) and `compute_share` (mean arithmetic of a step as a
    share of a vanilla step's).

    Checkpoints are restored exactly and strictly, for models too whose weights the stock Trainer of transformers 5.23
    fails to restore (ViT, DeiT, BEiT, Swin, DINOv2); one that is cut short is passed over for the last whole one.
    Pushes to the Hub hold what they say and never fail silently.

    Attributes:
        card_details (`Mapping[str, Any]`): arguments of `create_model_card` that hold for every card of this trainer,
            such as `{"dataset": "uoft-cs/cifar10"}`.
        feature_reuse (`FeatureReuse`, *optional*): blocks and schedule, bound when `train()` knows the model that
            trains and its number of steps.
        step_costs (`StepCosts`, *optional*): arithmetic of each kind of step.
        step_kind (`StepKind`, *optional*): kind of the last step.

    Raises:
        ConfigurationError: an engine or optimizer cannot run feature reuse (DeepSpeed, FSDP1, `nn.DataParallel`,
            optimizers that step in backward or are schedule-free); or, in `train()`, a setting that changed since the
            checkpoint would have planned a step that was taken otherwise.
        BlockError: in `train()`, the model has no residual block that can be skipped and trained.
        CheckpointError: in `train()`, no checkpoint is whole, one does not hold every weight, or none can be written.
        StepError: in `train()`, the weights became NaN or infinite.
        HubError: with `push_to_hub=True`, the repository cannot be made; in `push_to_hub()`, the push failed.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import FeatureReuseConfig, FeatureReuseTrainer
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=8, patch_size=4)
        >>> data = [{"pixel_values": torch.rand(3, 8, 8), "labels": i % 2} for i in range(16)]
        >>> args = FeatureReuseConfig(output_dir="outputs/run", max_steps=4, use_cpu=True, disable_tqdm=True,
        ...                           save_strategy="no", report_to="none", logging_steps=2)
        >>> trainer = FeatureReuseTrainer(ViTForImageClassification(config), args, train_dataset=data)
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> result.global_step
        4
    """

    feature_reuse: FeatureReuse | None = None
    step_costs: StepCosts | None = None
    step_kind: StepKind | None = None
    _step_log: StepLog | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(SchedulePicture(self))
        self.add_callback(ConsoleCallback(self))

    def get_residual_blocks(self, model: nn.Module) -> list[ResidualBlock]:
        """Choose the blocks b0..b(L-1) of the model that trains; override to choose others.

        Args:
            model (`torch.nn.Module`): the model, on its device, not wrapped or compiled yet.
        """
        blocks = find_residual_blocks(model, self._probe_inputs(model), self.reuse_args.target_blocks)
        return trainable_blocks(model, blocks)

    def get_schedule(self, num_blocks: int, max_steps: int) -> FeatureReuseSchedule:
        """Build the schedule; override for another one.

        Args:
            num_blocks (`int`): number of blocks.
            max_steps (`int`): optimizer steps of the whole run.
        """
        return self.reuse_args.schedule(num_blocks, max_steps, self.args.seed)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward of a micro-batch as the plan of its optimizer step says."""
        if self.feature_reuse is None or self._step_log is None:
            raise StepError("`training_step` was called outside `train()`, which binds blocks and schedule. Call it.")
        step = self.state.global_step
        self._count_micro_batch()
        with self.feature_reuse.step(step, **self._samples(inputs)) as plan:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_kind = plan.kind
        self._step_log.add(step, plan, self.step_costs.share(plan) if self.step_costs else 1.0, loss)
        return loss

    def _samples(self, inputs: dict[str, Any]) -> dict[str, int]:
        """Number of samples in a micro-batch, and the position of the first in the step's global batch."""
        assert self.feature_reuse is not None
        if self.feature_reuse.schedule.drop_granularity == "batch":
            return {}
        # accelerate deals the batches of the loader out to the ranks in turn.
        samples = self._train_batch_size // (self.accelerator.num_processes if self.accelerator.split_batches else 1)
        return {"batch_size": find_batch_size(inputs), "position": self._batch_of_step * samples}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the steps since the last log did, then log as Trainer does."""
        if "loss" in logs and self._step_log is not None:
            logs.update(self._step_log.drain(self._mean_over_ranks))
            if self._step_log.not_finite:
                self._check_finite()
        super().log(logs, start_time)

    def _resume_state(self) -> dict[str, Any]:
        assert self._step_log is not None
        source = self._plan_source()
        plans = None if source is None else source.to_json()
        return {**super()._resume_state(), "by_kind": self._step_log.state(), "plans": plans}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        # A checkpoint of the base class has none.
        if self._step_log is not None and "by_kind" in state:
            self._step_log.restore(state["by_kind"])

    def _plan_source(self) -> PlanSource | None:
        """What the plans follow from; `None` where the schedule is of the user's own."""
        reuse, options = self.feature_reuse, self.reuse_args
        if reuse is None or type(reuse.schedule) is not FeatureReuseSchedule:
            return None
        samples = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        more = {name: getattr(options, name) for name in ("scale_kept", "train_trunk", "frozen_batch_norm")}
        blocks = tuple(block.name for block in reuse.blocks)
        return PlanSource(reuse.schedule, blocks, reuse.trunk_trains, samples, more)

    def _check_plans(self) -> None:
        """Refuse settings under which a step that was taken would have had another plan; say what else changed."""
        if self._resumed is None or (now := self._plan_source()) is None:
            return
        if (saved := self._resumed.get("plans")) is None:
            logger.warning(
                "The checkpoint records no settings of feature reuse, so changed ones, such as `scale_kept`, which is "
                "on by default now, go unnoticed."
            )
            return
        said = check_plans(PlanSource.from_json(saved), now, self.state.global_step)
        if said is not None:
            logger.warning(said)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train`, with feature reuse; `torch_compile=True` compiles each block until the end."""
        with contextlib.ExitStack() as self._compiled:
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = read_resume_state(resume_from_checkpoint, self.args.process_index, self.args.world_size) or {}
        if (saved := state.get("plans")) is not None:
            check_scaling(saved, self.reuse_args.scale_kept)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        # Here the model that trains and max_steps are both known, and the optimizer is not made yet.
        reuse = self._bind_on_every_rank(lambda: self._bind(max_steps))
        prepared = super()._prepare_for_training(max_steps, *args, **kwargs)
        self._send_active_gradients(reuse)
        return prepared

    def _bind(self, max_steps: int) -> FeatureReuse:
        """Bind blocks, schedule and costs to the model that trains now."""
        options, model = self.reuse_args, self.model
        assert model is not None
        self._compiled.close()
        options.check()
        blocks = self.get_residual_blocks(model) if options.alternates else []
        schedule = self.get_schedule(len(blocks), max_steps)
        if schedule.drop_granularity == "sample" and self._dynamo_plugin is not None:
            raise ConfigurationError(
                '`torch_compile=True` does not go with `drop_granularity="sample"`, which runs each block on parts of '
                'the batch whose sizes change in every step. Set `torch_compile=False`, or `drop_granularity="batch"`.'
            )
        self.feature_reuse = FeatureReuse(
            model,
            blocks,
            schedule,
            scale_kept=options.scale_kept,
            train_trunk=options.train_trunk,  # pyright: ignore[reportArgumentType]
            frozen_batch_norm=options.frozen_batch_norm,  # pyright: ignore[reportArgumentType]
            allow_inexact_skip=options.allow_inexact_skip,
        )
        self._micro_batch = (-1, 0)
        self.step_costs = None
        if blocks:
            inputs = self._probe_inputs(model)
            self.step_costs = measure_step_costs(model, blocks, inputs, train_trunk=self.feature_reuse.train_trunk)
            if (rate := own_drop_path_rate(model)) > 0:
                logger.warning_once(
                    f"{type(model).__name__} has drop path of its own (up to {rate:g} a sample), which acts besides "
                    "the blocks that feature reuse drops. Turn it off with `drop_path_rate=0` in the config, or ours "
                    "with `stochastic_depth_steps=0`."
                )
        if blocks and self._dynamo_plugin is not None:
            self._compiled.enter_context(compile_blocks(blocks, **self._dynamo_plugin.to_kwargs()))
        self._step_log = StepLog(self.args.device, skip_non_finite=self.args.logging_nan_inf_filter)
        self._check_plans()
        return self.feature_reuse

    def _probe_inputs(self, model: nn.Module) -> dict[str, Any] | None:
        """A batch of one to look at the model with: made from its config, or where that does not suit, the data's."""
        if takes_dummy_inputs(model):
            return None
        if self.train_dataset is None:
            raise BlockError(
                f"{type(model).__name__} does not run on a batch made from its config, and the trainer has no "
                "`train_dataset` to take one from. Override `get_residual_blocks` and pass a small batch as `inputs`"
                " to `find_residual_blocks`."
            )
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        with undisturbed(model):
            return collate([next(iter(self.train_dataset))])

    def _mean_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(values).view(-1, len(values)).mean(0)  # pyright: ignore
