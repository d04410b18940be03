"""Skipped blocks are as if removed, kept ones may be scaled, and misuse is refused."""

import dataclasses

import pytest
import torch
from skipping_checks import chosen, every_architecture, gradients, run, same, without
from tiny_models import NUM_LABELS, batch, build, snapshot
from torch import nn
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification

from hf_featreuse import (
    BlockError,
    ConfigurationError,
    ResidualBlock,
    StepError,
    find_residual_blocks,
    skip_blocks,
)
from hf_featreuse.method.skipping import check_exact, check_scalable

# Every architecture has at least four blocks; -1 is the last one.
DROPPED = [(0,), (1,), (-1,), (0, 2), (1, 2, -1), "all"]


def inexact_model() -> PreTrainedModel:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[2], layer_type="basic", hidden_act="gelu", num_labels=NUM_LABELS
    )
    return ResNetForImageClassification(config)


# Skipping equals removing


@every_architecture
@pytest.mark.parametrize("indices", DROPPED)
def test_skipping_equals_removing_logits_gradients_and_statistics(architecture, indices):
    model = build(architecture)
    blocks = find_residual_blocks(model)
    dropped = chosen(blocks, indices)
    reference = without(model, dropped)
    with skip_blocks(dropped):
        logits = run(model)
    assert torch.equal(logits, run(reference))
    expected = gradients(reference)
    assert len(expected) < len(gradients(model))
    in_dropped = tuple(f"{block.name}." for block in dropped)
    for name, gradient in gradients(model).items():
        if name.startswith(in_dropped):
            assert gradient is None, name
        else:
            assert same(gradient, expected[name]), name
            assert gradient is not None or "mask_token" in name, name
    statistics = dict(model.named_buffers())
    assert all(torch.equal(statistics[name], buffer) for name, buffer in reference.named_buffers())


@every_architecture
def test_every_single_block_does_something_so_that_skipping_shows(architecture):
    model = build(architecture).eval()
    plain = model(**batch()).logits
    for block in find_residual_blocks(model):
        with skip_blocks([block]):
            assert not torch.allclose(model(**batch()).logits, plain, atol=1e-4), block.name


@every_architecture
def test_skipping_nothing_is_a_plain_step(architecture):
    model, plain = build(architecture), build(architecture)
    with skip_blocks([]):
        logits = run(model)
    assert torch.equal(logits, run(plain))
    assert all(map(same, gradients(model).values(), gradients(plain).values()))


@every_architecture
def test_evaluation_after_skipping_uses_the_whole_network(architecture):
    model = build(architecture).eval()
    plain = model(**batch()).logits
    with skip_blocks(find_residual_blocks(model)):
        model(**batch())
    assert torch.equal(model(**batch()).logits, plain)


@every_architecture
def test_dropped_block_and_its_hooks_never_run(architecture):
    model = build(architecture)
    blocks = find_residual_blocks(model)
    dropped, calls = blocks[1:3], []

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a dropped block was computed")

    for block in blocks:
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
            register = getattr(block.module, f"register_{kind}_hook")
            register(lambda *_, name=block.name, kind=kind: calls.append((name, kind)) or None)
    for block in dropped:
        block.module.forward = forbidden
        for module in list(block.module.modules())[1:]:
            module.register_forward_pre_hook(forbidden)
    with skip_blocks(dropped):
        run(model)
    called = {name for name, _ in calls}
    assert called == {block.name for block in blocks} - {block.name for block in dropped}
    assert {kind for _, kind in calls} == {"forward", "forward_pre", "full_backward", "full_backward_pre"}
    with pytest.raises(AssertionError, match="a dropped block was computed"):
        run(model)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, scale: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        return stream + self.linear(stream) * scale, None, scale


class Custom(nn.Module):
    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.by_keyword = by_keyword
        self.stem = nn.Linear(4, 4)
        self.body = nn.ModuleList([Branch(), Branch()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, scale = self.stem(x), torch.ones(())
        for block in self.body:
            x = (block(scale, stream=x) if self.by_keyword else block(scale, x))[0]
        return x


@pytest.mark.parametrize("by_keyword", [False, True])
def test_stream_may_be_another_argument_or_a_keyword(by_keyword):
    model, x = Custom(by_keyword), torch.randn(2, 4)
    with skip_blocks(find_residual_blocks(model, x)):
        assert torch.equal(model(x), model.stem(x))
        scale = torch.ones(())
        # An argument that is handed on still is.
        assert model.body[0](scale, stream=x)[1:] == (None, scale)


# Scaling


@pytest.mark.parametrize("architecture", ["vit", "convnext", "swin"])
def test_kept_increments_are_divided_by_their_survival_probability(architecture):
    model = build(architecture)
    blocks = find_residual_blocks(model)
    dropped, kept, survival = [blocks[1]], [blocks[0], blocks[2], blocks[3]], [0.9, 0.5, 0.25]
    reference = without(model, dropped)
    for block, probability in zip(kept, survival, strict=True):

        def scale(_module, args, output, probability=probability):
            first = output if isinstance(output, torch.Tensor) else output[0]
            scaled = args[0] + (first - args[0]) / probability
            return scaled if isinstance(output, torch.Tensor) else (scaled, *output[1:])

        reference.get_submodule(block.name).register_forward_hook(scale)
    with skip_blocks(dropped, kept=kept, survival=survival):
        logits = run(model)
    assert torch.equal(logits, run(reference))
    expected = gradients(reference)
    for name, gradient in gradients(model).items():
        assert gradient is None if name.startswith(f"{blocks[1].name}.") else same(gradient, expected[name]), name


def test_scaling_multiplies_branch_and_its_gradient_and_not_the_shortcut():
    model, x = Custom(False).double(), torch.randn(2, 4, dtype=torch.double)
    blocks = find_residual_blocks(model, x)
    stream = model.stem(x)
    branch = model.body[0].linear(stream)
    with skip_blocks(blocks[1:], kept=blocks[:1], survival=[0.25]):
        output = model(x)
    assert torch.allclose(output, stream + 4 * branch, rtol=1e-12)
    weight = model.body[0].linear.weight
    (found,) = torch.autograd.grad(output.sum(), weight, retain_graph=True)
    (expected,) = torch.autograd.grad(branch.sum(), weight, retain_graph=True)
    assert torch.allclose(found, 4 * expected, rtol=1e-12)


def test_scaled_step_equals_the_plain_one_in_expectation():
    """The mean over all sets D, weighted by probability, of a one-block output is the plain output."""
    model, x = Custom(False).double(), torch.randn(2, 4, dtype=torch.double)
    first, second = find_residual_blocks(model, x)
    with skip_blocks([second]):
        plain = model(x)
        with skip_blocks([first]):
            without_first = model(x)
        with skip_blocks([], kept=[first], survival=[0.3]):
            with_first = model(x)
    assert torch.allclose(0.7 * without_first + 0.3 * with_first, plain, rtol=1e-12)


def test_survival_of_one_changes_nothing():
    model, plain = build("vit"), build("vit")
    blocks = find_residual_blocks(model)
    classes = [type(block.module) for block in blocks]
    with skip_blocks([], kept=blocks, survival=[1.0] * 4):
        assert [type(block.module) for block in blocks] == classes
        logits = run(model)
    assert torch.equal(logits, run(plain))


def test_scaled_output_has_the_type_of_the_block_s_own():
    class Halved(nn.Linear):
        """Casts its output, as blocks do whose residual stream is kept in half precision."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + super().forward(x)).bfloat16()

    module = Halved(4, 4)
    with skip_blocks([], kept=[ResidualBlock("block", module)], survival=[0.7]):
        assert module(torch.ones(2, 4)).dtype == torch.bfloat16


# Errors: each before anything is changed


def test_inexact_blocks_are_refused():
    model = inexact_model()
    blocks, before = find_residual_blocks(model), snapshot(model)
    with pytest.raises(BlockError, match=r"resnet\.encoder\.stages\.0\.layers\.1 .*Gelu follows the addition"):
        with skip_blocks(blocks[1:]):
            pass
    assert snapshot(model) == before
    with pytest.raises(BlockError, match=r"\(2 of 2 blocks\)"):
        check_exact(blocks)


def without_branch(block: ResidualBlock) -> ResidualBlock:
    """The block as if no module inside it returned just what is added."""
    return dataclasses.replace(block, branch=None)


def test_blocks_with_an_activation_and_no_branch_cannot_be_scaled():
    model = build("resnet")
    blocks, before = [without_branch(block) for block in find_residual_blocks(model)], snapshot(model)
    with pytest.raises(ConfigurationError, match=rf"{blocks[1].name} .*: Relu follows its addition, and no module"):
        with skip_blocks(blocks[:1], kept=blocks[1:2], survival=[0.5]):
            raise AssertionError("entered")
    assert snapshot(model) == before
    with pytest.raises(ConfigurationError, match=r"`scale_kept=True` cannot scale .*Set `scale_kept=False`"):
        check_scalable(blocks)
    # Nothing is divided: no branch is needed.
    with skip_blocks(blocks[:1], kept=blocks[1:2], survival=[1.0]):
        run(model)


def test_block_in_both_lists_is_refused():
    blocks = find_residual_blocks(build("vit"))
    with pytest.raises(BlockError, match=r"vit\.layers\.1 is in `dropped` and in `kept`"):
        with skip_blocks(blocks[:2], kept=blocks[1:], survival=[0.5] * 3):
            pass


@pytest.mark.parametrize(
    ("survival", "message"),
    [
        (None, "`survival` has 0 entries for 2 blocks"),
        ([0.5], "`survival` has 1 entries for 2 blocks"),
        ([0.5] * 3, "`survival` has 3 entries for 2 blocks"),
        ([0.5, 0.0], "`survival` contains 0.0"),
        ([-0.1, 0.5], "`survival` contains -0.1"),
        ([0.5, 1.5], "`survival` contains 1.5"),
        ([0.5, float("nan")], "`survival` contains nan"),
    ],
)
def test_survival_must_fit_the_kept_blocks(survival, message):
    model = build("vit")
    blocks, before = find_residual_blocks(model), snapshot(model)
    with pytest.raises(ConfigurationError, match=message):
        with skip_blocks(blocks[2:], kept=blocks[:2], survival=survival):
            pass
    assert snapshot(model) == before


@pytest.mark.parametrize("again", ["dropped", "kept", "twice"])
def test_block_that_is_skipped_already_is_refused(again):
    model = build("vit")
    blocks, before = find_residual_blocks(model), snapshot(model)
    with skip_blocks(blocks[1:2]):
        inside = [type(block.module) for block in blocks]
        with pytest.raises(StepError, match=r"vit\.layers\.\d is being skipped or scaled already"):
            if again == "dropped":
                with skip_blocks(blocks[:2]):
                    pass
            elif again == "kept":
                with skip_blocks(blocks[:1], kept=blocks[1:2], survival=[0.5]):
                    pass
            else:
                with skip_blocks([blocks[0], blocks[0]]):
                    pass
        # The outer context is whole and the inner one left nothing.
        assert [type(block.module) for block in blocks] == inside
    assert snapshot(model) == before


def test_contexts_over_different_blocks_nest():
    model = build("vit")
    blocks, before = find_residual_blocks(model), snapshot(model)
    reference = without(model, blocks[:2])
    with skip_blocks(blocks[:1]), skip_blocks(blocks[1:2]):
        logits = run(model)
    assert torch.equal(logits, run(reference))
    assert snapshot(model) == before


def test_a_block_that_changes_its_input_in_place_is_not_scaled():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return x.add_(self.linear(x.clone()))

    layers = nn.ModuleList([InPlace()])
    block = ResidualBlock(name="0", module=layers[0])
    with skip_blocks([], kept=[block], survival=[0.5]), pytest.raises(BlockError, match="in place"):
        layers[0](torch.ones(1, 4))
