"""Engines over tiny models, and what moved in a step, for tests."""

import pytest
import torch
from tiny_models import ARCHITECTURES, batch
from torch import nn

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    ResidualBlock,
    StepKind,
    find_residual_blocks,
    trainable_blocks,
)

# One step of each kind per cycle, and a set that is never empty in the first cycles.
ALWAYS = {"stochastic_depth_steps": 1, "drop_rate": 0.5, "drop_rate_schedule": "uniform", "seed": 0}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def engine(model: nn.Module, *, scale_kept: bool = False, train_trunk: bool = False, **options) -> FeatureReuse:
    blocks = trainable_blocks(model, find_residual_blocks(model))
    schedule = FeatureReuseSchedule(len(blocks), **{**ALWAYS, **options})
    return FeatureReuse(model, blocks, schedule, scale_kept=scale_kept, train_trunk=train_trunk)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in after.items() if name not in before or not torch.equal(before[name], value)}


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
