"""Stop at the start of training if the ranks do not agree.

Ranks with different blocks or schedules would train to the end without a warning, on gradients of different
parameters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.method.feature_reuse import FeatureReuse

_FAILURE = "failure"


def check_ranks_agree(reuse: FeatureReuse, group: dist.ProcessGroup | None = None) -> None:
    """Compare blocks, schedule and seed over all ranks. Every rank must call this, and all raise the same error.

    The ranks exchange a few hundred bytes once; a single process does nothing.

    Args:
        reuse (`FeatureReuse`): of this rank.
        group (`torch.distributed.ProcessGroup`, *optional*): the ranks that train together; by default all.

    Raises:
        ConfigurationError: the ranks differ; raised on every rank, and names what differs.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import FeatureReuse, FeatureReuseSchedule, find_residual_blocks
        >>> from hf_featreuse.distributed import check_ranks_agree
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2))
        >>> blocks = find_residual_blocks(model)
        >>> check_ranks_agree(FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks))))
    """
    if _world_size(group) > 1:
        _compare(_settings(reuse), group)


def tell_ranks_of_failure(error: Exception) -> None:
    """Tell the ranks that wait in [`check_ranks_agree`] that this one failed, so that they stop too."""
    if _world_size() > 1:
        _exchange({_FAILURE: f"{type(error).__name__}: {error}"})


def _world_size(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _exchange(settings: dict[str, Any], group: dist.ProcessGroup | None = None) -> list[dict[str, Any]]:
    """Return the settings of all ranks."""
    gathered: list[Any] = [None] * _world_size(group)
    dist.all_gather_object(gathered, settings, group=group)
    return gathered


def _settings(reuse: FeatureReuse) -> dict[str, Any]:
    """Return what must be the same on all ranks, by its name in the error."""
    schedule = reuse.schedule
    shown = repr(schedule)
    if type(schedule).__repr__ is object.__repr__:
        shown = repr(vars(schedule))
    return {
        "blocks": [block.name for block in reuse.blocks],
        "seed": schedule.seed,
        "class of the schedule": f"{type(schedule).__module__}.{type(schedule).__qualname__}",
        "drop rates": tuple(schedule.rates),
        # Addresses of objects differ between processes that are otherwise the same.
        "schedule": re.sub(r" at 0x[0-9a-f]+", "", shown),
        "options": {
            name: getattr(reuse, name)
            for name in ("scale_kept", "train_trunk", "frozen_batch_norm", "allow_inexact_skip")
        },
    }


def _compare(settings: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raise `ConfigurationError` if the ranks differ or one of them failed."""
    ranks = _exchange(settings, group)
    failed = [f"rank {rank} ({found[_FAILURE]})" for rank, found in enumerate(ranks) if _FAILURE in found]
    if failed:
        raise ConfigurationError(
            f"Training stops on every rank, because it could not start on {', '.join(failed)}. Fix this error, and "
            "start all ranks again."
        )
    different = {name: values for name in settings if _differ(values := [found[name] for found in ranks])}
    if not different:
        return
    found = "; ".join(f"{name}: {_by_rank(values)}" for name, values in different.items())
    raise ConfigurationError(
        f"The ranks do not agree on feature reuse and would train different blocks in the same step. Found {found}. "
        "Start every rank with the same model, options and seed."
    )


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _by_rank(values: Sequence[Any]) -> str:
    """Return each distinct value with the ranks that have it; long ones are shortened."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(repr(value), []).append(rank)
    parts = []
    for value, ranks in groups.items():
        names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
        parts.append(f"{value if len(value) <= 300 else value[:300] + ' ...'} on rank {names}")
    return ", ".join(parts)
