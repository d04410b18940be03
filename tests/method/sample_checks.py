"""Drop path by masking, a schedule by sample, and gradients compared: what tests of sets by sample share."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from hf_featreuse import (
    FeatureReuseSchedule,
    ResidualBlock,
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
                found[name], gradient, rtol=1e-4, atol=2e-6 * largest, msg=lambda text, name=name: f"{name}: {text}"
            )


@contextlib.contextmanager
def masked(blocks: list[ResidualBlock], masks: np.ndarray, survival: list[float]) -> Iterator[None]:
    """Drop path as in timm and torchvision: everything is computed, and the branch of some samples masked."""
    handles = []
    for block, mask, probability in zip(blocks, torch.from_numpy(masks).T, survival, strict=True):

        def hook(_module, args, kwargs, output, block=block, mask=mask, probability=probability):
            stream = block.stream(args, kwargs)
            first = output if isinstance(output, torch.Tensor) else output[0]
            keep = (~mask).to(first.dtype).view(-1, *(1,) * (first.ndim - 1)) / probability
            first = stream + (first - stream) * keep
            return first if isinstance(output, torch.Tensor) else (first, *output[1:])

        handles.append(block.module.register_forward_hook(hook, with_kwargs=True))
    yield
    for handle in handles:
        handle.remove()


def sample_schedule(num_blocks: int, **changed) -> FeatureReuseSchedule:
    options = {"drop_rate": 0.5, "drop_rate_schedule": "uniform", "seed": 1, **changed}
    return FeatureReuseSchedule(num_blocks, drop_granularity="sample", **options)
