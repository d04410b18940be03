"""The scaled step under checkpointing, adapters, autocast, inference and fake tensors; and it leaves no trace."""

import contextlib
import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from sample_checks import assert_same_gradients, gradients
from scaling_reference import drop_path_around
from tiny_architectures import ARCHITECTURES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    StepError,
    StepKind,
    compile_blocks,
    find_residual_blocks,
    skip_blocks,
    trainable_blocks,
)

CASES = {case.name: case for case in ARCHITECTURES}
# Rule around the block: vit, convnext, swin (a tuple). Branch: resnet; BiT, which has no BatchNorm.
BY_BATCH = ["vit", "convnext", "swin", "resnet-basic", "bit-bottleneck"]
BY_SAMPLE = ["vit", "convnext", "swin", "bit-bottleneck"]
STEPS = [(name, "batch") for name in BY_BATCH] + [(name, "sample") for name in BY_SAMPLE]
every_step = pytest.mark.parametrize(("name", "granularity"), STEPS, ids=lambda value: value)
SAMPLES = 4


def build(name: str) -> nn.Module:
    return CASES[name].build()


def loss_of(name: str, model: nn.Module) -> torch.Tensor:
    return model(**CASES[name].labeled(SAMPLES)).loss


def engine(model: nn.Module, granularity: str = "batch", **options: Any) -> FeatureReuse:
    """An engine whose first step drops some blocks and keeps others."""
    blocks = trainable_blocks(model, find_residual_blocks(model))
    schedules = (
        FeatureReuseSchedule(len(blocks), 0.5, "uniform", seed=seed, drop_granularity=granularity) for seed in range(9)
    )
    schedule = next(s for s in schedules if granularity == "sample" or 0 < len(s.plan(0).dropped) < len(blocks))
    return FeatureReuse(model, blocks, schedule, **options)


# Activation checkpointing


class Around(nn.Module):
    """A block without an activation after its addition."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Branch(Around):
    """A block with one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.linear(x))


class CheckpointedNet(nn.Module):
    """Three blocks, of which the training forward checkpoints each from outside, each from inside, or all as one."""

    def __init__(self, kind: type[Around], where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.stage, self.head = nn.Linear(4, 4), nn.Sequential(kind(), kind(), kind()), nn.Linear(4, 2)
        self.where = where
        if where == "inside a block":
            for block in self.stage:
                block.forward = checkpointed(block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        if not self.training or self.where in ("nowhere", "inside a block"):
            x = self.stage(x)
        elif self.where == "around the stage":
            x = checkpoint(self.stage, x, use_reentrant=False)
        else:
            for block in self.stage:
                x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def checkpointed(block: nn.Module) -> Any:
    """The forward of a block under checkpointing, as `GradientCheckpointingLayer` has it."""
    plain = block.forward
    return lambda x: checkpoint(plain, x, use_reentrant=False)


PLACES = ["around a block", "inside a block", "around the stage"]


def net_schedule(granularity: str) -> FeatureReuseSchedule:
    return FeatureReuseSchedule(3, 0.3, "uniform", seed=2, drop_granularity=granularity)


def net_gradients(kind: type[Around], where: str, granularity: str, *, hold: bool = True, scaled: bool = True) -> dict:
    """Gradients of a stochastic-depth step whose backward runs inside it or, without `hold`, after it."""
    model, x = CheckpointedNet(kind, where), torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))
    reuse = FeatureReuse(model, find_residual_blocks(model, x), net_schedule(granularity), scale_kept=scaled)
    with contextlib.ExitStack() as stack:
        plan = stack.enter_context(reuse.step(0, batch_size=SAMPLES))
        assert plan.kind is StepKind.STOCHASTIC_DEPTH
        loss = model(x).square().sum()
        if not hold:
            stack.close()
        loss.backward()
    return gradients(model)


def test_the_step_keeps_all_blocks_or_drops_some():
    """By batch nothing is dropped, so that only the scaling can show; samples drop some."""
    assert net_schedule("batch").plan(0).dropped == ()
    masks = net_schedule("sample").plan(0, batch_size=SAMPLES).sample_masks
    assert masks is not None and masks.any(axis=0).all() and not masks.all(axis=0).any()


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", [Around, Branch])
def test_checkpointing_changes_no_gradient(kind, where, granularity):
    expected = net_gradients(kind, "nowhere", granularity)
    found = net_gradients(kind, where, granularity)
    unscaled = net_gradients(kind, "nowhere", granularity, scaled=False)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert not any(torch.allclose(unscaled[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("where", ["nowhere", *PLACES])
@pytest.mark.parametrize("kind", [Around, Branch])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_backward_after_the_step_was_left_is_an_error(kind, where, granularity):
    with pytest.raises(StepError, match=r"Backward ran after `step\(0\)` was left"):
        net_gradients(kind, where, granularity, hold=False)


def test_leaving_a_scaled_forward_before_backward_shows_where_a_model_checkpoints_its_stages():
    model = build("swin")
    model.activation_checkpointing_enable({"use_reentrant": False})
    blocks = find_residual_blocks(model)
    with skip_blocks([], kept=blocks, survival=[0.5] * len(blocks)):
        loss = loss_of("swin", model)
    with pytest.raises(CheckpointError):
        loss.backward()


def test_leaving_a_scaled_forward_before_backward_changes_nothing_where_a_model_checkpoints_inside_its_blocks():
    """What is scaled is outside of what runs again."""
    found = []
    for hold in (True, False):
        model = build("vit")
        model.activation_checkpointing_enable({"use_reentrant": False})
        blocks = find_residual_blocks(model)
        with skip_blocks([], kept=blocks, survival=[0.5] * len(blocks)):
            loss = loss_of("vit", model)
            if hold:
                loss.backward()
        if not hold:
            loss.backward()
        found.append(gradients(model))
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


# Adapters


LORA = {
    "vit": r".*layers\.\d+\..*(q_proj|v_proj|fc1)",
    # Layers of the residual blocks only: the first layer of the second stage is not one.
    "resnet-basic": r".*stages\.(0\.layers\.[01]|1\.layers\.[12])\.layer\.\d\.convolution",
}


@pytest.mark.parametrize("name", LORA)
def test_adapters_in_blocks_with_a_frozen_trunk(name):
    """Survival probabilities are those given that some block is kept, and only adapters of kept blocks train."""
    model = get_peft_model(build(name).double(), LoraConfig(r=2, target_modules=LORA[name]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    inputs = CASES[name].labeled(SAMPLES)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    reuse = engine(model)
    count, state = len(reuse.blocks), {key: value.clone() for key, value in model.state_dict().items()}
    assert count == len(CASES[name].blocks)
    plan, conditioned = reuse.plan(0), 0.5 / (1 - 0.5**count)
    assert plan.survival == pytest.approx((conditioned,) * count)
    masks = np.zeros((1, count), dtype=bool)
    masks[:, list(plan.dropped)] = True
    with drop_path_around(reuse.blocks, masks, plan.survival, CASES[name].branch):
        expected = model(**inputs)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.load_state_dict(state)
    with reuse.step(0):
        found = model(**inputs)
        found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    found_gradients = gradients(model)
    assert_same_gradients(found_gradients, expected_gradients)
    trained = {key for key, gradient in found_gradients.items() if gradient is not None}
    assert trained and all("lora_" in key for key in trained)
    assert not any(f"{reuse.blocks[index].name}." in key for index in plan.dropped for key in trained)


# Lower precision


@every_step
def test_bf16_autocast_is_finite_and_near_full_precision(name, granularity):
    found = []
    for autocast in (torch.autocast("cpu", dtype=torch.bfloat16), contextlib.nullcontext()):
        model = build(name)
        reuse = engine(model, granularity)
        with reuse.step(0, batch_size=SAMPLES):
            with autocast:
                loss = loss_of(name, model)
            loss.backward()
        norms = {key: gradient.norm() for key, gradient in gradients(model).items() if gradient is not None}
        found.append((loss.detach(), norms))
    (low, low_norms), (full, full_norms) = found
    assert low.isfinite() and all(norm.isfinite() for norm in low_norms.values())
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.05)
    assert low_norms.keys() == full_norms.keys()
    total, full_total = (torch.stack(list(norms.values())).norm() for norms in (low_norms, full_norms))
    torch.testing.assert_close(total, full_total, rtol=0.2, atol=0)


@pytest.mark.parametrize("name", ["vit", "resnet-basic", "swin"])
def test_weights_in_bf16_keep_their_type(name):
    model = build(name).bfloat16()
    inputs = CASES[name].labeled(SAMPLES)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with engine(model).step(0):
        output = model(**inputs)
        output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients(model).values() if gradient is not None} == {torch.bfloat16}


# Inference mode, the meta device and fake tensors


@pytest.mark.parametrize("name", BY_BATCH)
def test_inference_mode_gives_what_no_grad_gives(name):
    model = build(name).eval()
    blocks = find_residual_blocks(model)
    options = {"kept": blocks[1:], "survival": [0.3, 0.7, 0.9, 0.2, 0.6, 0.8][: len(blocks) - 1]}
    with torch.no_grad(), skip_blocks(blocks[:1], **options):
        expected = model(**CASES[name].batch()).logits
    with torch.inference_mode(), skip_blocks(blocks[:1], **options):
        inside = model(**CASES[name].batch()).logits
    with skip_blocks(blocks[:1], **options), torch.inference_mode():
        within = model(**CASES[name].batch()).logits
    assert torch.equal(inside, expected) and torch.equal(within, expected)


def on_fake_tensors(model: nn.Module, name: str) -> None:
    """A step of a copy of the model under FakeTensorMode, which dry runs use."""
    other = copy.deepcopy(model).to("meta")
    reuse = engine(other)
    with FakeTensorMode():
        other._apply(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu"))
        with reuse.step(0):
            loss_of(name, other).backward()
    assert any(type(parameter.grad) is FakeTensor for parameter in other.parameters())


def in_inference_mode(model: nn.Module, name: str) -> None:
    reuse = engine(model)
    with torch.inference_mode(), reuse.step(0):
        loss_of(name, model)


def on_the_meta_device(model: nn.Module, name: str) -> None:
    """A step that is entered where new tensors are made on the meta device."""
    other = copy.deepcopy(model).to("meta")
    with torch.device("meta"), engine(other).step(0):
        assert other(torch.randn(SAMPLES, 3, 32, 32)).logits.is_meta


@pytest.mark.parametrize("elsewhere", [in_inference_mode, on_the_meta_device, on_fake_tensors])
@pytest.mark.parametrize("name", ["vit", "resnet-basic"])
def test_a_step_elsewhere_and_training_do_not_disturb_each_other(name, elsewhere):
    """With the same probabilities: what divides is not kept from one step to the next."""
    model = build(name)
    reuse = engine(model)
    state = copy.deepcopy(model.state_dict())
    found = []
    for other in (None, elsewhere):
        if other is not None:
            other(model, name)
        model.load_state_dict(state)
        with reuse.step(0):
            loss_of(name, model).backward()
        found.append(gradients(model))
    for key, gradient in found[0].items():
        assert (found[1][key] is None) == (gradient is None), key
        assert gradient is None or torch.equal(found[1][key], gradient), key


# Nothing is left behind, and copies are plain


def copies(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every way of copying a model, by name."""
    yield "deepcopy", copy.deepcopy(model)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        yield f"pickle {protocol}", pickle.loads(pickle.dumps(model, protocol))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    yield "torch.save", torch.load(stream, weights_only=False)


def fingerprint(model: nn.Module) -> list[tuple[type, dict[str, int]]]:
    """Class and attributes of each module, by identity."""
    return [(type(module), {key: id(value) for key, value in vars(module).items()}) for module in model.modules()]


@every_step
@pytest.mark.parametrize("fails", [False, True])
def test_a_step_leaves_no_trace(name, granularity, fails):
    model = build(name)
    reuse = engine(model, granularity)
    loss_of(name, model)  # Swin's first forward fits its windows to the input.
    before, marks = tiny_models.snapshot(model), fingerprint(model)
    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext():
        with reuse.step(0, batch_size=SAMPLES):
            inside = tiny_models.snapshot(model)
            loss = loss_of(name, model)
            if fails:
                raise KeyboardInterrupt
            loss.backward()
    assert tiny_models.snapshot(model) == before
    assert fingerprint(model) == marks
    assert inside["classes"] != before["classes"]
    assert all(inside[key] == before[key] for key in ("keys", "requires_grad", "modes", "hooks"))


@every_step
def test_copies_made_inside_a_step_are_plain(name, granularity):
    model = build(name).eval()
    reuse = engine(model, granularity)
    inputs = CASES[name].batch(SAMPLES)
    plain, before = model(**inputs).logits, tiny_models.snapshot(model)
    with reuse.step(0, batch_size=SAMPLES):
        scaled = model(**inputs).logits
        assert not torch.equal(scaled, plain)
        for way, other in copies(model):
            assert tiny_models.snapshot(other) == before, way
            assert torch.equal(other(**inputs).logits, plain), way
        # The original still takes its step.
        assert torch.equal(model(**inputs).logits, scaled)
    assert tiny_models.snapshot(model) == before


@pytest.mark.parametrize("name", ["vit", "resnet-basic"])
def test_copies_made_inside_a_step_with_compiled_blocks_are_plain(name):
    model = build(name).eval()
    reuse = engine(model)
    plain, before = model(**CASES[name].batch()).logits, tiny_models.snapshot(model)
    with compile_blocks(reuse.blocks, backend="eager"), reuse.step(0):
        for way, other in copies(model):
            assert tiny_models.snapshot(other) == before, way
            assert torch.equal(other(**CASES[name].batch()).logits, plain), way


def test_a_copy_of_a_branch_alone_is_plain():
    block = find_residual_blocks(build("resnet-basic"))[0]
    plain, attributes = type(block.branch), set(vars(block.branch))
    with skip_blocks([], kept=[block], survival=[0.5]):
        assert type(block.branch) is not plain
        assert (type(block.branch).__name__, isinstance(block.branch, plain)) == (plain.__name__, True)
        for way, other in (*copies(block.branch), ("copy", copy.copy(block.branch))):
            assert type(other) is plain, way
            assert set(vars(other)) == attributes, way


@pytest.mark.parametrize(("name", "said"), [("vit", r"vit\.layers\.1 is being"), ("resnet-basic", "A Sequential is")])
def test_scaling_twice_is_refused(name, said):
    model = build(name).eval()
    blocks, before = find_residual_blocks(model), tiny_models.snapshot(model)
    with skip_blocks([], kept=blocks[1:2], survival=[0.5]):
        once, inside = model(**CASES[name].batch()).logits, tiny_models.snapshot(model)
        with pytest.raises(StepError, match=rf"{said} .*already\. Leave that context first"):
            with skip_blocks([], kept=blocks[:2], survival=[0.5, 0.5]):
                pass
        # The outer context is whole, and the inner one left nothing.
        assert tiny_models.snapshot(model) == inside
        assert torch.equal(model(**CASES[name].batch()).logits, once)
    assert tiny_models.snapshot(model) == before


@pytest.mark.parametrize("name", ["vit", "resnet-basic"])
def test_scaling_a_block_that_is_dropped_is_refused(name):
    blocks = find_residual_blocks(build(name))
    with skip_blocks([], kept=blocks[:1], survival=[0.5]):
        with pytest.raises(StepError) if name == "vit" else contextlib.nullcontext():
            with skip_blocks(blocks[:1]):
                pass
