"""Frozen parameters are bit-identical after a step, and the others get the gradient of a full backward."""

import contextlib

import pytest
import torch
from tiny_models import ARCHITECTURES, WITHOUT_BATCH_NORM, batch, build, snapshot
from torch import nn
from transformers import EfficientNetConfig, EfficientNetForImageClassification
from transformers.optimization import Adafactor

from hf_featreuse import BlockError, ResidualBlock, find_residual_blocks, train_only
from hf_featreuse.method.class_swap import plain_class
from hf_featreuse.method.freezing import changing_layers, trunk_modules

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

OPTIMIZERS = {
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, fused=True),
    "sgd-loop": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=False),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False),
}


def backward(model: nn.Module, data: dict[str, torch.Tensor], share: float = 1.0, bf16: bool = False) -> torch.Tensor:
    """Forward and backward of a micro-batch in training mode, as Trainer's `training_step`; the logits."""
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
        output = model(**data)
    (output.loss * share).backward()
    return output.logits.detach()


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def warmed(architecture: str, optimizer: str, bf16: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after three plain steps, so that momentum and moments are there to move what has a gradient."""
    model = build(architecture)
    made = OPTIMIZERS[optimizer](model.parameters())
    for step in range(3):
        backward(model, batch(seed=10 + step), bf16=bf16)
        update(model, made)
    return model, made


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Copies of every parameter, buffer and entry of the optimizer's state, by name."""
    state: dict[str, object] = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}|{key}"] = value.clone() if isinstance(value, torch.Tensor) else value
    return state


def moved(before: dict[str, object], after: dict[str, object]) -> set[str]:
    """The names of what changed in any bit."""
    assert before.keys() == after.keys()
    return {
        name
        for name, value in before.items()
        if not (torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name])
    }


def inside(name: str, blocks: list[ResidualBlock]) -> bool:
    return name.startswith(tuple(f"{block.name}." for block in blocks))


def bitwise(architecture: str) -> nn.Module:
    """A model whose kernels do not depend on what requires gradients: Swin's fused attention does."""
    model = build(architecture)
    if architecture == "swin":
        model.set_attn_implementation("eager")
    return model


def parameter_names(model: nn.Module, blocks: list[ResidualBlock]) -> set[str]:
    return {name for name, _ in model.named_parameters() if inside(name, blocks)}


# Bits


@every_architecture
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_frozen_parameters_buffers_and_moments_do_not_move(architecture, optimizer, bf16):
    model, made = warmed(architecture, optimizer, bf16)
    blocks = find_residual_blocks(model)
    trained = [blocks[1], blocks[3]]
    assert len(made.state) >= len(list(model.parameters())) - 1  # Swin's mask token takes no part.
    before = state_of(model, made)
    with train_only(model, trained):
        backward(model, batch(), bf16=bf16)
        update(model, made)
    changed = moved(before, state_of(model, made))
    assert all(inside(name, trained) for name in changed), sorted(n for n in changed if not inside(n, trained))
    assert parameter_names(model, trained) <= changed


@every_architecture
def test_without_freezing_everything_moves(architecture):
    """The counterpart: the same step without the context moves every parameter and every statistic."""
    model, made = warmed(architecture, "adamw-foreach")
    before = state_of(model, made)
    backward(model, batch())
    update(model, made)
    still = before.keys() - moved(before, state_of(model, made))
    assert all("mask_token" in name or "relative_position_index" in name for name in still), still


@every_architecture
def test_optimizer_step_may_follow_outside(architecture):
    model, made = warmed(architecture, "adamw-foreach")
    trained = find_residual_blocks(model)[:1]
    before = state_of(model, made)
    with train_only(model, trained):
        backward(model, batch())
    update(model, made)
    assert all(inside(name, trained) for name in moved(before, state_of(model, made)))


@every_architecture
def test_accumulated_micro_batches_leave_the_frozen_part_alone(architecture):
    model, made = warmed(architecture, "adamw-foreach")
    trained = find_residual_blocks(model)[2:3]
    before = state_of(model, made)
    for micro in range(4):
        with train_only(model, trained):
            backward(model, batch(2, seed=micro), share=0.25)
    update(model, made)
    changed = moved(before, state_of(model, made))
    assert all(inside(name, trained) for name in changed)
    assert parameter_names(model, trained) <= changed


@pytest.mark.parametrize("architecture", WITHOUT_BATCH_NORM)
def test_four_micro_batches_equal_one_batch_of_four_times_the_size(architecture):
    whole, parts = build(architecture).double(), build(architecture).double()
    data = batch(8)
    data["pixel_values"] = data["pixel_values"].double()
    with train_only(whole, find_residual_blocks(whole)[1:3]):
        backward(whole, data)
    for micro in range(4):
        with train_only(parts, find_residual_blocks(parts)[1:3]):
            backward(parts, {key: value[2 * micro : 2 * micro + 2] for key, value in data.items()}, share=0.25)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12), name
    assert any(parameter.grad is not None for parameter in whole.parameters())


# What trains


@every_architecture
@pytest.mark.parametrize("indices", [(0,), (3,), (0, 2), (0, 1, 2, 3)])
def test_gradients_and_logits_equal_those_of_a_full_step(architecture, indices):
    model, plain = bitwise(architecture), bitwise(architecture)
    blocks = find_residual_blocks(model)
    trained = [blocks[index] for index in indices]
    expected = backward(plain, batch())
    with train_only(model, trained):
        logits = backward(model, batch())
    # Frozen layers also normalize with batch statistics: the forward is bit-identical to the plain one.
    assert torch.equal(logits, expected)
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        if inside(name, trained):
            assert torch.equal(parameter.grad, reference.grad), name
        else:
            assert parameter.grad is None, name


@every_architecture
def test_train_trunk_trains_all_but_the_other_blocks(architecture):
    model, plain = bitwise(architecture), bitwise(architecture)
    blocks = find_residual_blocks(model)
    backward(plain, batch())
    with train_only(model, blocks[1:2], train_trunk=True, all_blocks=blocks):
        backward(model, batch())
    frozen = [blocks[0], *blocks[2:]]
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        if inside(name, frozen) or reference.grad is None:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, reference.grad), name
    assert all(
        parameter.grad is not None for name, parameter in model.named_parameters() if name.startswith("classifier")
    )


def test_trunk_alone_can_train():
    model = build("vit")
    blocks = find_residual_blocks(model)
    with train_only(model, [], train_trunk=True, all_blocks=blocks):
        backward(model, batch())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if not inside(name, blocks)
    }


@pytest.mark.parametrize("train_trunk", [False, True])
def test_what_the_user_froze_never_thaws(train_trunk):
    model = build("vit")
    blocks = find_residual_blocks(model)
    fixed = [*blocks[0].module.parameters(), next(blocks[1].module.parameters()), *model.vit.embeddings.parameters()]
    for parameter in fixed:
        parameter.requires_grad_(False)
    for _ in range(2):
        with train_only(model, blocks[:3], train_trunk=train_trunk, all_blocks=blocks):
            assert not any(parameter.requires_grad for parameter in fixed)
            backward(model, batch())
        assert not any(parameter.requires_grad for parameter in fixed)
    assert all(parameter.grad is None for parameter in fixed)
    free = {id(parameter) for parameter in model.parameters()} - {id(parameter) for parameter in fixed}
    assert all(parameter.requires_grad for parameter in model.parameters() if id(parameter) in free)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


def tied(shared_with: str) -> tuple[nn.Module, list[ResidualBlock]]:
    """A residual network in which a weight of the first block is also that of another part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block(), Block()), nn.Linear(4, 4))
    other = model[1][1].linear if shared_with == "block" else model[2]
    other.weight = model[1][0].linear.weight
    return model, find_residual_blocks(model, torch.zeros(1, 4))


@pytest.mark.parametrize("shared_with", ["block", "trunk"])
def test_parameter_shared_with_a_block_that_trains_trains(shared_with):
    model, blocks = tied(shared_with)
    with train_only(model, blocks[:1]):
        model(torch.ones(2, 4)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"1.0.linear.weight", "1.0.linear.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parameter_shared_by_frozen_parts_is_frozen_and_comes_back():
    model, blocks = tied("trunk")
    with train_only(model, blocks[1:]):
        model(torch.ones(2, 4)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"1.1.linear.weight", "1.1.linear.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())


# BatchNorm


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("train_trunk", [False, True])
def test_running_statistics_move_only_where_something_trains(train_trunk):
    model, plain = build("resnet"), build("resnet")
    blocks = find_residual_blocks(model)
    trained, frozen = blocks[1:3], [blocks[0], *blocks[3:]]
    before = statistics(model)
    with train_only(model, trained, train_trunk=train_trunk, all_blocks=blocks):
        model.train()  # Trainer's training_step calls it every time.
        model(**batch())
        model.train().train()
        model(**batch(seed=5))
    plain.train()
    plain(**batch())
    plain(**batch(seed=5))
    after, expected = statistics(model), statistics(plain)
    assert {name.rpartition(".")[2] for name in before} == {"running_mean", "running_var", "num_batches_tracked"}
    for name, value in before.items():
        rests = inside(name, frozen) or (not train_trunk and not inside(name, trained))
        assert torch.equal(after[name], value if rests else expected[name]), name
        assert not torch.equal(expected[name], value), name
    # Later plain steps move all of them again.
    model(**batch(seed=6))
    assert all(not torch.equal(after[name], value) for name, value in statistics(model).items())


def test_fused_attention_differs_from_a_full_step_by_no_more_than_rounding():
    model, plain = build("swin"), build("swin")
    trained = find_residual_blocks(model)[:2]
    expected = backward(plain, batch())
    with train_only(model, trained):
        assert torch.allclose(backward(model, batch()), expected, rtol=1e-5, atol=1e-6)
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        if inside(name, trained):
            assert torch.allclose(parameter.grad, reference.grad, rtol=1e-4, atol=1e-6), name


def test_evaluation_inside_uses_the_running_statistics():
    model = build("resnet")
    model.train()
    model(**batch())
    expected = model.eval()(**batch(seed=3)).logits
    with train_only(model, find_residual_blocks(model)[:1]):
        assert torch.equal(model(**batch(seed=3)).logits, expected)


def test_layers_that_the_user_set_apart_stay_so():
    model = build("resnet")
    layers = [
        layer for layer in changing_layers(model.modules()) if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    layers[0].track_running_stats = False
    with train_only(model, find_residual_blocks(model)[:1]):
        backward(model, batch())
    assert [layer.track_running_stats for layer in layers] == [False, *[True] * (len(layers) - 1)]


# Restored


@every_architecture
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored_at_exit(architecture, fails):
    model = build(architecture)
    next(model.parameters()).requires_grad_(False)
    blocks = find_residual_blocks(model)
    before = snapshot(model)
    try:
        with train_only(model, blocks[:2]):
            assert snapshot(model)["requires_grad"] != before["requires_grad"]
            for key in ("keys", "attributes", "hooks", "modes"):
                assert snapshot(model)[key] == before[key], key
            assert [plain_class(module) for module in model.modules()] == before["classes"]
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert snapshot(model) == before


# Errors: each before anything is changed


def test_nothing_to_train_is_an_error():
    model = build("resnet")
    blocks = find_residual_blocks(model)
    blocks[0].module.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(BlockError, match=r"resnet\.encoder\.stages\.0\.layers\.0.*nothing would train"):
        with train_only(model, blocks[:1]):
            pass
    with pytest.raises(BlockError, match="nothing would train"):
        with train_only(model, []):
            pass
    assert snapshot(model) == before


def test_blocks_of_another_model_are_an_error():
    model, other = build("vit"), build("vit")
    before = snapshot(model)
    with pytest.raises(BlockError, match="nothing would train"):
        with train_only(model, find_residual_blocks(other)):
            pass
    assert snapshot(model) == before


def test_train_trunk_needs_all_blocks():
    model = build("vit")
    before = snapshot(model)
    with pytest.raises(BlockError, match="`all_blocks`"):
        with train_only(model, find_residual_blocks(model)[:1], train_trunk=True):
            pass
    assert snapshot(model) == before


def test_trunk_is_every_module_outside_the_blocks():
    model = build("vit")
    blocks = find_residual_blocks(model)
    body, head = ({id(module) for module in part} for part in trunk_modules(model, blocks))
    assert {id(model), id(model.vit.layers), id(model.vit.embeddings)} <= body
    assert head == {id(model.vit.layernorm), id(model.classifier)}
    inside = {id(module) for block in blocks for module in block.module.modules()}
    assert not inside & (body | head)
    assert body | head | inside == {id(module) for module in model.modules()}


def efficientnet() -> EfficientNetForImageClassification:
    """A tiny EfficientNet: BatchNorm inside blocks and trunk."""
    torch.manual_seed(0)
    config = EfficientNetConfig(
        width_coefficient=0.25, depth_coefficient=0.5, image_size=32, hidden_dim=320, num_labels=3, dropout_rate=0.0,
        drop_connect_rate=0.0,
    )  # fmt: skip
    return EfficientNetForImageClassification(config)


@pytest.mark.parametrize("make", [lambda: build("resnet"), efficientnet], ids=["resnet", "efficientnet"])
@pytest.mark.parametrize("policy", ["batch", "inference"])
def test_frozen_batch_norm_uses_the_statistics_asked_for_and_never_moves_them(make, policy):
    model = make()
    blocks = find_residual_blocks(model)
    model.train()(batch()["pixel_values"])
    before = snapshot(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    first = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    seen = []
    handle = first.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with train_only(model, blocks[-1:], frozen_batch_norm=policy):
        model.train()
        model(**batch(seed=5)).loss.backward()
    handle.remove()
    ((taken, given),) = seen
    is_inference = policy == "inference"
    expected = nn.functional.batch_norm(
        taken, first.running_mean.clone(), first.running_var.clone(), first.weight, first.bias,
        training=not is_inference, eps=first.eps,
    )  # fmt: skip
    assert torch.equal(given, expected)
    trained = {f"{blocks[-1].name}.{name}" for name, _ in blocks[-1].module.named_buffers()}
    assert trained
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]) == (name not in trained), name
    assert snapshot(model) == before
    assert all(module.training for module in model.modules())
