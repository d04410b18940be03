"""Engines over tiny models, and what moved in a step, for tests."""

import pytest
import torch
from tiny_models import ARCHITECTURES
from torch import nn

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    find_residual_blocks,
    trainable_blocks,
)

# A set that is never empty in the first cycles.
ALWAYS = {"drop_rate": 0.5, "drop_rate_schedule": "uniform", "seed": 0}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def engine(model: nn.Module, *, scale_kept: bool = False, train_trunk: bool = False, **options) -> FeatureReuse:
    blocks = trainable_blocks(model, find_residual_blocks(model))
    schedule = FeatureReuseSchedule(len(blocks), **{**ALWAYS, **options})
    return FeatureReuse(model, blocks, schedule, scale_kept=scale_kept, train_trunk=train_trunk)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in after.items() if name not in before or not torch.equal(before[name], value)}
