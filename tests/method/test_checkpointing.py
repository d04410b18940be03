"""Non-reentrant activation checkpointing changes no bit of a step of any kind, wherever transformers offers it."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from tiny_architectures import ARCHITECTURES, Architecture
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import CONFIG_MAPPING, PreTrainedModel

from hf_featreuse import (
    ConfigurationError,
    FeatureReuse,
    FeatureReuseSchedule,
    StepError,
    StepKind,
    StepPlan,
    find_residual_blocks,
)

DEPTH, FREEZE, VANILLA = StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE, StepKind.VANILLA
NON_REENTRANT = {"use_reentrant": False}
DROPOUT = 0.2


def with_dropout(case: Architecture) -> Architecture:
    """The same tiny model with every dropout and drop path that its config knows."""

    def switched_on(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        changed = dict(config)
        for key, default in defaults.items():
            if isinstance(default, dict) and key in config:
                changed[key] = switched_on(config[key], default)
            elif isinstance(default, float) and "drop" in key:
                changed[key] = DROPOUT
        return changed

    defaults = CONFIG_MAPPING[case.model_type]().to_dict()
    return dataclasses.replace(case, config=switched_on(case.config, defaults))


OFFERED = tuple(with_dropout(case) for case in ARCHITECTURES if case.build().supports_gradient_checkpointing)
WITH_BLOCKS = tuple(case for case in OFFERED if case.blocks)


def each(cases: tuple[Architecture, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def sets(case: Architecture) -> list[tuple[int, ...]]:
    """Dropped sets: the first block, the last, and every second one."""
    count = len(case.blocks)
    return [(0,), (count - 1,), tuple(range(0, count, 2))]


def schedule_of(case: Architecture) -> FeatureReuseSchedule:
    if not case.blocks:
        return FeatureReuseSchedule(0, stochastic_depth_steps=0, masked_freeze_steps=0)
    return FeatureReuseSchedule(len(case.blocks), 0.5, "uniform", seed=0)


@functools.cache
def step_with(case_name: str, plan: StepPlan) -> int:
    """The first optimizer step of the schedule of this kind and with this set D."""
    schedule = schedule_of(next(case for case in OFFERED if case.name == case_name))
    return next(step for step in itertools.count() if kind_and_set(schedule.plan(step)) == kind_and_set(plan))


def kind_and_set(plan: StepPlan) -> tuple[StepKind, tuple[int, ...]]:
    return plan.kind, plan.dropped


def build(case: Architecture, checkpointed: bool, **options: Any) -> tuple[PreTrainedModel, FeatureReuse]:
    model = case.build()
    if hasattr(model.config, "use_cache"):
        # Checkpointing turns the cache off, and keys in a cache are laid out another way: rounding could differ.
        model.config.use_cache = False
    if checkpointed:
        model.activation_checkpointing_enable(NON_REENTRANT)
    blocks = find_residual_blocks(model, case.batch()) if case.blocks else []
    return model, FeatureReuse(model, blocks, schedule_of(case), **options)


def loss_of(case: Architecture, model: PreTrainedModel) -> torch.Tensor:
    torch.manual_seed(7)
    if case.returns_loss:
        return model(**case.labeled(4)).loss
    return model(**case.batch(4))[0].square().mean()


@contextlib.contextmanager
def calls_in_backward() -> Iterator[list[nn.Module]]:
    """Modules whose forward runs while a backward does."""
    seen: list[nn.Module] = []

    def note(module: nn.Module, _args: tuple) -> None:
        if torch._C._current_graph_task_id() != -1:
            seen.append(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


State = dict[str, torch.Tensor | None]


def taken(case: Architecture, model: PreTrainedModel, reuse: FeatureReuse, plan: StepPlan) -> State:
    """Loss, gradients and buffers after forward and backward of a step with this plan."""
    model.zero_grad(set_to_none=True)
    with reuse.step(step_with(case.name, plan)) as opened:
        loss = loss_of(case, model)
        loss.backward()
    assert kind_and_set(opened) == kind_and_set(plan)
    return {"loss": loss.detach(), **state_of(model)}


def state_of(model: PreTrainedModel) -> State:
    gradients = {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return {**gradients, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


def different(first: State, second: State) -> list[str]:
    """Names of the values that are not the same bits, None where None."""
    assert first.keys() == second.keys()
    pairs = {name: (first[name], second[name]) for name in first}
    return [
        name
        for name, (a, b) in pairs.items()
        if not (a is b is None or (a is not None and b is not None and torch.equal(a, b)))
    ]


# No bit changes


def test_the_mapping_has_models_to_checkpoint():
    # Those of transformers 5.23; the rest, ConvNeXt and ResNet among them, say that they do not support it.
    assert len(WITH_BLOCKS) >= 30
    assert {"vit", "swin", "beit", "mobilevit", "swiftformer"} <= {case.name for case in WITH_BLOCKS}
    refusing = next(case for case in ARCHITECTURES if case.name == "convnext").build()
    with pytest.raises(ValueError, match=r"does not support (activation|gradient) checkpointing"):
        refusing.activation_checkpointing_enable(NON_REENTRANT)


@each(WITH_BLOCKS)
def test_dropout_is_at_work(case):
    model = case.build()
    logits = [model(**case.batch()).logits for _ in range(8)]
    assert not all(torch.equal(logits[0], other) for other in logits[1:])


@each(WITH_BLOCKS)
@pytest.mark.parametrize("kind", [DEPTH, FREEZE])
def test_a_step_is_the_same_with_checkpointing(case, kind):
    plain, checkpointed = build(case, False), build(case, True)
    for dropped in sets(case):
        plan = StepPlan(kind, dropped)
        expected = taken(case, *plain, plan)
        with calls_in_backward() as recomputed:
            found = taken(case, *checkpointed, plan)
        assert recomputed
        assert different(expected, found) == [], dropped
        assert {value is None for name, value in found.items() if name.endswith(".grad")} == {True, False}


@each(OFFERED)
def test_a_vanilla_step_is_the_same_with_checkpointing(case):
    plan = StepPlan(VANILLA, ())
    expected = taken(case, *build(case, False), plan)
    with calls_in_backward() as recomputed:
        found = taken(case, *build(case, True), plan)
    assert recomputed
    assert different(expected, found) == []


# The step must stay open through backward


@each(WITH_BLOCKS)
@pytest.mark.parametrize("kind", [DEPTH, FREEZE])
def test_a_step_left_before_backward_is_an_error(case, kind):
    """What runs again in backward would be neither skipped, scaled nor frozen."""
    model, reuse = build(case, True)
    with reuse.step(step_with(case.name, StepPlan(kind, sets(case)[-1]))):
        loss = loss_of(case, model)
    with pytest.raises(StepError, match=r"Backward ran after `step\(\d+\)` was left"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


# Reentrant checkpointing


REASON = r"reentrant activation checkpointing.*frozen.*activation_checkpointing_kwargs=\{\"use_reentrant\": False\}"


@each(WITH_BLOCKS)
def test_reentrant_checkpointing_is_refused_with_the_setting_to_use(case):
    model = case.build()
    blocks = find_residual_blocks(model, case.batch())
    # Without the setting, torch takes the reentrant kind.
    for kwargs in ({"use_reentrant": True}, {"use_reentrant": None}, {"preserve_rng_state": True}):
        model.activation_checkpointing_enable(kwargs)
        with pytest.raises(ConfigurationError, match=REASON):
            FeatureReuse(model, blocks, schedule_of(case))
    model.activation_checkpointing_enable(NON_REENTRANT)
    FeatureReuse(model, blocks, schedule_of(case))
