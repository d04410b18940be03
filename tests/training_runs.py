"""Short training runs that the tests of the trainer share, and what watches them."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import batch, snapshot
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_featreuse import FeatureReuseConfig, FeatureReuseTrainer, StepKind
from hf_featreuse.method.fsdp import local_part

# Endings of the entries of the log that differ from run to run.
TIMES = ("runtime", "samples_per_second", "steps_per_second")


def options(folder: Path, **changed: Any) -> dict[str, Any]:
    """Training arguments of a short quiet run; every step is logged."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
    }
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):  # Which renamed its options.
        changed = {name.replace("activation_check", "gradient_check"): value for name, value in changed.items()}
    return {**defaults, **changed}


def config(folder: Path, **changed: Any) -> FeatureReuseConfig:
    """The same with feature reuse in cycles of two steps; with seed 5 and two or more blocks all kinds come early.

    The trunk is frozen in masked-freeze steps, so that more is frozen than by default.
    """
    fixed = {"stochastic_depth_steps": 1, "drop_rate_schedule": "uniform", "reuse_seed": 5, "train_trunk": False}
    return FeatureReuseConfig(**options(folder, **{**fixed, **changed}))


def with_dropout(model: nn.Module, rate: float = 0.2) -> nn.Module:
    """Give every dropout layer of the model this rate."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(first: Any, second: Any) -> bool:
    """Whether two nested structures of tensors and numbers are bit-identical."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_bits(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_bits, first, second))
    return first == second


class RecordingTrainer(FeatureReuseTrainer):
    """Notes the open plan and the blocks that are computed, once a micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: list[tuple[int, Any]] = []
        self.computed: list[set[int]] = []

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called: set[int] = set()
        handles = [
            block.module.register_forward_hook(lambda *_, index=index: called.add(index))
            for index, block in enumerate(self.feature_reuse.blocks)
        ]
        loss = super().compute_loss(model, *args, **kwargs)
        for handle in handles:
            handle.remove()
        if self.feature_reuse.current_plan is not None:  # Not in evaluation.
            self.plans.append((self.state.global_step, self.feature_reuse.current_plan))
            self.computed.append(called)
        return loss


class StepWatch(TrainerCallback):
    """Compares weights, buffers and optimizer state before and after every optimizer step."""

    def __init__(self) -> None:
        self.trainer: FeatureReuseTrainer | None = None
        self.kinds: set[StepKind] = set()
        self.still: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = self.take(**kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reuse = self.trainer.feature_reuse
        plan = reuse.schedule.plan(state.global_step - 1)
        dropped = tuple(f"{reuse.blocks[index].name}." for index in plan.dropped)
        after = self.take(**kwargs)
        self.kinds.add(plan.kind)
        moved = [name for name in after if not same_bits(self.before[name], after[name])]
        if plan.kind is StepKind.MASKED_FREEZE:
            assert [name for name in moved if not name.startswith(dropped)] == []
            assert all(any(name.startswith(prefix) for name in moved) for prefix in dropped)
        elif plan.kind is StepKind.STOCHASTIC_DEPTH:
            assert [name for name in moved if name.startswith(dropped)] == []
            assert any(name.startswith("classifier") for name in moved)

    @staticmethod
    def take(model: nn.Module, optimizer: torch.optim.Optimizer, **_: Any) -> dict[str, Any]:
        """Everything that a step can move, by name."""
        found: dict[str, Any] = {name: local_part(tensor).clone() for name, tensor in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            state = optimizer.state.get(parameter, {})
            found[f"{name} (optimizer)"] = {
                key: local_part(value).clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
                for key, value in state.items()
            }
        return found


def traces(model: nn.Module) -> dict[str, Any]:
    """A snapshot without the mark that accelerate leaves on every model it has prepared."""
    found = snapshot(model)
    names = [[name for name in names if name != "_is_accelerate_prepared"] for names in found["attributes"]]
    return {**found, "attributes": names}


def train(trainer: Trainer) -> Trainer:
    """Train and give back the trainer."""
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    """The logged training losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class PlainNet(nn.Module):
    """A convolutional network without any residual block, and not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.LazyLinear(3)
        self(batch(2)["pixel_values"])

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.body(pixel_values))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def plain_net() -> nn.Module:
    torch.manual_seed(0)
    return PlainNet()


def without_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in history]
