"""A schedule per sample, and gradients compared: what tests of sets per sample share."""

import torch
from torch import nn

from hf_featreuse import (
    FeatureReuseSchedule,
)


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found: dict, expected: dict) -> None:
    """Equal up to rounding, which in sums of large terms is relative to these."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        if gradient is None or not gradient.any():
            assert found[name] is None or not found[name].any(), name
        else:
            assert found[name] is not None, name
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
            )


def sample_schedule(num_blocks: int, **changed) -> FeatureReuseSchedule:
    options = {"drop_rate": 0.5, "drop_rate_schedule": "uniform", "seed": 1, **changed}
    return FeatureReuseSchedule(num_blocks, **{"stochastic_depth_steps": 1, "drop_granularity": "sample", **options})
