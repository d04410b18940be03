"""Entering a step of `FeatureReuse`: what is refused, what is restored, and what follows the model."""

import pytest
import torch
from engine_checks import DEPTH, FREEZE, ONLY, VANILLA, backward, engine, every_architecture, inside
from tiny_models import batch, build, snapshot
from torch import nn

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    StepError,
    find_residual_blocks,
)

# Entering a step


@every_architecture
@pytest.mark.parametrize("kind", [DEPTH, FREEZE])
@pytest.mark.parametrize("zeroed", [False, True], ids=["kept", "zeroed"])
def test_stale_gradient_is_an_error_and_nothing_changes(architecture, kind, zeroed):
    model = build(architecture)
    reuse = engine(model, **ONLY[kind])
    backward(model)
    if zeroed:  # A zero gradient moves weights too, by momentum and weight decay.
        model.zero_grad(set_to_none=False)
    before, gradients = snapshot(model), [parameter.grad for parameter in model.parameters()]
    with pytest.raises(StepError, match=r"zero_grad\(set_to_none=True\)") as caught:
        with reuse.step(0):
            raise AssertionError("entered")
    drawn = [reuse.blocks[index] for index in reuse.schedule.plan(0).dropped]
    name = str(caught.value).split("`")[1]
    assert name in dict(model.named_parameters())
    assert inside(name, drawn) == (kind is DEPTH)
    assert kind.value in str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    assert snapshot(model) == before
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), gradients, strict=True))
    assert reuse.current_plan is None
    model.zero_grad(set_to_none=True)
    with reuse.step(0):
        backward(model)


@pytest.mark.parametrize("kind", [DEPTH, FREEZE])
def test_every_inactive_parameter_is_checked(kind):
    model = build("resnet")
    reuse = engine(model, **ONLY[kind])
    drawn = [reuse.blocks[index] for index in reuse.schedule.plan(0).dropped]
    for name, parameter in model.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        if inside(name, drawn) == (kind is DEPTH):
            with pytest.raises(StepError, match=rf"`{name}`"):
                with reuse.step(0):
                    pass
        else:
            with reuse.step(0):
                pass
        parameter.grad = None


def test_gradients_may_be_there_in_a_vanilla_step():
    model = build("vit")
    backward(model)
    with engine(model, **ONLY[VANILLA]).step(0):
        backward(model)


@pytest.mark.parametrize("outer", [DEPTH, FREEZE, VANILLA])
def test_nesting_is_an_error_and_the_outer_step_continues(outer):
    model = build("vit")
    reuse, before = engine(model, **ONLY[outer]), snapshot(model)
    with reuse.step(0) as plan:
        inside_step = snapshot(model)
        with pytest.raises(StepError, match=rf"`step\(1\)` was entered inside another step \({outer.value}\)"):
            with reuse.step(1):
                raise AssertionError("entered")
        assert snapshot(model) == inside_step
        assert reuse.current_plan is plan
        backward(model)
    assert snapshot(model) == before


@every_architecture
@pytest.mark.parametrize("kind", [DEPTH, FREEZE])
@pytest.mark.parametrize("where", ["before forward", "in a block", "in backward", "after backward"])
def test_exception_in_a_step_restores_everything_and_training_continues(architecture, kind, where):
    model = build(architecture)
    reuse, before = engine(model, **ONLY[kind]), snapshot(model)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with reuse.step(0):
            if where == "before forward":
                fail()
            if where == "in a block":
                model.classifier.register_forward_pre_hook(fail)
            output = model.train()(**batch())
            if where == "in backward":
                output.logits.register_hook(fail)
            output.loss.backward()
            fail()
    model.classifier._forward_pre_hooks.clear()
    assert snapshot(model) == before
    assert reuse.current_plan is None
    model.zero_grad(set_to_none=True)
    with reuse.step(0) as plan:
        backward(model)
    assert plan.kind is kind
    assert snapshot(model) == before


def test_weights_that_a_dropped_block_shares_with_an_active_one_accumulate():
    """The gradient of the first micro-batch is not a stale one: the active block has it, too."""
    model = build("vit")
    blocks = find_residual_blocks(model)
    blocks[0].module.mlp.fc1.weight = blocks[1].module.mlp.fc1.weight
    schedule = FeatureReuseSchedule(
        len(blocks), drop_rate=0.5, drop_rate_schedule="uniform", masked_freeze_steps=0, stochastic_depth_steps=1
    )
    step = next(s for s in range(100) if 0 in schedule.plan(s).dropped and 1 not in schedule.plan(s).dropped)
    reuse = FeatureReuse(model, blocks, schedule)
    for seed in range(2):
        with reuse.step(step):
            model(**batch(seed=seed)).loss.backward()
    assert blocks[1].module.mlp.fc1.weight.grad.abs().max() > 0
    # One that no active part holds is still refused.
    blocks[0].module.mlp.fc2.weight.grad = torch.zeros_like(blocks[0].module.mlp.fc2.weight)
    with pytest.raises(StepError, match="has an earlier gradient"):
        with reuse.step(step):
            pass


# What the optimizer sees


@every_architecture
@pytest.mark.parametrize("kind", [DEPTH, FREEZE])
@pytest.mark.parametrize("train_trunk", [False, True])
def test_clipping_and_unscaling_see_only_active_gradients(architecture, kind, train_trunk):
    """The norm of all gradients is that of the active ones, and a loss scaler divides no others."""
    model = build(architecture)
    reuse = engine(model, train_trunk=train_trunk, **ONLY[kind])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)  # Nothing is left of an earlier step.
    optimizer.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with reuse.step(0) as plan:
        scaler.scale(model.train()(**batch()).loss).backward()
    active = {id(parameter) for parameter in reuse.active_parameters(plan)}
    held = {id(p): p.grad.clone() for p in model.parameters() if p.grad is not None}
    assert held.keys() <= active < {id(parameter) for parameter in model.parameters()}
    scaler.unscale_(optimizer)
    assert {id(p) for p in model.parameters() if p.grad is not None} == held.keys()
    expected = torch.stack([gradient.square().sum() for gradient in held.values()]).sum().sqrt() / 8
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), expected.item() / 2)
    torch.testing.assert_close(norm, expected)
    clipped = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    torch.testing.assert_close(clipped, expected / 2)


# What a wrong loop is told


@pytest.mark.parametrize("kind", [DEPTH, FREEZE])
def test_the_index_of_a_micro_batch_as_the_step_is_recognized(kind):
    model = build("vit")
    reuse = engine(model)
    first = 1 if kind is DEPTH else 0
    with reuse.step(first):
        backward(model)
    with pytest.raises(StepError, match="No weight has changed since") as caught:
        while True:  # Until a set differs.
            with reuse.step(first := first + 1) as plan:
                assert plan.kind in (DEPTH, FREEZE)
                backward(model)
    assert f"If {first} is the index of a micro-batch" in str(caught.value)
    assert "`step(index // accumulation_steps)`" in str(caught.value)
    assert "zero_grad(set_to_none=True)" in str(caught.value)


@pytest.mark.parametrize("foreach", [False, True])
def test_after_an_optimizer_step_only_the_missing_zero_grad_is_named(foreach):
    model = build("vit")
    reuse, optimizer = engine(model), torch.optim.AdamW(model.parameters(), foreach=foreach)
    with reuse.step(0):
        backward(model)
    optimizer.step()
    with pytest.raises(StepError, match="has an earlier gradient") as caught, reuse.step(1):
        pass
    assert "micro-batch" not in str(caught.value)


def test_within_one_step_only_the_missing_zero_grad_is_named():
    model = build("vit")
    reuse = engine(model)
    with reuse.step(1):
        pass
    backward(model)
    with pytest.raises(StepError, match="has an earlier gradient") as caught, reuse.step(1):
        pass
    assert "micro-batch" not in str(caught.value)


# The model changes


def test_whether_the_trunk_trains_is_asked_of_the_model_as_it_is_now():
    model = build("vit")
    reuse = engine(model, train_trunk=False, drop_rate=0.999)
    outside = [parameter for name, parameter in model.named_parameters() if not inside(name, reuse.blocks)]
    assert reuse.trunk_trains
    assert len(reuse.plan(0).dropped) == 4
    for parameter in outside:
        parameter.requires_grad_(False)
    assert not reuse.trunk_trains
    # Dropping every block would leave nothing to train.
    assert reuse.plan(0).kind is VANILLA
    outside[0].requires_grad_(True)
    assert reuse.trunk_trains
    # The freeze of a step is not the user's.
    with reuse.step(1) as plan:
        assert plan.kind is FREEZE
        assert not any(parameter.requires_grad for parameter in outside)
        assert reuse.trunk_trains


def test_parameters_that_were_replaced_are_followed():
    """As sharding replaces them: the new ones are frozen, checked and known as active."""
    model = build("vit")
    reuse = engine(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
    with reuse.step(1) as plan:
        backward(model)
    drawn = [reuse.blocks[index] for index in plan.dropped]
    named = dict(model.named_parameters())
    assert {name for name, parameter in named.items() if parameter.grad is not None} == {
        name for name in named if inside(name, drawn)
    }
    assert {id(p) for p in reuse.active_parameters(plan)} == {id(p) for n, p in named.items() if inside(n, drawn)}
    with pytest.raises(StepError, match="has an earlier gradient"), reuse.step(0):
        pass
