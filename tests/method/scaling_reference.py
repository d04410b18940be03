"""Scaled stochastic depth written out: drop path around a whole block, with masks that are given."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_featreuse import ResidualBlock


@contextlib.contextmanager
def drop_path_around(
    blocks: Sequence[ResidualBlock], masks: np.ndarray, survival: Sequence[float], branch: str | None = None
) -> Iterator[None]:
    """Compute every block on every sample; its increment counts 1 / survival where it is kept and 0 where dropped.

    Args:
        blocks (`list[ResidualBlock]`): L blocks.
        masks (`numpy.ndarray`): of shape (samples, L), `True` where a sample drops a block.
        survival (`list[float]`): of each block.
        branch (`str`, *optional*): part of each block that gives the summand, for blocks that end in an activation:
            `activation(x + f(x) * factor)`.
    """
    handles = []
    for block, mask, probability in zip(blocks, torch.from_numpy(masks).T, survival, strict=True):
        module = block.module if branch is None else block.module.get_submodule(branch)
        handles.append(module.register_forward_hook(_weighted(block, ~mask, probability, branch), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weighted(block: ResidualBlock, kept: torch.Tensor, probability: float, branch: str | None) -> Callable:
    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        first = output if isinstance(output, torch.Tensor) else output[0]
        factor = kept.to(first.dtype).view(-1, *(1,) * (first.ndim - 1)) / probability
        if branch is not None:
            return output * factor
        stream = block.stream(args, kwargs)
        first = stream + (first - stream) * factor
        return first if isinstance(output, torch.Tensor) else (first, *output[1:])

    return hook
