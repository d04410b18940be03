"""A Trainer that alternates stochastic depth and masked freeze; its hooks are in the order of a run."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import TorchDynamoPlugin, find_batch_size
from torch import nn
from transformers import (
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_featreuse.checkpoints.changed_settings import PlanSource, check_plans, check_scaling
from hf_featreuse.checkpoints.resume_state import read_resume_state
from hf_featreuse.errors import BlockError, HubError, StepError
from hf_featreuse.hub.run_card import card_arguments
from hf_featreuse.method.blocks import ResidualBlock, find_residual_blocks, trainable_blocks
from hf_featreuse.method.compiling import compile_blocks
from hf_featreuse.method.cost import StepCosts, measure_step_costs
from hf_featreuse.method.dummy_forward import own_drop_path_rate, takes_dummy_inputs
from hf_featreuse.method.feature_reuse import FeatureReuse
from hf_featreuse.method.fsdp import complete_state, forget_state
from hf_featreuse.method.memory_format import set_memory_format
from hf_featreuse.method.schedule import FeatureReuseSchedule, StepKind, StepPlan
from hf_featreuse.recipe.weight_average import WeightAverage
from hf_featreuse.trainer import backends
from hf_featreuse.trainer.chosen_loss import chosen_loss
from hf_featreuse.trainer.console import ConsoleCallback
from hf_featreuse.trainer.inactive_parameters import InactiveParameters
from hf_featreuse.trainer.layer_decay import check_own_optimizer, layer_numbers, split_by_layer
from hf_featreuse.trainer.publishing import PublishingTrainer
from hf_featreuse.trainer.recipe import FollowWeights, Recipe
from hf_featreuse.trainer.recipe_arguments import RecipeArguments
from hf_featreuse.trainer.step_log import StepLog
from hf_featreuse.trainer.step_timer import StepTimer
from hf_featreuse.trainer.trackers import SchedulePicture
from hf_featreuse.trainer.train_loader import TrainLoader, kept_random_states, small_batch
from hf_featreuse.trainer.unsupported import check_engine, check_optimizer, fsdp_version

logger = logging.get_logger(__name__)


class FeatureReuseTrainer(PublishingTrainer):
    """A drop-in for `transformers.Trainer` that trains with feature reuse.

    With a plain `TrainingArguments` the options of feature reuse have their defaults. Evaluation and prediction use
    the whole network. Logs gain `loss/stochastic_depth`, `loss/masked_freeze` and `loss/vanilla` (means since the last
    log over the steps of each kind; absent kinds are left out), `dropped_blocks` (mean size of the set D per step),
    `compute_share` (mean arithmetic of a step as a share of a plain step's) and, after 50 steps, `step_time/` of each
    kind in seconds.

    Checkpoints and resume are those of [`ResumableTrainer`]. A push while training continues sends a snapshot, so that
    the commit of step k holds the weights of step k; one that fails is tried again, then logged with the command that
    repeats it. `training_args.bin`, a pickle that holds the token, is never sent.

    Args:
        model (`PreTrainedModel` or `torch.nn.Module`, *optional*): the model that trains; or pass `model_init`.
        args (`FeatureReuseConfig` or `TrainingArguments`, *optional*): options.
        data_collator (`Callable`, *optional*): makes a batch from a list of examples.
        train_dataset (`torch.utils.data.Dataset` or `datasets.Dataset`, *optional*): to train on.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): to evaluate on.
        processing_class (`BaseImageProcessor`, *optional*): saved and pushed with the model.
        model_init (`Callable`, *optional*): makes a new model for each `train()`, as hyperparameter search needs.
        compute_loss_func (`Callable`, *optional*): your own loss of `(outputs, labels, num_items_in_batch)`.
        compute_metrics (`Callable`, *optional*): from an `EvalPrediction` to metrics by name.
        callbacks (`list[TrainerCallback]`, *optional*): in addition to the default ones.
        optimizers (`tuple`, *optional*): an optimizer and a scheduler; by default those that `args` names.
        optimizer_cls_and_kwargs (`tuple`, *optional*): class and arguments of the optimizer.
        preprocess_logits_for_metrics (`Callable`, *optional*): shrinks logits before they are gathered.

    Attributes:
        card_details (`Mapping[str, Any]`): arguments of `create_model_card` for every card of this trainer:
            `finetuned_from`, `dataset`, `license`, `tags`.
        feature_reuse (`FeatureReuse`, *optional*): blocks and schedule, after `train()` has determined the model and
            the number of steps.
        step_costs (`StepCosts`, *optional*): arithmetic of each kind of step.
        step_kind (`StepKind`, *optional*): kind of the last step.
        weight_average (`WeightAverage`, *optional*): with `ema_decay`, after `train()` has started.

    Raises:
        ConfigurationError: a backend, optimizer or recipe option does not work with the model or with feature reuse;
            or, in `train()`, a setting that changed since the checkpoint would have planned a past step differently.
        BlockError: in `train()`, the model has no residual block that can be skipped and trained.
        CheckpointError: in `train()`, no checkpoint is complete, or none can be written.
        StepError: in `train()`, the weights became NaN or infinite.
        HubError: with `push_to_hub=True`, the repository cannot be created; in `push_to_hub()`, the push failed.

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
    # The current optimizer step, and the index of its micro-batch.
    _micro_batch: tuple[int, int] = (-1, 0)
    # How to compile the blocks; `None` if nothing is compiled, or the whole model in plain training.
    _dynamo_plugin: TorchDynamoPlugin | None = None
    # Whether one process reads the data and sends it to the others.
    _dispatches = False
    # The loader of the run while blocks are found.
    _loader: TrainLoader | None = None
    # Parameters without optimizer state in the last checkpoint, which holds a placeholder for it.
    _without_state: Any = ()
    # The loss function that the recipe set, and the user's own under it.
    _recipe_loss: Callable | None = None
    _own_loss: Callable | None = None
    # Layer of each parameter, by name, if layers have different learning rates.
    _layers: Mapping[str, int] = MappingProxyType({})

    # Set up

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: BaseImageProcessor | Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            model_init,
            compute_loss_func,
            compute_metrics,
            callbacks,
            optimizers,
            optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics,
        )
        self._take_up_recipe()
        # Before all others, so that a tracker that saves the model at the end of training saves the evaluated one.
        self.callback_handler.callbacks.insert(0, FollowWeights(lambda: self.recipe))
        self.callback_handler.callbacks.insert(
            0, InactiveParameters(lambda: self.step_kind, lambda: self.accelerator.optimizer_step_was_skipped)
        )
        self._timer = StepTimer(lambda: self.step_kind)
        self.callback_handler.callbacks.insert(0, self._timer)
        self.add_callback(SchedulePicture(self))
        self.add_callback(ConsoleCallback(self))

    @property
    def recipe_args(self) -> RecipeArguments:
        """The options of the recipe: those of `args`, or none if it is a plain `TrainingArguments`."""
        return self.args if isinstance(self.args, RecipeArguments) else RecipeArguments()

    @property
    def weight_average(self) -> WeightAverage | None:
        """The moving average of the weights."""
        return self.recipe.average

    def create_accelerator_and_postprocess(self) -> None:
        """Raise for engines that cannot run feature reuse, then create the accelerator."""
        if self.reuse_args.uses_blocks:
            check_engine(self.args, self.model)
        super().create_accelerator_and_postprocess()
        if self.reuse_args.uses_blocks:
            backends.check_accelerator(self.accelerator, self.reuse_args.drop_granularity)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        self._dynamo_plugin = backends.take_dynamo_plugin(arguments) if self.reuse_args.uses_blocks else None
        if self.reuse_args.uses_blocks and self.args.ddp_find_unused_parameters is None:
            backends.search_unused_parameters(arguments)
        return arguments

    def _validate_args(self) -> None:
        # The optimizers that were passed are known only here.
        if self.reuse_args.uses_blocks:
            check_optimizer(self.optimizer)
            check_optimizer((self.optimizer_cls_and_kwargs or (None,))[0])
        options = self.recipe_args
        check_own_optimizer(options.layer_decay, options.head_lr_multiplier, self.optimizer)
        super()._validate_args()

    def _take_up_recipe(self) -> None:
        """Read the current options of the recipe; hyperparameter search changes them between two runs."""
        options, args = self.recipe_args, self.args
        self.recipe = Recipe(options, seed=args.seed, label_smoothing=args.label_smoothing_factor)
        self.recipe.check(
            self.model,
            in_shards=self._shards,
            save_only_model=args.save_only_model,
            load_best_model_at_end=args.load_best_model_at_end,
        )
        # A function that was set since the last call is the user's.
        if self.compute_loss_func is None or self.compute_loss_func != self._recipe_loss:
            self._own_loss = self.compute_loss_func
        chosen = chosen_loss(
            options,
            self.model,
            own=self._own_loss,
            label_smoothing=args.label_smoothing_factor,
            train_dataset=self.train_dataset,
        )
        self.compute_loss_func = self._recipe_loss = self.recipe.loss_function(self._own_loss, chosen)

    # Begin to train

    def get_residual_blocks(self, model: nn.Module) -> list[ResidualBlock]:
        """Choose the blocks b0..b(L-1) of the model; override to choose others.

        Args:
            model (`torch.nn.Module`): the model, on its device, not wrapped or compiled yet.
        """
        blocks = find_residual_blocks(model, self._probe_inputs(model), self.reuse_args.target_blocks)
        return trainable_blocks(model, blocks)

    def get_schedule(self, num_blocks: int, max_steps: int) -> FeatureReuseSchedule:
        """Build the schedule; override to use another one.

        Args:
            num_blocks (`int`): number of blocks.
            max_steps (`int`): optimizer steps of the whole run.
        """
        return self.reuse_args.schedule(num_blocks, max_steps, self.args.seed)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train`, with feature reuse; `torch_compile=True` compiles each block until the end."""
        card_arguments(self.card_details)
        with contextlib.ExitStack() as self._compiled:
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = read_resume_state(resume_from_checkpoint, self.args.process_index, self.args.world_size) or {}
        if (saved := state.get("plans")) is not None:
            check_scaling(saved, self.reuse_args.scale_kept)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        # Here the model and max_steps are known, and the optimizer does not exist yet.
        self._take_up_recipe()
        model = self.model
        assert model is not None
        if self.reuse_args.uses_blocks:
            backends.check_sharding(model, self.accelerator, fsdp_version(self.args) is not None)
        set_memory_format(model, self.recipe_args.channels_last, self.args.device, in_shards=self._shards)
        self._dispatches = isinstance(train_dataloader, DataLoaderDispatcher)
        self._loader = train_dataloader = TrainLoader(train_dataloader, self._first_pass)
        try:
            with kept_random_states(self.args.device):
                bind = functools.partial(self._bind, model, max_steps)
                reuse = backends.bind_on_every_rank(bind, self.accelerator.num_processes)
        finally:
            self._loader = None
        prepare = super()._prepare_for_training
        if self.is_fsdp_enabled:
            with backends.sharded_by_block(self.accelerator, model, reuse):
                prepared = prepare(max_steps, train_dataloader, resume_from_checkpoint)
        else:
            prepared = prepare(max_steps, train_dataloader, resume_from_checkpoint)
        assert self.model_wrapped is not None
        backends.send_active_gradients(self.model_wrapped, reuse)
        self.recipe.start_average(model, resume_from_checkpoint)
        return prepared

    def _bind(self, model: nn.Module, max_steps: int) -> FeatureReuse:
        """Bind blocks, schedule and costs to the model of this run."""
        options = self.reuse_args
        self._compiled.close()
        options.check()
        blocks = self.get_residual_blocks(model) if options.uses_blocks else []
        schedule = self.get_schedule(len(blocks), max_steps)
        self.feature_reuse = reuse = FeatureReuse(
            model,
            blocks,
            schedule,
            scale_kept=options.scale_kept,
            train_trunk=options.train_trunk,  # pyright: ignore[reportArgumentType]
            frozen_batch_norm=options.frozen_batch_norm,  # pyright: ignore[reportArgumentType]
            allow_inexact_skip=options.allow_inexact_skip,
        )
        self._micro_batch, self.step_costs, self._scales = (-1, 0), None, options.scale_kept
        if blocks:
            self.step_costs = measure_step_costs(
                model, blocks, self._probe_inputs(model), train_trunk=reuse.train_trunk
            )
            if (rate := own_drop_path_rate(model)) > 0:
                logger.warning_once(
                    f"{type(model).__name__} has its own drop path (up to {rate:g} per sample), in addition to the "
                    "blocks that feature reuse drops. Turn it off with `drop_path_rate=0` in the config, or turn off "
                    "that of feature reuse with `stochastic_depth_steps=0`."
                )
        if blocks and self._dynamo_plugin is not None:
            self._compiled.enter_context(compile_blocks(blocks, **self._dynamo_plugin.to_kwargs()))
        if self.recipe_args.scales_learning_rates:
            self._layers = self._number_layers(model)
        self._step_log = StepLog(self.args.device, skip_non_finite=self.args.logging_nan_inf_filter)
        self._check_plans()
        return reuse

    def _number_layers(self, model: nn.Module) -> dict[str, int]:
        """Number the layers by all residual blocks, including those that `target_blocks` excludes."""
        return layer_numbers(model, find_residual_blocks(model, self._probe_inputs(model)))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer as `Trainer.create_optimizer`, with learning rates per layer if options set them."""
        is_new, options, model = self.optimizer is None, self.recipe_args, self.model
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and options.scales_learning_rates:
            assert model is not None
            names = self._layers or self._number_layers(model)
            layers = {id(parameter): names[name] for name, parameter in model.named_parameters()}
            optimizer.param_groups[:] = split_by_layer(
                optimizer.param_groups,
                layers,
                max(names.values()),
                layer_decay=options.layer_decay,
                head_lr_multiplier=options.head_lr_multiplier,
            )
        return optimizer

    def _probe_inputs(self, model: nn.Module) -> dict[str, Any] | None:
        """Return a small batch for finding blocks; `None` if one from the model's config works."""
        if takes_dummy_inputs(model):
            return None
        loader = self._loader
        if loader is None:
            if self.train_dataset is None and type(self).get_train_dataloader is Trainer.get_train_dataloader:
                raise BlockError(
                    f"{type(model).__name__} does not run on a batch made from its config, and the trainer has no "
                    "`train_dataset` to take one from. Override `get_residual_blocks` and pass a small batch as "
                    "`inputs` to `find_residual_blocks`."
                )
            loader = TrainLoader(self.get_train_dataloader())
        return small_batch(model, loader.first_batch())

    def _check_plans(self) -> None:
        """Raise for settings under which a past step would have had another plan; warn of other changes."""
        if self._resumed is None or (now := self._plan_source()) is None:
            return
        if (saved := self._resumed.get("plans")) is None:
            logger.warning(
                "The checkpoint records no settings of feature reuse, so changes are not detected, such as that of "
                "`scale_kept`, which is now on by default."
            )
            return
        said = check_plans(PlanSource.from_json(saved), now, self.state.global_step)
        if said is not None:
            logger.warning(said)

    def _plan_source(self) -> PlanSource | None:
        """Return everything that determines the plans; `None` if the schedule is the user's own."""
        reuse, options = self.feature_reuse, self.reuse_args
        if reuse is None or type(reuse.schedule) is not FeatureReuseSchedule:
            return None
        samples = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        more = {name: getattr(options, name) for name in ("scale_kept", "train_trunk", "frozen_batch_norm")}
        blocks = tuple(block.name for block in reuse.blocks)
        return PlanSource(reuse.schedule, blocks, reuse.trunk_trains, samples, more)

    # Take a step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward of a micro-batch according to the plan of its optimizer step."""
        if self.feature_reuse is None or self._step_log is None:
            if not self.reuse_args.uses_blocks:
                return super().training_step(model, inputs, num_items_in_batch)
            raise StepError("`training_step` was called outside `train()`, which binds blocks and schedule. Call it.")
        step = self.state.global_step
        self._count_micro_batch(step)
        with (
            self.feature_reuse.step(step, **self._samples(inputs)) as plan,
            self.recipe.expecting_mixed(type(self).__name__),
        ):
            try:
                loss = super().training_step(model, inputs, num_items_in_batch)
            except RuntimeError as error:
                self._explain_frozen(plan, error)
                raise
        self.step_kind = plan.kind
        self._scales = self._scales and (plan.kind is not StepKind.STOCHASTIC_DEPTH or plan.survival is not None)
        self._step_log.add(step, plan, self.step_costs.share(plan) if self.step_costs else 1.0, loss)
        return loss

    def _explain_frozen(self, plan: StepPlan, error: RuntimeError) -> None:
        """Raise `StepError` if backward failed because all parameters that train in the step were frozen later."""
        assert self.feature_reuse is not None
        active = self.feature_reuse.active_parameters(plan)
        if active and not any(parameter.requires_grad for parameter in active):
            raise StepError(
                f"Nothing is left to train in this {plan.kind.value} step: all parameters that it trains were frozen "
                "after `train()` began, for instance by a callback. Freeze parameters before `train()`, exclude their "
                "blocks with `target_blocks`, or freeze them in a separate run."
            ) from error

    def _count_micro_batch(self, step: int) -> None:
        opened, micro_batch = self._micro_batch
        self._micro_batch = (step, micro_batch + 1 if opened == step else 0)

    @property
    def _batch_of_step(self) -> int:
        """Index of the current micro-batch among those of the optimizer step on all ranks."""
        return self._micro_batch[1] * self.accelerator.num_processes + self.accelerator.process_index

    @property
    def samples_per_process(self) -> int:
        """Number of samples in a whole micro-batch of one process."""
        # accelerate gives whole batches of the loader to the processes in turn, or splits them.
        return self._train_batch_size // (self.accelerator.num_processes if self.accelerator.split_batches else 1)

    def _samples(self, inputs: dict[str, Any]) -> dict[str, int]:
        """Return the number of samples in a micro-batch, and the position of the first in the global batch."""
        assert self.feature_reuse is not None
        if self.feature_reuse.schedule.drop_granularity == "batch":
            return {}
        size = find_batch_size(inputs)
        assert size is not None
        ranks, share = self.accelerator.num_processes, self.samples_per_process
        # If one process reads for all, it divides each batch evenly, also a smaller one at the end of the data.
        before = self.accelerator.process_index * (size if self._dispatches else share)
        return {"batch_size": size, "position": self._micro_batch[1] * ranks * share + before}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as `Trainer.compute_loss`; for mixed training images, with both of their labels."""
        if self.recipe.mixer is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        images = getattr(self.model, "main_input_name", "pixel_values")
        with self.recipe.mixed(inputs, images, step=self.state.global_step, position=self._batch_of_step) as mixed:
            return super().compute_loss(model, mixed, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of the steps since the last log, then log as Trainer does."""
        if "learning_rate" in logs and self.recipe_args.scales_learning_rates:
            # Trainer logs that of the first group.
            groups = backends.plain_optimizer(self.optimizer).param_groups
            logs["learning_rate"] /= groups[0].get("lr_scale", 1.0)
        if "loss" in logs and self._step_log is not None:
            logs.update(self._step_log.drain(self._mean_over_ranks))
            logs.update(self._timer.drain())
            if self._step_log.not_finite:
                self._check_finite()
        super().log(logs, start_time)

    def _mean_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(values).view(-1, len(values)).mean(0)  # pyright: ignore

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict as `Trainer.evaluation_loop`; during training with the averaged weights, if any."""
        # After training the model itself has the averaged weights.
        with self.recipe.averaged() if self.is_in_train else contextlib.nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    # Save and resume

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.model is not None
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        with complete_state(self.model, backends.plain_optimizer(self.optimizer)) as self._without_state:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_fsdp_enabled and self._resumed is not None:
            assert self.model is not None
            names = self._resumed.get("without_state", [])
            forget_state(self.model, backends.plain_optimizer(self.optimizer), names)

    def _save_rng_state(self, output_dir: str) -> None:
        # Before the last files of a checkpoint, which list those that it must contain.
        if self.args.should_save:
            self.recipe.save_average(output_dir)
        super()._save_rng_state(output_dir)

    def _resume_state(self) -> dict[str, Any]:
        assert self._step_log is not None
        source = self._plan_source()
        return {
            **super()._resume_state(),
            "without_state": self._without_state,
            "by_kind": self._step_log.state(),
            "plans": None if source is None else source.to_json(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        # A checkpoint of the base class has no such entry.
        if self._step_log is not None and "by_kind" in state:
            self._step_log.restore(state["by_kind"])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.recipe.load_best_average(self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer.save_model`; a sharded model is gathered first.

        With `push_to_hub=True` it pushes too; a push that fails is only logged.
        """
        folder = str(output_dir or self.args.output_dir)
        is_checkpoint = _internal_call and os.path.basename(folder).startswith(PREFIX_CHECKPOINT_DIR)
        whole = self.is_fsdp_enabled and not is_checkpoint
        try:
            with backends.whole_state_dict(self.accelerator) if whole else contextlib.nullcontext():
                super().save_model(output_dir, _internal_call)
        except HubError as error:
            logger.error(str(error))
