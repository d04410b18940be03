"""Measure what each residual block does to the features, one batch at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hf_featreuse.analysis.similarity import SMALLEST_BATCH, centered_gram, cka, unbiased_hsic
from hf_featreuse.method.blocks import ResidualBlock


class FeatureMeter:
    """Gathers residual ratios, cosine similarities and HSIC of blocks over batches.

    During a batch it keeps one Gram matrix per block and the input of the running block. The features of a sample are
    the block's whole output for it, flattened.

    Args:
        blocks (`list[ResidualBlock]`): the blocks of one model, in forward order.
    """

    def __init__(self, blocks: Sequence[ResidualBlock]) -> None:
        self._blocks = blocks
        self._ratios, self._cosines, self._counts = ([0.0] * len(blocks) for _ in range(3))
        self._hsic = torch.zeros(len(blocks), len(blocks), dtype=torch.float64)
        self.not_batch_first: set[int] = set()
        self.num_cka_samples = 0

    @contextlib.contextmanager
    def measuring(self, num_samples: int) -> Iterator[None]:
        """Measure one forward of the model, of this many samples, inside the context."""
        inputs: dict[int, torch.Tensor] = {}
        grams: dict[int, torch.Tensor] = {}
        handles = []
        try:
            for index, block in enumerate(self._blocks):
                enter, leave = self._hooks(index, num_samples, inputs, grams)
                handles.append(block.module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(block.module.register_forward_hook(leave))
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._add_hsic(grams, num_samples)

    def residual_ratio(self, index: int) -> float | None:
        """Return the mean over samples of |f(x)| / |x|."""
        return self._mean(self._ratios, index)

    def cosine_similarity(self, index: int) -> float | None:
        """Return the mean over samples of the cosine of the angle between x and the block's output."""
        return self._mean(self._cosines, index)

    def cka(self) -> list[list[float | None]]:
        """Return linear CKA between the outputs of all pairs of blocks, `None` where it is not defined."""
        return [[finite(value) for value in row] for row in cka(self._hsic).tolist()]

    def _hooks(
        self, index: int, num_samples: int, inputs: dict[int, torch.Tensor], grams: dict[int, torch.Tensor]
    ) -> tuple[Any, Any]:
        block = self._blocks[index]

        def enter(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            # A copy: a block may add to its input in place.
            inputs[index] = block.stream(args, kwargs).detach().clone()

        def leave(_module: nn.Module, _args: tuple, output: Any) -> None:
            before, after = inputs.pop(index), (output if isinstance(output, torch.Tensor) else output[0]).detach()
            if not block.has_batch_first or len(after) != num_samples:
                self.not_batch_first.add(index)
                return
            before, after = before.flatten(1).float(), after.flatten(1).float()
            norms = before.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
            self._ratios[index] += ((after - before).norm(dim=1) / norms).double().sum().item()
            self._cosines[index] += nn.functional.cosine_similarity(before, after).double().sum().item()
            self._counts[index] += num_samples
            if num_samples >= SMALLEST_BATCH:
                grams[index] = centered_gram(after)

        return enter, leave

    def _add_hsic(self, grams: dict[int, torch.Tensor], num_samples: int) -> None:
        """Add a batch to the mean of the estimates, weighted by its samples; the weight cancels out in CKA."""
        if grams:
            there = sorted(grams)
            estimate = unbiased_hsic(torch.stack([grams[index] for index in there]))
            self._hsic[torch.tensor(there)[:, None], torch.tensor(there)] += num_samples * estimate
            self.num_cka_samples += num_samples

    def _mean(self, sums: Sequence[float], index: int) -> float | None:
        return finite(sums[index] / self._counts[index]) if self._counts[index] else None


def finite(value: float) -> float | None:
    """Return the value, or `None` for NaN and infinity, which JSON cannot express."""
    return value if math.isfinite(value) else None
