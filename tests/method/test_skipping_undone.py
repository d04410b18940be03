"""Skipping leaves no trace: on the model, on its classes, on copies made meanwhile."""

import copy
import io
import pickle

import pytest
import torch
from skipping_checks import every_architecture, run
from tiny_models import batch, build, snapshot
from torch import nn

from hf_featreuse import (
    ResidualBlock,
    find_residual_blocks,
    skip_blocks,
)


@every_architecture
@pytest.mark.parametrize("fails", [False, True])
def test_context_leaves_no_trace(architecture, fails):
    model = build(architecture)
    blocks = find_residual_blocks(model)
    scalable = architecture != "resnet"
    run(model)  # Swin's first forward fits its windows to the input.
    before = snapshot(model)
    classes = [type(module) for module in model.modules()]
    attributes = [{key: id(value) for key, value in vars(module).items()} for module in model.modules()]
    try:
        with skip_blocks(blocks[:2], kept=blocks[2:] if scalable else (), survival=[0.5] * 2 if scalable else ()):
            inside = snapshot(model)
            run(model)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert snapshot(model) == before
    assert all(type(module) is plain for module, plain in zip(model.modules(), classes, strict=True))
    assert [{key: id(value) for key, value in vars(module).items()} for module in model.modules()] == attributes
    for key in ("keys", "requires_grad", "modes", "hooks"):
        assert inside[key] == before[key], key
    assert inside["classes"] != before["classes"]


@every_architecture
def test_class_inside_keeps_its_name_and_is_still_the_plain_class_to_isinstance(architecture):
    model = build(architecture)
    block = find_residual_blocks(model)[0]
    plain, text = type(block.module), repr(model)
    with skip_blocks([block]):
        bound = type(block.module)
        assert bound is not plain
        assert isinstance(block.module, plain)
        assert (bound.__name__, bound.__qualname__, bound.__module__) == (
            plain.__name__,
            plain.__qualname__,
            plain.__module__,
        )
        assert repr(model) == text


def test_subclass_is_made_once_a_class():
    model = build("vit")
    blocks, seen = find_residual_blocks(model), set()
    for _ in range(3):
        with skip_blocks(blocks):
            seen |= {type(block.module) for block in blocks}
    assert len(seen) == 1


def copies(model: nn.Module):
    """Every way of copying a model, by name."""
    yield "deepcopy", copy.deepcopy(model)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        yield f"pickle {protocol}", pickle.loads(pickle.dumps(model, protocol))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    yield "torch.save", torch.load(stream, weights_only=False)


@every_architecture
def test_copies_made_inside_are_plain_and_whole(architecture):
    model = build(architecture).eval()
    blocks = find_residual_blocks(model)
    expected, before = model(**batch()).logits, snapshot(model)
    with skip_blocks(blocks[:3]):
        skipped = model(**batch()).logits
        for way, other in copies(model):
            assert snapshot(other) == before, way
            assert torch.equal(other(**batch()).logits, expected), way
            assert next(other.parameters()) is not next(model.parameters()), way
            found = find_residual_blocks(other)
            assert [block.name for block in found] == [block.name for block in blocks], way
            with skip_blocks(found[:3]):
                assert torch.equal(other(**batch()).logits, skipped), way
        # The original still skips.
        assert torch.equal(model(**batch()).logits, skipped)
    assert snapshot(model) == before


def test_copies_of_scaled_blocks_are_plain():
    model = build("vit").eval()
    blocks, before, expected = find_residual_blocks(model), snapshot(model), model(**batch()).logits
    with skip_blocks([], kept=blocks, survival=[0.5] * 4):
        assert not torch.equal(model(**batch()).logits, expected)
        for way, other in copies(model):
            assert snapshot(other) == before, way
            assert torch.equal(other(**batch()).logits, expected), way


def test_copy_of_a_bound_block_alone_is_plain():
    block = find_residual_blocks(build("vit"))[0]
    plain = type(block.module)
    with skip_blocks([block]):
        for way, other in copies(block.module):
            assert type(other) is plain, way
        assert type(copy.copy(block.module)) is plain


class CopiesItself(nn.Linear):
    """A block with its own `__deepcopy__`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)

    def __deepcopy__(self, memo: dict) -> nn.Module:
        other = type(self)(4, 4)
        other.load_state_dict(self.state_dict())
        return other


def test_deep_copy_of_a_block_s_own_is_used_and_plain():
    module, x = CopiesItself(4, 4), torch.ones(2, 4)
    expected = module(x)
    with skip_blocks([ResidualBlock("block", module)]):
        other = copy.deepcopy(module)
        assert type(other) is CopiesItself
        assert torch.equal(other(x), expected)
        assert torch.equal(module(x), x)
