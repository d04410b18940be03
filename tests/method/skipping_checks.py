"""Runs with blocks skipped and with blocks removed, for tests that compare them."""

import copy

import pytest
import torch
from tiny_models import ARCHITECTURES, batch
from torch import nn

from hf_featreuse import (
    ResidualBlock,
)

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


class Shortcut(nn.Module):
    """What is left of a block that was cut out: its input, in the form that the block returns."""

    def __init__(self, num_outputs: int | None) -> None:
        super().__init__()
        self.num_outputs = num_outputs

    def forward(self, x: torch.Tensor, *_: object, **__: object) -> object:
        return x if self.num_outputs is None else (x, *(None,) * (self.num_outputs - 1))


def chosen(blocks: list[ResidualBlock], indices: object) -> list[ResidualBlock]:
    return list(blocks) if indices == "all" else [blocks[index] for index in indices]


def without(model: nn.Module, blocks: list[ResidualBlock]) -> nn.Module:
    """A copy of the model from which the blocks were cut out."""
    model = copy.deepcopy(model)
    for block in blocks:
        parent, _, child = block.name.rpartition(".")
        setattr(model.get_submodule(parent), child, Shortcut(block.num_outputs))
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def run(model: nn.Module) -> torch.Tensor:
    """Forward and backward in training mode; the logits."""
    output = model.train()(**batch())
    output.loss.backward()
    return output.logits


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
