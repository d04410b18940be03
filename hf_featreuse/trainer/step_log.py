"""Losses by kind of step, dropped blocks and share of arithmetic, summed between two logs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_featreuse.method.schedule import StepKind, StepPlan

_KINDS = tuple(StepKind)


class StepLog:
    """Sums since the last log. Losses stay on the device and are synchronized only when a log is drained.

    Args:
        device (`torch.device`): where the losses are.
        skip_non_finite (`bool`, defaults to `False`): replace a NaN or infinite loss by the sum of its kind so far
            divided by the steps of its kind, including this one, as Trainer's `logging_nan_inf_filter`.

    Attributes:
        not_finite (`float`): losses per rank that were NaN or infinite before the last call of `drain`.
    """

    not_finite = 0.0

    def __init__(self, device: torch.device, skip_non_finite: bool = False) -> None:
        self.skip_non_finite = skip_non_finite
        self._losses = torch.zeros(len(_KINDS), device=device)
        self._steps = [0] * len(_KINDS)
        self._dropped, self._share = 0.0, 0.0
        self._global_step: int | None = None
        self._micro_batches = 0
        self._not_finite = torch.zeros((), device=device)
        # Means over the micro-batches of the current step.
        self._open_dropped, self._open_share = 0.0, 0.0

    def add(self, global_step: int, plan: StepPlan, share: float, loss: torch.Tensor) -> None:
        """Count a micro-batch of an optimizer step; its loss is scaled for accumulation, as Trainer returns it."""
        kind = _KINDS.index(plan.kind)
        if global_step != self._global_step:
            self._global_step = global_step
            self._steps[kind] += 1
            self._micro_batches, self._open_dropped, self._open_share = 0, 0.0, 0.0
        self._micro_batches += 1
        more_dropped = (plan.mean_dropped - self._open_dropped) / self._micro_batches
        more_share = (share - self._open_share) / self._micro_batches
        self._open_dropped, self._dropped = self._open_dropped + more_dropped, self._dropped + more_dropped
        self._open_share, self._share = self._open_share + more_share, self._share + more_share
        finite = torch.isfinite(loss)
        self._not_finite += ~finite
        if self.skip_non_finite:
            loss = torch.where(finite, loss, self._losses[kind] / self._steps[kind])
        self._losses[kind] += loss

    def drain(self, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return means since the last call, by name of the log; kinds of step that did not occur are left out.

        Args:
            mean_over_ranks (`Callable`): averages a tensor of shape (4,) over all ranks.
        """
        steps = sum(self._steps)
        if not steps:
            return {}
        *losses, self.not_finite = mean_over_ranks(torch.cat([self._losses, self._not_finite[None]])).tolist()
        logs = {
            f"loss/{kind.value}": loss / count
            for kind, loss, count in zip(_KINDS, losses, self._steps, strict=True)
            if count
        }
        logs["dropped_blocks"] = self._dropped / steps
        logs["compute_share"] = self._share / steps
        # The current step is kept: further micro-batches of it are not a new step.
        self._losses.zero_()
        self._not_finite.zero_()
        self._steps = [0] * len(_KINDS)
        self._dropped, self._share = 0.0, 0.0
        return logs

    def state(self) -> dict[str, list[float]]:
        """Return the sums between two optimizer steps, exactly representable in JSON."""
        return {
            "losses": self._losses.tolist(),
            "steps": list(self._steps),
            "dropped_and_share": [self._dropped, self._share],
            "not_finite": [self._not_finite.item()],
        }

    def restore(self, state: dict[str, list[float]]) -> None:
        """Load sums that `state` returned."""
        self._losses = torch.tensor(state["losses"], device=self._losses.device)
        self._steps = [int(steps) for steps in state["steps"]]
        self._dropped, self._share = state["dropped_and_share"]
        self._not_finite.fill_(state["not_finite"][0])
