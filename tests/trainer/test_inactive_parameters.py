"""An optimizer that changes parameters without a gradient is detected and refused; others are accepted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import build, examples
from training_runs import StepWatch, config, options
from transformers import TrainerCallback

from hf_featreuse import ConfigurationError, FeatureReuseConfig, FeatureReuseTrainer, StepKind
from hf_featreuse.trainer import inactive_parameters
from hf_featreuse.trainer.inactive_parameters import InactiveParameters


class ZeroFilling(torch.optim.Optimizer):
    """Optional momentum and weight decay, with zeros in place of absent gradients."""

    def __init__(
        self, params: Any, lr: float = 0.01, momentum: float = 0.0, decay: float = 0.0, skip_1d: bool = False
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay, "skip_1d": skip_1d})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None and group["skip_1d"] and p.ndim == 1:
                    continue
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                state = self.state[p]
                if group["momentum"]:
                    state["momentum"] = state.get("momentum", torch.zeros_like(p)) * group["momentum"] + grad
                    grad = state["momentum"]
                p.mul_(1 - group["lr"] * group["decay"]).sub_(grad, alpha=group["lr"])


class CountsSteps(torch.optim.SGD):
    """Changes no weight without a gradient, but counts its steps."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1


class AllStateAtOnce(ZeroFilling):
    """Creates the whole state at construction, like Adagrad, and fills in zeros."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)


MOVES = {
    "weight decay": lambda m: ZeroFilling(m.parameters(), decay=0.1),
    "momentum": lambda m: ZeroFilling(m.parameters(), momentum=0.9),
    "momentum, state at construction": lambda m: AllStateAtOnce(m.parameters(), momentum=0.9),
    "only matrices": lambda m: ZeroFilling(m.parameters(), decay=0.1, skip_1d=True),
    "state alone": lambda m: CountsSteps(m.parameters(), lr=0.01),
    "only one group": lambda m: ZeroFilling(
        [
            {"params": [p for p in m.parameters() if p.ndim == 1]},
            {"params": [p for p in m.parameters() if p.ndim > 1], "decay": 0.1},
        ]
    ),
}


def trainer_with(optimizer: Any, args: FeatureReuseConfig, scheduler: Any = None, **more: Any) -> FeatureReuseTrainer:
    model = build("vit")
    made = optimizer(model)
    optimizers = (made, None if scheduler is None else scheduler(made))
    return FeatureReuseTrainer(model, args, train_dataset=examples(), optimizers=optimizers, **more)


@pytest.mark.parametrize(
    ("optimizer", "kind", "accumulation"),
    [(name, "both", 1) for name in MOVES]
    + [("momentum", "stochastic_depth", 1), ("momentum", "masked_freeze", 1), ("weight decay", "both", 2)],
)
def test_an_optimizer_that_changes_inactive_parameters_is_refused(
    optimizer: str, kind: str, accumulation: int, tmp_path: Path
) -> None:
    off = {"stochastic_depth": {"masked_freeze_steps": 0}, "masked_freeze": {"stochastic_depth_steps": 0}}.get(
        kind, {}
    )
    args = config(tmp_path, warmup_steps=2, gradient_accumulation_steps=accumulation, max_steps=8, **off)
    trainer = trainer_with(MOVES[optimizer], args)
    with pytest.raises(ConfigurationError, match=rf"\.{type(trainer.optimizer).__name__} cannot be used.*no gradient"):
        trainer.train()
    assert trainer.state.global_step < 6


def test_it_is_detected_after_a_resume_too(tmp_path: Path) -> None:
    # A run without feature reuse works with any optimizer; its checkpoint holds the momentum.
    changed = {"save_strategy": "steps", "save_steps": 2}
    plain = config(tmp_path, max_steps=2, drop_rate=0.0, **changed)
    trainer_with(MOVES["momentum"], plain).train()
    trainer = trainer_with(MOVES["momentum"], config(tmp_path, max_steps=6, reuse_start=0.3, **changed))
    with pytest.raises(ConfigurationError, match="ZeroFilling"):
        trainer.train(resume_from_checkpoint=True)
    # The first step with inactive blocks: their momentum is that of the checkpoint.
    assert trainer.state.global_step == 2


def test_plain_training_accepts_such_an_optimizer(tmp_path: Path) -> None:
    trainer = trainer_with(MOVES["momentum"], config(tmp_path, drop_rate=0.0))
    assert trainer.train().global_step == 6


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad"])
def test_nothing_is_compared_once_each_kind_has_passed(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    digest = inactive_parameters._digest

    def noting(*args: Any) -> torch.Tensor:
        compared.append(watch.trainer.state.global_step)
        return digest(*args)

    monkeypatch.setattr(inactive_parameters, "_digest", noting)
    watch = StepWatch()
    watch.trainer = FeatureReuseTrainer(
        build("vit"), config(tmp_path, max_steps=16, optim=optim), train_dataset=examples(), callbacks=[watch]
    )
    assert watch.trainer.train().global_step == 16
    assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= watch.kinds
    assert 0 < len(set(compared)) <= 4
    assert max(compared) <= 6


def step_of(watch: InactiveParameters, optimizer: torch.optim.Optimizer) -> None:
    watch.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
    optimizer.step()
    watch.on_optimizer_step(None, None, None, optimizer=optimizer)


def test_skipped_steps_and_steps_without_learning_rate_prove_nothing() -> None:
    now = SimpleNamespace(kind=StepKind.STOCHASTIC_DEPTH, skipped=False)
    watch = InactiveParameters(lambda: now.kind, lambda: now.skipped)
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = ZeroFilling([first, second], lr=0.0, momentum=0.9)
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    step_of(watch, optimizer)
    assert not watch._passed
    optimizer = torch.optim.SGD([first, second], lr=0.0)
    second.grad = None
    step_of(watch, optimizer)
    assert not watch._passed, "a learning rate of 0"
    optimizer.param_groups[0]["lr"], now.skipped = 0.1, True
    step_of(watch, optimizer)
    assert not watch._passed, "a skipped step"
    now.skipped = False
    step_of(watch, optimizer)
    assert watch._passed == {(StepKind.STOCHASTIC_DEPTH, 0)}
    now.kind = StepKind.MASKED_FREEZE
    step_of(watch, optimizer)
    assert len(watch._passed) == 2


def test_a_parameter_that_was_never_trained_proves_nothing() -> None:
    watch = InactiveParameters(lambda: StepKind.MASKED_FREEZE, lambda: False)
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = ZeroFilling([first, second], momentum=0.9)
    for parameter in (first, second):
        optimizer.state[parameter]["momentum"] = torch.zeros(3)
    first.grad = torch.ones(3)
    step_of(watch, optimizer)
    assert not watch._passed
    first.grad, second.grad = None, torch.ones(3)
    with pytest.raises(ConfigurationError):
        step_of(watch, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.uint8])
def test_one_changed_bit_changes_the_digest(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    state = torch.ones(5).to(dtype)
    optimizer = SimpleNamespace(state={parameter: {"nested": [{"moment": state}], "step": 3, "name": "x"}})
    before = inactive_parameters._digest(parameter, optimizer)
    state[3] = state[3] + (1 if dtype is torch.uint8 else 0.0078125)
    assert not torch.equal(before, inactive_parameters._digest(parameter, optimizer))


def test_the_error_comes_before_a_checkpoint_of_that_step(tmp_path: Path) -> None:
    class Saves(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saved.append(state.global_step)

    saved: list[int] = []
    args = FeatureReuseConfig(**options(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, drop_rate=0.9))
    trainer = trainer_with(MOVES["weight decay"], args, callbacks=[Saves()])
    with pytest.raises(ConfigurationError):
        trainer.train()
    assert saved == list(range(1, trainer.state.global_step + 1))
