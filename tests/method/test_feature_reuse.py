"""A step of each kind: what is skipped, what is frozen, and what a step that cannot be exact says."""

import pytest
import torch
from engine_checks import (
    ALWAYS,
    DEPTH,
    FREEZE,
    ONLY,
    VANILLA,
    adamw,
    backward,
    engine,
    every_architecture,
    inside,
    moved,
    state_of,
)
from tiny_models import NUM_LABELS, build, snapshot
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    find_residual_blocks,
    skip_blocks,
    train_only,
)

# The loop


def test_kinds_alternate_and_the_plan_is_that_of_the_schedule():
    model = build("vit")
    reuse, optimizer, plans = engine(model), adamw(model), []
    for step in range(8):
        assert reuse.current_plan is None
        with reuse.step(step) as plan:
            assert reuse.current_plan is plan
            backward(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        plans.append(plan)
    assert plans == [reuse.schedule.plan(step) for step in range(8)]
    assert {plan.kind for plan in plans} >= {DEPTH, FREEZE}
    assert [plan.kind for plan in plans[:2]] == [DEPTH, FREEZE]


@every_architecture
@pytest.mark.parametrize("scale_kept", [False, True])
@pytest.mark.parametrize("train_trunk", [False, True])
@pytest.mark.parametrize("step_inside", [False, True])
def test_resting_parts_do_not_move_in_training(architecture, scale_kept, train_trunk, step_inside):
    """In each of six steps, inactive parameters, moments and statistics are bit-identical."""
    model = build(architecture)
    reuse = engine(model, scale_kept=scale_kept, train_trunk=train_trunk, seed=5)
    optimizer = adamw(model)
    for seed in range(2):  # Warm the moments.
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    before_training, seen = snapshot(model), set()
    for step in range(6):
        before = state_of(model, optimizer)
        with reuse.step(step) as plan:
            backward(model, 10 + step)
            if step_inside:
                optimizer.step()
        if not step_inside:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert snapshot(model) == before_training
        assert reuse.current_plan is None
        changed, drawn = moved(before, state_of(model, optimizer)), [reuse.blocks[index] for index in plan.dropped]
        rest = [block for block in reuse.blocks if block not in drawn]
        if plan.kind is DEPTH:
            assert not any(inside(name, drawn) for name in changed)
            assert all(f"{block.name}." in "\n".join(changed) for block in rest)
            assert any(name.startswith("classifier") for name in changed)
        elif plan.kind is FREEZE:
            trunk = {name for name in changed if not inside(name, reuse.blocks)}
            assert not any(inside(name, rest) for name in changed)
            assert all(f"{block.name}." in "\n".join(changed) for block in drawn)
            assert bool(trunk) == train_trunk
        seen.add(plan.kind)
    assert seen >= {DEPTH, FREEZE}


@every_architecture
def test_depth_step_is_skipping_and_freeze_step_is_freezing(architecture):
    for kind in (DEPTH, FREEZE):
        model, reference = build(architecture), build(architecture)
        reuse, blocks = engine(model, **ONLY[kind]), find_residual_blocks(reference)
        with reuse.step(0) as plan:
            loss = backward(model)
        assert plan.kind is kind
        drawn = [blocks[index] for index in plan.dropped]
        with skip_blocks(drawn) if kind is DEPTH else train_only(reference, drawn):
            assert torch.equal(backward(reference), loss)
        for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None), name
            assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name


@every_architecture
def test_kept_blocks_are_scaled_by_one_minus_their_own_rate(architecture):
    model, reference = build(architecture), build(architecture)
    reuse = engine(model, scale_kept=True, masked_freeze_steps=0, drop_rate_schedule="linear", seed=3)
    with reuse.step(0) as plan:
        loss = backward(model)
    assert 0 < len(plan.dropped) < 4
    blocks = find_residual_blocks(reference)
    kept = [index for index in range(4) if index not in plan.dropped]
    survival = [1 - 0.5 * (index + 1) / 4 for index in kept]
    with skip_blocks(
        [blocks[index] for index in plan.dropped], kept=[blocks[index] for index in kept], survival=survival
    ):
        assert torch.equal(backward(reference), loss)


@every_architecture
def test_freeze_steps_do_not_scale(architecture):
    model, plain = build(architecture), build(architecture)
    if architecture == "swin":  # Its fused attention picks a kernel by what requires gradients.
        model.set_attn_implementation("eager")
        plain.set_attn_implementation("eager")
    with engine(model, scale_kept=True, **ONLY[FREEZE]).step(0) as plan:
        loss = backward(model)
    assert plan.kind is FREEZE
    assert torch.equal(loss, backward(plain))


@every_architecture
@pytest.mark.parametrize("why", ["no kinds", "window", "empty set", "vanilla steps", "rate of zero"])
def test_vanilla_step_is_a_plain_step(architecture, why):
    options = {
        "no kinds": ONLY[VANILLA],
        "window": {"first_step": 100},
        "empty set": {"drop_rate": 1e-9, "stochastic_depth_steps": 0},
        "vanilla steps": {"vanilla_steps": 3},
        "rate of zero": {"drop_rate": 0},
    }[why]
    model, plain = build(architecture), build(architecture)
    reuse = engine(model, **options)
    optimizers = adamw(model), adamw(plain)
    for step in range(3):
        with reuse.step(step) as plan:
            loss = backward(model, step)
        assert plan.kind is VANILLA
        assert torch.equal(loss, backward(plain, step))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert not moved(state_of(plain, optimizers[1]), state_of(model, optimizers[0]))


def test_vanilla_schedule_needs_no_block():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    schedule = FeatureReuseSchedule(0, stochastic_depth_steps=0, masked_freeze_steps=0)
    with FeatureReuse(model, [], schedule).step(0) as plan:
        model(torch.ones(1, 4)).sum().backward()
    assert plan.kind is VANILLA
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_architecture
@pytest.mark.parametrize("kind", [DEPTH, FREEZE])
def test_micro_batches_enter_the_step_in_turn(architecture, kind):
    """The gradients that the first micro-batch left are those of active parameters: no error, and they add up."""
    model = build(architecture)
    reuse = engine(model, **ONLY[kind])
    for micro in range(4):
        with reuse.step(0) as plan:
            backward(model, micro)
    drawn = [reuse.blocks[index] for index in plan.dropped]
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {name for name, _ in model.named_parameters() if inside(name, drawn) == (kind is FREEZE)}
    assert with_gradient == {name for name in expected if "mask_token" not in name}


@pytest.mark.parametrize("kind", [DEPTH, FREEZE, VANILLA])
def test_plan_is_visible_in_backward(kind):
    model = build("vit")
    reuse, seen = engine(model, **ONLY[kind]), []
    model.classifier.register_forward_hook(
        lambda _module, _args, output: output.register_hook(lambda _gradient: seen.append(reuse.current_plan)) and None
    )
    with reuse.step(0) as plan:
        backward(model)
    assert seen == [plan]
    assert plan.kind is kind
    assert reuse.current_plan is None


def test_single_block_model_works():
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=NUM_LABELS,
    )
    model = ViTForImageClassification(config)
    reuse, optimizer, kinds = engine(model), adamw(model), []
    before = snapshot(model)
    for step in range(12):
        with reuse.step(step) as plan:
            backward(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kinds.append(plan.kind)
    assert set(kinds) == {VANILLA, DEPTH, FREEZE}
    assert snapshot(model) == before


def test_blocks_left_out_belong_to_the_trunk():
    model = build("vit")
    blocks = find_residual_blocks(model, target_blocks=["layers.1", "layers.2"])
    schedule = FeatureReuseSchedule(2, **{**ALWAYS, "drop_rate": 0.999})
    for train_trunk in (False, True):
        with FeatureReuse(model, blocks, schedule, train_trunk=train_trunk).step(1) as plan:
            assert (plan.kind, plan.dropped) == (FREEZE, (0, 1))
            backward(model)
        outside = [p for name, p in model.named_parameters() if not inside(name, blocks)]
        assert all((parameter.grad is not None) == train_trunk for parameter in outside)
        model.zero_grad(set_to_none=True)
    with FeatureReuse(model, blocks, schedule).step(0):
        backward(model)
    assert all(parameter.grad is None for block in blocks for parameter in block.module.parameters())
    assert all(parameter.grad is not None for parameter in model.vit.layers[0].parameters())


def test_what_the_user_froze_stays_frozen():
    model = build("vit")
    model.vit.embeddings.requires_grad_(False)
    model.vit.layers[0].requires_grad_(False)
    fixed = [*model.vit.embeddings.parameters(), *model.vit.layers[0].parameters()]
    reuse = engine(model, train_trunk=True)
    assert [block.name for block in reuse.blocks] == [f"vit.layers.{index}" for index in (1, 2, 3)]
    for step in range(6):
        with reuse.step(step):
            assert not any(parameter.requires_grad for parameter in fixed)
            backward(model)
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in fixed)
        model.zero_grad(set_to_none=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


def test_shared_weight_trains_with_any_part_that_trains():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block(), Block()))
    model[1][1].linear.weight = model[1][0].linear.weight
    blocks = find_residual_blocks(model, torch.zeros(1, 4))
    schedule = FeatureReuseSchedule(2, **ONLY[FREEZE])
    step = next(step for step in range(50) if schedule.plan(step).dropped == (0,))
    with FeatureReuse(model, blocks, schedule, train_trunk=False).step(step):
        model(torch.ones(1, 4)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"1.0.linear.weight", "1.0.linear.bias"}
