"""FSDP2 on CPU processes: accelerate shards on GPUs only, and would fall back to DDP here without a word."""

import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from distributed_runs import GroupCounter, arguments
from tiny_models import build, examples
from torch import nn
from torch.distributed.tensor import DTensor
from training_runs import StepWatch
from transformers import Trainer, TrainerCallback

from hf_featreuse import FeatureReuseTrainer


def sharding_accelerator(*, fsdp_plugin: FullyShardedDataParallelPlugin, **options: Any) -> Accelerator:
    """An accelerator that shards on CPUs as it does on GPUs."""
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    accelerator = Accelerator(**options)
    state = accelerator.state
    if state._mixed_precision != "no":
        fsdp_plugin.set_mixed_precision(state._mixed_precision)
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
    # Each state that accelerate makes later begins with what this one holds.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


class Sharded:
    """Mixed into a Trainer."""

    def create_accelerator_and_postprocess(self) -> None:
        with unittest.mock.patch.object(transformers.trainer, "Accelerator", sharding_accelerator):
            super().create_accelerator_and_postprocess()  # pyright: ignore


class ShardedFeatureReuseTrainer(Sharded, FeatureReuseTrainer):
    """FeatureReuseTrainer with FSDP2 on CPUs."""


class ShardedTrainer(Sharded, Trainer):
    """The stock Trainer with FSDP2 on CPUs."""


def whole(value: Any) -> Any:
    """Tensors of a nested structure put together from their shards, copied; every rank takes part."""
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.full_tensor().clone() if isinstance(value, DTensor) else value.clone()
    return value


def whole_moments(trainer: Trainer) -> dict[str, Any]:
    """The optimizer state by name of the parameter."""
    assert trainer.model is not None and trainer.optimizer is not None
    state: Any = trainer.optimizer.state
    return {name: whole(dict(state.get(parameter, {}))) for name, parameter in trainer.model.named_parameters()}


class WholeStates(TrainerCallback):
    """Keeps weights and buffers after every optimizer step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.states.append(whole(model.state_dict()))


class CallsByStep(TrainerCallback):
    """Keeps the names of the calls that reach the process group in each optimizer step."""

    def __init__(self, counter: GroupCounter) -> None:
        self.counter = counter
        self.steps: list[list[str]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = len(self.counter.calls)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([name.removesuffix(".default") for name, _ in self.counter.calls[self.begun :]])


def sharded(
    folder: Path,
    model: nn.Module | None = None,
    kind: Callable[..., Trainer] = ShardedFeatureReuseTrainer,
    *,
    fsdp: dict[str, Any] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **changed: Any,
) -> Any:
    """A trainer of a tiny model in shards."""
    options = arguments(folder, fsdp=True, fsdp_config={"version": 2, **(fsdp or {})}, **changed)
    return kind(
        build("vit") if model is None else model,
        options,
        train_dataset=examples(),
        eval_dataset=examples(8, seed=3),
        callbacks=callbacks,
    )


def run_sharded(folder: Path, model: nn.Module | None = None, *, watch: bool = True, **changed: Any) -> dict[str, Any]:
    """Train in shards; keep weights after every step, moments at the end, and calls at the process group.

    With `watch`, `StepWatch` asserts after every step that inactive parameters and their moments did not change.
    """
    counter, states, step_watch = GroupCounter(), WholeStates(), StepWatch()
    calls = CallsByStep(counter)
    # The watch compares the shards of this rank, before the states are put together.
    callbacks = [calls, step_watch, states] if watch else [calls, states]
    trainer = sharded(folder, model, callbacks=callbacks, **changed)
    step_watch.trainer = trainer
    with counter:
        trainer.train()
    return {
        "states": states.states,
        "moments": whole_moments(trainer),
        "calls": calls.steps,
        "kinds": sorted(step_watch.kinds),
        "plans": [trainer.feature_reuse.plan(step) for step in range(trainer.state.max_steps)],
        "units": [name for name, module in trainer.model.named_modules() if type(module).__name__.startswith("FSDP")],
        "history": trainer.state.log_history,
        "named_after": trainer.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap,
    }
