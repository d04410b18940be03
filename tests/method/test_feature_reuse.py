"""A step of each kind: what is skipped, what is frozen, and what a step that cannot be exact says."""

import pytest
import torch
from engine_checks import ALWAYS, engine, every_architecture, moved
from tiny_models import NUM_LABELS, batch, build, snapshot
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    ResidualBlock,
    StepError,
    StepKind,
    find_residual_blocks,
    skip_blocks,
    train_only,
)

VANILLA, DEPTH, FREEZE = StepKind.VANILLA, StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE
# A single kind of step.
ONLY = {
    DEPTH: {**ALWAYS, "masked_freeze_steps": 0},
    FREEZE: {**ALWAYS, "stochastic_depth_steps": 0},
    VANILLA: {**ALWAYS, "stochastic_depth_steps": 0, "masked_freeze_steps": 0},
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def backward(model: nn.Module, seed: int = 1) -> torch.Tensor:
    loss = model.train()(**batch(seed=seed)).loss
    loss.backward()
    return loss.detach()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state |= {f"{name}|{key}": value.clone() for key, value in optimizer.state.get(parameter, {}).items()}
    return state


def inside(name: str, blocks: list[ResidualBlock]) -> bool:
    return name.startswith(tuple(f"{block.name}." for block in blocks)) if blocks else False


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
    """Over six steps, in each of them: what must rest does so to the bit, moments and statistics included."""
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
def test_nesting_is_an_error_and_the_outer_step_goes_on(outer):
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
def test_exception_in_a_step_restores_everything_and_the_engine_goes_on(architecture, kind, where):
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
    schedule = FeatureReuseSchedule(len(blocks), drop_rate=0.5, drop_rate_schedule="uniform", masked_freeze_steps=0)
    step = next(s for s in range(100) if 0 in schedule.plan(s).dropped and 1 not in schedule.plan(s).dropped)
    reuse = FeatureReuse(model, blocks, schedule)
    for seed in range(2):
        with reuse.step(step):
            model(**batch(seed=seed)).loss.backward()
    assert blocks[1].module.mlp.fc1.weight.grad.abs().max() > 0
    # One that no active part holds is still refused.
    blocks[0].module.mlp.fc2.weight.grad = torch.zeros_like(blocks[0].module.mlp.fc2.weight)
    with pytest.raises(StepError, match="holds a gradient from before"):
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
    with pytest.raises(StepError, match="holds a gradient from before") as caught, reuse.step(1):
        pass
    assert "micro-batch" not in str(caught.value)


def test_within_one_step_only_the_missing_zero_grad_is_named():
    model = build("vit")
    reuse = engine(model)
    with reuse.step(1):
        pass
    backward(model)
    with pytest.raises(StepError, match="holds a gradient from before") as caught, reuse.step(1):
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
    with pytest.raises(StepError, match="holds a gradient from before"), reuse.step(0):
        pass
