"""The results of an inspection, as dataclasses and as a table."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_featreuse.inspection.others import NotSkippable
from hf_featreuse.text import aligned, common_prefix

_TABLE_WIDTH = 100


@dataclass(frozen=True)
class BlockReport:
    """One residual block in a [`ModelReport`].

    Args:
        index (`int`): place in forward order, from 0, as in `StepPlan.dropped`.
        name (`str`): qualified name in the model.
        class_name (`str`): class of the module.
        parameters (`int`): number of parameters.
        share_of_parameters (`float`): share of the model's parameters, from 0 to 1.
        share_of_arithmetic (`float`, *optional*): share of a vanilla step's arithmetic, from 0 to 1, that skipping
            only this block saves in forward and backward. `None` if the arithmetic could not be counted.
        share_of_time (`float`, *optional*): measured share of a vanilla step's forward and backward time; `None` if no
            time was measured.
        survival_probability (`float`): probability, from 0 to 1, that a cycle does not draw the block.
        exact (`bool`): whether skipping the block is bit-identical to a residual branch of zero.

    Example:
        >>> from hf_featreuse import inspect_model
        >>> inspect_model("vit").blocks[11].survival_probability
        0.5
    """

    index: int
    name: str
    class_name: str
    parameters: int
    share_of_parameters: float
    share_of_arithmetic: float | None
    share_of_time: float | None
    survival_probability: float
    exact: bool


@dataclass(frozen=True)
class ModelReport:
    """What feature reuse would do with a model, from [`inspect_model`]. `str(report)` is a table.

    Args:
        model (`str`): the name given, or the class of the module given.
        architecture (`str`): class of the model.
        parameters (`int`): number of parameters.
        blocks (`list[BlockReport]`): the residual blocks in forward order.
        costs (`dict[str, float]`): expected arithmetic of a step as a share of a vanilla step's: `"vanilla"`,
            `"stochastic_depth"`, `"masked_freeze"` and `"mean"` over the steps of the schedule. Exact expectations,
            not samples. Empty if the arithmetic could not be counted.
        times (`dict[str, float]`): the same for the time of forward and backward, from the measured times of the
            blocks. Empty if no time was measured.
        step_seconds (`float`, *optional*): time of forward and backward of a vanilla step, in seconds.
        step_shares (`dict[str, float]`): expected share of the steps that each kind of step takes, from 0 to 1.
        not_skippable (`list[NotSkippable]`): modules in one list with a block, or of the class of a block, that are
            not among the blocks.
        options (`dict[str, Any]`): drop rate, schedule, steps per cycle, `train_trunk`, and how times were measured.
        notes (`list[str]`): further notes to read before training.

    Example:
        >>> from hf_featreuse import inspect_model
        >>> report = inspect_model("resnet", drop_rate=0.2)
        >>> report.architecture, len(report.blocks), report.not_skippable[0].name
        ('ResNetForImageClassification', 12, 'resnet.encoder.stages.0.layers.0')
    """

    model: str
    architecture: str
    parameters: int
    blocks: list[BlockReport]
    costs: dict[str, float]
    times: dict[str, float]
    step_seconds: float | None
    step_shares: dict[str, float]
    not_skippable: list[NotSkippable]
    options: dict[str, Any]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers, for JSON.

        Example:
            >>> from hf_featreuse import inspect_model
            >>> inspect_model("vit").to_dict()["blocks"][0]["name"]
            'vit.layers.0'
        """
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n\n".join(part for part in (_heading(self), _table(self), _summary(self), _others(self)) if part)


# The table


def _heading(report: ModelReport) -> str:
    share = sum(block.share_of_parameters for block in report.blocks)
    classes = {block.class_name for block in report.blocks}
    kind = f" of class {classes.pop()}" if len(classes) == 1 else ""
    name = report.architecture if report.model == report.architecture else f"{report.model}: {report.architecture}"
    counted = "1 residual block" if len(report.blocks) == 1 else f"{len(report.blocks)} residual blocks"
    return f"{name}, {report.parameters:,} parameters\n{counted}{kind}, {share:.1%} of the parameters"


def _table(report: ModelReport) -> str:
    """Return one line per block; if lines are too long, the prefix that all names share moves into the heading."""
    names = [block.name for block in report.blocks]
    lines = aligned(_rows(report, names, "block"))
    prefix = common_prefix(names)
    if len(lines[0]) > _TABLE_WIDTH and prefix:
        lines = aligned(_rows(report, [name.removeprefix(prefix) for name in names], f"block of {prefix[:-1]}"))
    return "\n".join(lines)


def _rows(report: ModelReport, names: Sequence[str], heading: str) -> list[list[str]]:
    same_class = len({block.class_name for block in report.blocks}) == 1
    time = ["% of time"] if report.times else []
    rows = [["#", heading, "class", "parameters", "% of all", "% of arithmetic", *time, "survival", "exact"]]
    for block, name in zip(report.blocks, names, strict=True):
        arithmetic = "?" if block.share_of_arithmetic is None else f"{block.share_of_arithmetic:.1%}"
        rows.append(
            [
                str(block.index),
                name,
                block.class_name,
                f"{block.parameters:,}",
                f"{block.share_of_parameters:.1%}",
                arithmetic,
                *([] if block.share_of_time is None else [f"{block.share_of_time:.1%}"]),
                f"{block.survival_probability:.3f}",
                "yes" if block.exact else "no",
            ]
        )
    return [row[:2] + row[3:] for row in rows] if same_class else rows


def _summary(report: ModelReport) -> str:
    options = report.options
    plain, trunk = options["vanilla_steps"], {"all": "the whole trunk", "head": "the head"}.get(options["train_trunk"])
    lines = [
        f"Schedule: drop rate {options['drop_rate']:g}, {options['drop_rate_schedule']}; cycles of "
        f"{_steps(plain, 'vanilla') + ', ' if plain else ''}"
        f"{_steps(options['stochastic_depth_steps'], 'stochastic-depth')} and "
        f"{_steps(options['masked_freeze_steps'], 'masked-freeze')}"
        f"{f' in which {trunk} trains too' if trunk else ''}. {report.step_shares['vanilla']:.1%} of all steps are "
        f"vanilla: {'those of each cycle, and ' if plain else ''}masked-freeze steps that draw no block."
    ]
    if report.costs:
        lines.append(f"Expected cost, vanilla step = 1: {_expected(report.costs)}.")
    if report.times:
        lines.append(
            f"Expected time, vanilla step = 1: {_expected(report.times)}. Measured on {report.options['timing']}: "
            f"{report.step_seconds:.3g} s for forward and backward of a vanilla step."
        )
    return "\n".join(textwrap.fill(line, _TABLE_WIDTH) for line in lines)


def _expected(costs: dict[str, float]) -> str:
    depth, freeze, mean = (costs[key] for key in ("stochastic_depth", "masked_freeze", "mean"))
    return f"stochastic depth {depth:.3f}, masked freeze {freeze:.3f}, mean {mean:.3f}"


def _steps(count: int, kind: str) -> str:
    return f"{count} {kind} step{'' if count == 1 else 's'}"


def _others(report: ModelReport) -> str:
    """Return the modules that are not blocks, grouped by reason, then the notes."""
    reasons: dict[str, list[str]] = {}
    for other in report.not_skippable:
        reasons.setdefault(f"{other.class_name}, {other.reason}", []).append(other.name)
    indented = {"width": _TABLE_WIDTH, "initial_indent": "    ", "subsequent_indent": "    "}
    lines = ["Not skippable, always run:"] if reasons else []
    for reason, names in reasons.items():
        lines.append(f"  {reason}:")
        lines.append(textwrap.fill(", ".join(names), break_on_hyphens=False, **indented))
    lines += [textwrap.fill(f"Note: {note}", _TABLE_WIDTH) for note in report.notes]
    return "\n".join(lines)
