"""Skipping under activation checkpointing, of layers and of whole stages."""

import pytest
import torch
from skipping_checks import chosen, gradients, run, same
from tiny_models import batch, build
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from hf_featreuse import (
    find_residual_blocks,
    skip_blocks,
)


# ConvNeXt and ResNet of transformers have no activation checkpointing.
@pytest.mark.parametrize("architecture", ["vit", "swin"])
@pytest.mark.parametrize("indices", [(0,), (1, 2), "all"])
def test_checkpointing_gives_the_same_gradients(architecture, indices):
    model, checkpointed = build(architecture), build(architecture)
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    for each in (model, checkpointed):
        with skip_blocks(chosen(find_residual_blocks(each), indices)):
            run(each)
    assert all(map(same, gradients(checkpointed).values(), gradients(model).values()))


@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_checkpointing_gives_the_same_gradients_with_scaling(architecture):
    model, checkpointed = build(architecture), build(architecture)
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    for each in (model, checkpointed):
        blocks = find_residual_blocks(each)
        with skip_blocks(blocks[:1], kept=blocks[1:], survival=[0.5] * 3):
            run(each)
    assert all(map(same, gradients(checkpointed).values(), gradients(model).values()))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class CheckpointedStage(nn.Module):
    """Checkpointing around a whole stage: the forward of every block of it runs again in backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 4)
        self.stage = nn.Sequential(Block(), Block(), Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.stage, self.stem(x), use_reentrant=False) if self.training else self.stage(self.stem(x))


def stage_gradients(hold: bool, dropped: slice) -> list[torch.Tensor | None]:
    model, x = CheckpointedStage().train(), torch.ones(2, 4)
    blocks = find_residual_blocks(model, x)
    assert [block.name for block in blocks] == ["stage.0", "stage.1", "stage.2"]
    with skip_blocks(blocks[dropped]):
        loss = model(x).square().sum()
        if hold:
            loss.backward()
    if not hold:
        loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("dropped", [slice(0, 1), slice(1, 2), slice(1, 3)])
def test_context_held_through_backward_is_right_under_stage_checkpointing(dropped):
    model, x = CheckpointedStage().eval(), torch.ones(2, 4)
    with skip_blocks(find_residual_blocks(model, x)[dropped]):
        model(x).square().sum().backward()
    assert all(map(same, stage_gradients(True, dropped), [parameter.grad for parameter in model.parameters()]))


# Recomputation ends with the last tensor it needs, so blocks dropped at the end of a stage would not show.
@pytest.mark.parametrize("dropped", [slice(0, 1), slice(1, 2), slice(0, 2)])
def test_leaving_the_context_before_backward_shows_under_stage_checkpointing(dropped):
    """Why the context must hold through backward: the recomputation would run what was skipped."""
    try:
        early = stage_gradients(False, dropped)
    except CheckpointError:
        return
    assert not all(map(same, early, stage_gradients(True, dropped)))


@pytest.mark.parametrize("indices", [(0,), (1, 2), "all"])
def test_leaving_the_context_before_backward_shows_where_a_model_checkpoints_its_stages(indices):
    """Swin does; ViT checkpoints inside each block, so that a dropped block is not computed again there."""
    model = build("swin").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with skip_blocks(chosen(find_residual_blocks(model), indices)):
        loss = model(**batch()).loss
    with pytest.raises(CheckpointError):
        loss.backward()
