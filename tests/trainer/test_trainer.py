"""Training with FeatureReuseTrainer: what a step does, and what it leaves alone."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import ARCHITECTURES, WITHOUT_BATCH_NORM, batch, build, examples
from torch import nn
from training_runs import (
    RecordingTrainer,
    StepWatch,
    config,
    losses,
    options,
    plain_net,
    same_bits,
    state_of,
    traces,
    train,
    with_dropout,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_featreuse import (
    FeatureReuseConfig,
    FeatureReuseSchedule,
    FeatureReuseTrainer,
    StepError,
    StepKind,
    find_residual_blocks,
)

# ConvNeXt and ResNet of transformers have no activation checkpointing.
WITH_CHECKPOINTING = ("vit", "swin")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor")


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "plain"])
def test_zero_and_zero_is_bit_identical_to_the_stock_trainer(architecture: str, tmp_path: Path) -> None:
    def model() -> nn.Module:
        return plain_net() if architecture == "plain" else with_dropout(build(architecture))

    changed = {"max_steps": 20, "weight_decay": 0.1, "gradient_accumulation_steps": 2}
    stock = train(Trainer(model(), TrainingArguments(**options(tmp_path, **changed)), train_dataset=examples()))
    arguments = config(tmp_path, stochastic_depth_steps=0, masked_freeze_steps=0, **changed)
    ours = train(FeatureReuseTrainer(model(), arguments, train_dataset=examples()))
    assert same_bits(state_of(stock.model), state_of(ours.model))
    assert same_bits(stock.optimizer.state_dict(), ours.optimizer.state_dict())
    assert losses(stock) == losses(ours)
    assert len(losses(ours)) == 20


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_step_does_what_the_schedule_plans(architecture: str, tmp_path: Path) -> None:
    trainer = train(RecordingTrainer(build(architecture), config(tmp_path, max_steps=8), train_dataset=examples()))
    blocks = len(trainer.feature_reuse.blocks)
    schedule = FeatureReuseSchedule(blocks, drop_rate_schedule="uniform", seed=5, stochastic_depth_steps=1)
    assert trainer.plans == [(step, schedule.plan(step)) for step in range(8)]
    kinds = {plan.kind for _, plan in trainer.plans}
    assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= kinds
    for (_, plan), computed in zip(trainer.plans, trainer.computed, strict=True):
        left_out = set(plan.dropped) if plan.kind is StepKind.STOCHASTIC_DEPTH else set()
        assert computed == set(range(blocks)) - left_out


def test_the_defaults_alternate_over_linear_rates_from_the_training_seed(tmp_path: Path) -> None:
    arguments = FeatureReuseConfig(**options(tmp_path, seed=7))
    trainer = train(RecordingTrainer(build("vit"), arguments, train_dataset=examples()))
    schedule = FeatureReuseSchedule(4, drop_rate=0.5, drop_rate_schedule="linear", seed=7)
    assert [plan for _, plan in trainer.plans] == [schedule.plan(step) for step in range(6)]


def test_all_micro_batches_of_a_step_follow_one_plan(tmp_path: Path) -> None:
    arguments = config(tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2)
    trainer = train(RecordingTrainer(build("vit"), arguments, train_dataset=examples()))
    expected = [(step, trainer.feature_reuse.schedule.plan(step)) for step in range(6) for _ in range(4)]
    assert trainer.plans == expected
    assert len({plan for _, plan in trainer.plans}) > 3
    assert all(trainer.computed[i] == trainer.computed[i - i % 4] for i in range(24))


@pytest.mark.parametrize("architecture", WITHOUT_BATCH_NORM)
def test_accumulating_four_micro_batches_equals_one_batch_of_their_size(architecture: str, tmp_path: Path) -> None:
    def run(size: int, accumulation: int) -> RecordingTrainer:
        arguments = config(
            tmp_path,
            optim="sgd",
            optim_args="momentum=0.9",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=6,
        )
        return train(RecordingTrainer(build(architecture), arguments, train_dataset=examples()))

    whole, parts = run(8, 1), run(2, 4)
    assert {plan.kind for _, plan in whole.plans} >= {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE}
    torch.testing.assert_close(state_of(parts.model), state_of(whole.model), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-4, atol=1e-5)


def watched_run(architecture: str, folder: Path, model: nn.Module | None = None, **changed: Any) -> StepWatch:
    """Train with every step watched; both kinds of step occur."""
    watch = StepWatch()
    arguments = config(folder, max_steps=8, weight_decay=0.1, max_grad_norm=0.5, **changed)
    watch.trainer = FeatureReuseTrainer(
        model or build(architecture), arguments, train_dataset=examples(), callbacks=[watch]
    )
    watch.trainer.train()
    assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= watch.kinds
    return watch


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_step_freezes_or_drops_does_not_move_by_a_bit(
    architecture: str, optimizer: str, tmp_path: Path
) -> None:
    momentum = {"optim_args": "momentum=0.9"} if optimizer == "sgd" else {}
    watched_run(architecture, tmp_path, optim=optimizer, **momentum)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "changed",
    [
        {"bf16": True},
        {"fp16": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"stochastic_depth_steps": 2, "masked_freeze_steps": 2},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["bf16", "fp16", "accumulation", "two-of-each", "activation-checkpointing"],
)
def test_frozen_parameters_are_bit_identical_with(architecture: str, changed: dict[str, Any], tmp_path: Path) -> None:
    if "activation_checkpointing" in changed and architecture not in WITH_CHECKPOINTING:
        pytest.skip(f"transformers' {architecture} has no activation checkpointing")
    watched_run(architecture, tmp_path, **changed)


def test_a_passed_optimizer_keeps_frozen_parameters_bit_identical(tmp_path: Path) -> None:
    watch = StepWatch()
    model = build("resnet")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    watch.trainer = FeatureReuseTrainer(
        model,
        config(tmp_path, max_steps=8),
        train_dataset=examples(),
        callbacks=[watch],
        optimizers=(optimizer, scheduler),
    )
    watch.trainer.train()
    assert watch.trainer.optimizer.optimizer is optimizer
    assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= watch.kinds


def test_train_trunk_moves_the_trunk_in_masked_freeze_steps_and_no_frozen_block(tmp_path: Path) -> None:
    kinds = []

    class TrunkWatch(StepWatch):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reuse = self.trainer.feature_reuse
            plan = reuse.schedule.plan(state.global_step - 1)
            if plan.kind is not StepKind.MASKED_FREEZE:
                return
            kept = tuple(f"{block.name}." for i, block in enumerate(reuse.blocks) if i not in plan.dropped)
            after = self.take(**kwargs)
            moved = {name for name in after if not same_bits(self.before[name], after[name])}
            assert not any(name.startswith(kept) for name in moved)
            assert {"classifier.weight", "vit.embeddings.cls_token"} <= moved
            kinds.append(plan.kind)

    watch = TrunkWatch()
    arguments = config(tmp_path, train_trunk=True)
    watch.trainer = FeatureReuseTrainer(build("vit"), arguments, train_dataset=examples(), callbacks=[watch])
    watch.trainer.train()
    assert kinds


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_and_prediction_compute_every_block(architecture: str, tmp_path: Path) -> None:
    calls: dict[str, int] = {}

    def count(name: str) -> Callable:
        def hook(module: nn.Module, *_: Any) -> None:
            if not module.training:
                calls[name] = calls.get(name, 0) + 1

        return hook

    class CountingTrainer(FeatureReuseTrainer):
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            calls.clear()
            result = super().evaluation_loop(*args, **kwargs)
            assert calls == {block.name: 2 for block in self.feature_reuse.blocks}
            return result

    arguments = config(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, drop_rate=0.9)
    trainer = CountingTrainer(
        build(architecture), arguments, train_dataset=examples(), eval_dataset=examples(8, seed=3)
    )
    for block in find_residual_blocks(trainer.model):
        block.module.register_forward_hook(count(block.name))
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 6
    prediction = trainer.predict(examples(8, seed=3))
    inputs = batch(8, seed=3)["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(prediction.predictions), trainer.model.eval()(inputs).logits)


def test_the_step_stays_open_through_backward(tmp_path: Path) -> None:
    seen: dict[int, list[Any]] = {}

    class Look(TrainerCallback):
        def on_train_begin(self, *_: Any, model: nn.Module, **kwargs: Any) -> None:
            for parameter in model.parameters():
                parameter.register_hook(self.note)

        @staticmethod
        def note(_gradient: torch.Tensor) -> None:
            seen.setdefault(trainer.state.global_step, []).append(trainer.feature_reuse.current_plan)

    arguments = config(tmp_path, max_steps=8)
    trainer = FeatureReuseTrainer(build("vit"), arguments, train_dataset=examples(), callbacks=[Look()])
    trainer.train()
    assert sorted(seen) == list(range(8))
    schedule = trainer.feature_reuse.schedule
    assert all(plan == schedule.plan(step) for step, plans in seen.items() for plan in plans)
    assert trainer.feature_reuse.current_plan is None


@pytest.mark.parametrize("architecture", WITH_CHECKPOINTING)
def test_activation_checkpointing_changes_no_bit(architecture: str, tmp_path: Path) -> None:
    def run(**changed: Any) -> RecordingTrainer:
        model = with_dropout(build(architecture))
        return train(RecordingTrainer(model, config(tmp_path, **changed), train_dataset=examples()))

    plain = run()
    checkpointed = run(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False})
    assert same_bits(state_of(plain.model), state_of(checkpointed.model))
    assert losses(plain) == losses(checkpointed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_leaves_the_model_as_it_was(architecture: str, tmp_path: Path) -> None:
    model = build(architecture)
    next(model.parameters()).requires_grad_(False)
    before = traces(model)
    train(FeatureReuseTrainer(model, config(tmp_path), train_dataset=examples()))
    assert traces(model) == before


@pytest.mark.parametrize("kind", StepKind)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_exception_inside_a_step_leaves_the_model_as_it_was(
    architecture: str, kind: StepKind, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    class FailingTrainer(RecordingTrainer):
        fails = True

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if self.fails and self.feature_reuse.current_plan.kind is kind:
                loss.backward()  # leaves gradients behind as well
                raise Stop
            return loss

    model = build(architecture)
    before = traces(model)
    trainer = FailingTrainer(model, config(tmp_path, max_steps=12, drop_rate=0.3), train_dataset=examples())
    with pytest.raises(Stop):
        trainer.train()
    assert traces(model) == before
    assert trainer.feature_reuse.current_plan is None
    trainer.fails = False
    assert trainer.train().global_step == 12
    assert traces(model) == before


def test_steps_outside_the_window_are_vanilla(tmp_path: Path) -> None:
    arguments = config(tmp_path, max_steps=10, reuse_start=0.2, reuse_end=0.6, drop_rate=0.9)
    trainer = train(RecordingTrainer(build("vit"), arguments, train_dataset=examples()))
    kinds = [plan.kind for _, plan in trainer.plans]
    assert all(kind is StepKind.VANILLA for kind in kinds[:2] + kinds[7:])
    assert kinds[2:6] == [StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE] * 2
    assert kinds[6] is StepKind.STOCHASTIC_DEPTH


def test_training_step_outside_train_says_what_to_call(tmp_path: Path) -> None:
    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path), train_dataset=examples())
    with pytest.raises(StepError, match=r"outside `train\(\)`"):
        trainer.training_step(trainer.model, batch())


@pytest.mark.parametrize("kind", ["stochastic_depth", "masked_freeze"])
def test_a_gradient_that_was_kept_from_the_step_before_is_refused(kind: str, tmp_path: Path) -> None:
    class Keeping(RecordingTrainer):
        def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(model, *args, **kwargs)
            model.zero_grad = lambda set_to_none=True: nn.Module.zero_grad(model, set_to_none=False)
            return loss

    arguments = config(tmp_path, **{"stochastic_depth_steps": 0, "masked_freeze_steps": 0, f"{kind}_steps": 1})
    trainer = Keeping(build("vit"), arguments, train_dataset=examples())
    with pytest.raises(StepError, match=rf"this {kind} step .* `optimizer\.zero_grad\(set_to_none=True\)`"):
        trainer.train()


def test_a_plain_training_step_runs_outside_of_train_as_in_trainer(tmp_path):
    losses = []
    for kind in (FeatureReuseTrainer, Trainer):
        trainer = kind(build("vit"), config(tmp_path, drop_rate=0.0), train_dataset=examples(4))
        trainer.current_gradient_accumulation_steps = 1  # Trainer itself needs it.
        losses.append(trainer.training_step(trainer.model, batch()))
    assert torch.equal(*losses)
    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path), train_dataset=examples(4))
    with pytest.raises(StepError, match=r"outside `train\(\)`"):
        trainer.training_step(trainer.model, batch())


def test_micro_batches_are_counted_from_zero_in_each_run(tmp_path: Path) -> None:
    class Counting(FeatureReuseTrainer):
        counted: ClassVar[list[int]] = []

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.counted.append(self._batch_of_step)
            return super().compute_loss(*args, **kwargs)

    trainer = Counting(
        build("vit"), config(tmp_path, max_steps=1, gradient_accumulation_steps=2), train_dataset=examples()
    )
    trainer.train()
    trainer.train()
    assert trainer.counted == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("split", "dispatches", "position"), [(False, False, 20), (True, False, 10), (False, True, 19), (True, True, 11)]
)
def test_the_position_follows_from_how_batches_are_dealt_out(
    split: bool, dispatches: bool, position: int, tmp_path: Path
) -> None:
    args = config(tmp_path, per_device_train_batch_size=4, drop_granularity="sample", max_steps=1)
    trainer = FeatureReuseTrainer(build("vit"), args, train_dataset=examples())
    trainer.train()
    trainer.accelerator = SimpleNamespace(num_processes=2, process_index=1, split_batches=split)
    trainer._dispatches, trainer._micro_batch = dispatches, (0, 2)
    # The third micro-batch of a step on rank 1, at the end of the data: three samples are left for each rank.
    assert trainer._samples(batch(3)) == {"batch_size": 3, "position": position}
