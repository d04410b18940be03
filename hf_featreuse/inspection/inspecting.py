"""Inspect a model before training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_featreuse.errors import BlockError, FeatureReuseError
from hf_featreuse.inspection.expectation import expected_costs, step_shares
from hf_featreuse.inspection.named_models import Inputs, open_model, real_model
from hf_featreuse.inspection.others import not_skippable
from hf_featreuse.inspection.report import BlockReport, ModelReport
from hf_featreuse.inspection.timing import Timing, time_steps
from hf_featreuse.method.blocks import ResidualBlock, check_outputs, find_and_choose, trainable_blocks
from hf_featreuse.method.cost import StepCosts, measure_step_costs
from hf_featreuse.method.freezing import own_parameters, trunk_modules
from hf_featreuse.method.schedule import (
    DropRateSchedule,
    FeatureReuseSchedule,
    StepKind,
    StepPlan,
    TrainTrunk,
    check_options,
    trunk_option,
)
from hf_featreuse.text import first_sentence


def inspect_model(
    model_or_name: nn.Module | str | os.PathLike[str],
    *,
    inputs: Inputs | None = None,
    target_blocks: str | Sequence[str] | None = None,
    drop_rate: float = 0.5,
    drop_rate_schedule: DropRateSchedule = "linear",
    stochastic_depth_steps: int = 3,
    masked_freeze_steps: int = 1,
    vanilla_steps: int = 0,
    train_trunk: TrainTrunk | bool = "all",
    timing: Timing | None = None,
) -> ModelReport:
    """Report a model's residual blocks, the expected cost of each kind of step, and what cannot be skipped.

    A named model is built from only its configuration, on the meta device, or on the CPU with random weights if its
    forward fails there. A module is inspected on its own device and does not change, including its gradients.

    Args:
        model_or_name (`torch.nn.Module`, `str` or `os.PathLike`): a model; or an image-classification checkpoint, as a
            local folder or Hub id, of which only `config.json` is read; or a model type, such as `"vit"`, for
            transformers' default configuration of it.
        inputs (`dict[str, torch.Tensor]` or `torch.Tensor`, *optional*): a small batch for the model's forward. By
            default a batch of one is made from `model.config`.
        target_blocks (`str` or `list[str]`, *optional*): keep only these blocks, as in [`find_residual_blocks`].
        drop_rate (`float`, defaults to 0.5): as in [`FeatureReuseSchedule`].
        drop_rate_schedule (`"linear"` or `"uniform"`, defaults to `"linear"`): as in [`FeatureReuseSchedule`].
        stochastic_depth_steps (`int`, defaults to 3): optimizer steps of the first kind in a cycle.
        masked_freeze_steps (`int`, defaults to 1): optimizer steps of the second kind in a cycle.
        vanilla_steps (`int`, defaults to 0): plain optimizer steps at the start of each cycle.
        train_trunk (`"all"`, `"head"` or `"none"`, defaults to `"all"`): what outside the blocks trains in
            masked-freeze steps.
        timing (`Timing`, *optional*): also time each block and predict the time of each kind of step. For this, a
            named model is built on the device with random weights. By default nothing is timed.

    Returns:
        `ModelReport`: print it for a table; `report.to_dict()` for JSON.

    Raises:
        ConfigurationError: an option is out of range, or the name is not a model that transformers can build as an
            image classifier.
        BlockError: the model has no residual block, none of its blocks trains, a target matches none, or no batch can
            be made for it.

    Example:
        >>> from hf_featreuse import inspect_model
        >>> report = inspect_model("vit", drop_rate=0.5, drop_rate_schedule="uniform")
        >>> {kind: round(cost, 2) for kind, cost in report.costs.items()}
        {'vanilla': 1.0, 'stochastic_depth': 0.5, 'masked_freeze': 0.84, 'mean': 0.59}
    """
    cycle: dict[str, Any] = {
        "drop_rate": drop_rate,
        "drop_rate_schedule": drop_rate_schedule,
        "stochastic_depth_steps": stochastic_depth_steps,
        "masked_freeze_steps": masked_freeze_steps,
        "vanilla_steps": vanilla_steps,
    }
    check_options(**cycle)
    train_trunk = trunk_option(train_trunk)
    notes: list[str] = []
    if isinstance(model_or_name, nn.Module):
        model = model_or_name
        found, blocks = find_and_choose(model, inputs, target_blocks)
    else:
        model, inputs, found, blocks = open_model(os.fspath(model_or_name), inputs, target_blocks, notes)
    blocks = trainable_blocks(model, blocks)
    schedule = FeatureReuseSchedule(len(blocks), **cycle)
    cycle["stochastic_depth_steps"] = schedule.stochastic_depth_steps  # 1 if there is no other kind of step.
    step_costs = _step_costs(model, blocks, inputs, train_trunk, notes)
    times = None
    if timing is not None:
        times = _step_times(model_or_name, model, blocks, inputs, target_blocks, timing, train_trunk)
    _note_refused(blocks, notes)
    # If the user froze the whole trunk, a cycle that drops every block would train nothing: it is vanilla.
    trunk_trains = any(p.requires_grad for part in trunk_modules(model, blocks) for p in own_parameters(part))
    parameters = _count(model)
    return ModelReport(
        model=type(model).__name__ if isinstance(model_or_name, nn.Module) else os.fspath(model_or_name),
        architecture=type(model).__name__,
        parameters=parameters,
        blocks=_block_reports(blocks, schedule, step_costs, times, parameters),
        costs={} if step_costs is None else expected_costs(step_costs, schedule, trunk_trains),
        times={} if times is None else expected_costs(times, schedule, trunk_trains),
        step_seconds=None if times is None else times.vanilla / 1e9,
        step_shares=step_shares(schedule, trunk_trains),
        not_skippable=not_skippable(model, inputs, found, blocks),
        options={**cycle, "train_trunk": train_trunk, **({} if timing is None else {"timing": str(timing)})},
        notes=notes,
    )


def _block_reports(
    blocks: Sequence[ResidualBlock],
    schedule: FeatureReuseSchedule,
    step_costs: StepCosts | None,
    times: StepCosts | None,
    parameters: int,
) -> list[BlockReport]:
    """Return the report of each block; `parameters` is the number of parameters of the whole model."""
    reports = []
    for index, block in enumerate(blocks):
        count = _count(block.module)
        reports.append(
            BlockReport(
                index=index,
                name=block.name,
                class_name=type(block.module).__name__,
                parameters=count,
                share_of_parameters=count / parameters,
                share_of_arithmetic=_saved(step_costs, index),
                share_of_time=_saved(times, index),
                survival_probability=1 - schedule.rates[index],
                exact=block.exact,
            )
        )
    return reports


def _saved(costs: StepCosts | None, index: int) -> float | None:
    """Return the share of a vanilla step that skipping one block saves."""
    return None if costs is None else 1 - costs.share(StepPlan(StepKind.STOCHASTIC_DEPTH, (index,)))


def _step_times(
    model_or_name: nn.Module | str | os.PathLike[str],
    model: nn.Module,
    blocks: Sequence[ResidualBlock],
    inputs: Inputs | None,
    target_blocks: str | Sequence[str] | None,
    timing: Timing,
    train_trunk: TrainTrunk,
) -> StepCosts:
    """Return the measured times; a named model, which has no weights so far, is built again on the device."""
    if not isinstance(model_or_name, nn.Module):
        model = real_model(os.fspath(model_or_name), timing.device)
        blocks = trainable_blocks(model, find_and_choose(model, inputs, target_blocks)[1])
    return time_steps(model, blocks, inputs, timing, train_trunk)


def _note_refused(blocks: Sequence[ResidualBlock], notes: list[str]) -> None:
    """Note what training will refuse."""
    try:
        check_outputs(blocks)
    except BlockError as error:
        notes.append(str(error))
    inexact = [block for block in blocks if not block.exact]
    if inexact:
        notes.append(
            f"{len(inexact)} of {len(blocks)} blocks cannot be skipped exactly: {inexact[0].inexact}. "
            "Training refuses them unless you leave them out with `target_blocks` or set `allow_inexact_skip=True`."
        )


def _step_costs(
    model: nn.Module, blocks: Sequence[ResidualBlock], inputs: Inputs | None, train_trunk: TrainTrunk, notes: list[str]
) -> StepCosts | None:
    """Return the measured costs; `None` and a note if the count fails, so that the blocks are reported anyway."""
    try:
        return measure_step_costs(model, blocks, inputs, train_trunk=train_trunk)
    except FeatureReuseError:
        raise
    except Exception as error:
        notes.append(f"The arithmetic could not be counted: {type(error).__name__}: {first_sentence(error)}")
        return None


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
