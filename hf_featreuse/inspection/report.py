"""Report on a model before it trains: its residual blocks, what each kind of step costs, and what cannot be skipped.

No weights are needed: a named model is built from its configuration on the meta device, where a forward does no
arithmetic.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from hf_featreuse.blocks import ResidualBlock, find_residual_blocks, match_targets, trainable_blocks
from hf_featreuse.cost import StepCosts, measure_step_costs
from hf_featreuse.errors import BlockError, ConfigurationError, FeatureReuseError
from hf_featreuse.freezing import own_parameters, trunk_modules
from hf_featreuse.probing import model_device, model_inputs, undisturbed
from hf_featreuse.schedule import DropRateSchedule, FeatureReuseSchedule, StepKind, StepPlan, check_options
from hf_featreuse.small_models.overrides import did_you_mean

_TABLE_WIDTH = 100
Inputs = Mapping[str, Any] | torch.Tensor


@dataclass(frozen=True)
class BlockReport:
    """One residual block in a [`ModelReport`].

    Args:
        index (`int`): place in forward order, from 0; what `StepPlan.dropped` holds.
        name (`str`): qualified name in the model.
        class_name (`str`): class of the module.
        parameters (`int`): number of parameters.
        share_of_parameters (`float`): of the model's parameters, from 0 to 1.
        share_of_arithmetic (`float`, *optional*): of a vanilla step, from 0 to 1: what skipping this block alone
            saves, forward and backward. `None` where the arithmetic could not be counted.
        survival_probability (`float`): probability, from 0 to 1, that a cycle does not draw the block.
        exact (`bool`): whether skipping the block equals a residual branch of zero, to the bit.

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
    survival_probability: float
    exact: bool


@dataclass(frozen=True)
class NotSkippable:
    """A module beside residual blocks, or of the class of one, that steps neither skip nor train alone.

    Args:
        name (`str`): qualified name in the model.
        class_name (`str`): class of the module.
        reason (`str`): why.
    """

    name: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class ModelReport:
    """What feature reuse does with a model, from [`inspect_model`]. `str(report)` is a table.

    Args:
        model (`str`): the name given, or the class of the module given.
        architecture (`str`): class of the model.
        parameters (`int`): number of parameters.
        blocks (`list[BlockReport]`): the residual blocks in forward order.
        costs (`dict[str, float]`): expected arithmetic of a step as a share of a vanilla step's: `"vanilla"`,
            `"stochastic_depth"`, `"masked_freeze"` and `"mean"` over the steps of the schedule. Exact expectations,
            not samples. Empty where the arithmetic could not be counted.
        step_shares (`dict[str, float]`): expected share of the steps that each kind of step takes, from 0 to 1.
        not_skippable (`list[NotSkippable]`): modules in one list with a block, or of the class of a block, that are
            not among the blocks.
        options (`dict[str, Any]`): drop rate, schedule, steps in a cycle and `train_trunk`, as given.
        notes (`list[str]`): what else to know before training.

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
    step_shares: dict[str, float]
    not_skippable: list[NotSkippable]
    options: dict[str, Any]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Give the report as dicts, lists, strings and numbers, for JSON.

        Example:
            >>> from hf_featreuse import inspect_model
            >>> inspect_model("vit").to_dict()["blocks"][0]["name"]
            'vit.layers.0'
        """
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n\n".join(part for part in (_heading(self), _table(self), _summary(self), _others(self)) if part)


def inspect_model(
    model_or_name: nn.Module | str | os.PathLike[str],
    *,
    inputs: Inputs | None = None,
    target_blocks: str | Sequence[str] | None = None,
    drop_rate: float = 0.5,
    drop_rate_schedule: DropRateSchedule = "linear",
    stochastic_depth_steps: int = 1,
    masked_freeze_steps: int = 1,
    train_trunk: bool = False,
) -> ModelReport:
    """Report a model's residual blocks, the expected cost of each kind of step, and what cannot be skipped.

    A named model is built from its configuration alone, on the meta device; where its forward fails there, on the CPU
    with random weights. A module is looked at on its own device and stays as it is, gradients included.

    Args:
        model_or_name (`torch.nn.Module`, `str` or `os.PathLike`): a model; or an image-classification checkpoint, local
            folder or Hub id, of which only `config.json` is read; or a model type, such as `"vit"`, which means
            transformers' default configuration of it.
        inputs (`dict[str, torch.Tensor]` or `torch.Tensor`, *optional*): a small batch as the model's forward takes
            it. By default a batch of one is made from `model.config`.
        target_blocks (`str` or `list[str]`, *optional*): keep only these blocks, as in [`find_residual_blocks`].
        drop_rate (`float`, defaults to 0.5): as in [`FeatureReuseSchedule`].
        drop_rate_schedule (`"linear"` or `"uniform"`, defaults to `"linear"`): as in [`FeatureReuseSchedule`].
        stochastic_depth_steps (`int`, defaults to 1): optimizer steps of the first kind in a cycle.
        masked_freeze_steps (`int`, defaults to 1): optimizer steps of the second kind in a cycle.
        train_trunk (`bool`, defaults to `False`): whether everything outside the blocks trains in masked-freeze steps.

    Returns:
        `ModelReport`: print it for a table; `report.to_dict()` for JSON.

    Raises:
        ConfigurationError: an option is out of range, or the name is no model that transformers can build as an image
            classifier.
        BlockError: the model has no residual block, none of its blocks trains, a target matches none, or no batch for
            it can be made.

    Example:
        >>> from hf_featreuse import inspect_model
        >>> report = inspect_model("vit", drop_rate=0.5, drop_rate_schedule="uniform")
        >>> {kind: round(cost, 2) for kind, cost in report.costs.items()}
        {'vanilla': 1.0, 'stochastic_depth': 0.5, 'masked_freeze': 0.8, 'mean': 0.65}
    """
    check_options(drop_rate, drop_rate_schedule, stochastic_depth_steps, masked_freeze_steps)
    if not isinstance(train_trunk, bool):
        raise ConfigurationError(f"`train_trunk={train_trunk!r}` is not a boolean. Pass True or False.")
    notes: list[str] = []
    if isinstance(model_or_name, nn.Module):
        model = model_or_name
        found = find_residual_blocks(model, inputs)
    else:
        model, inputs, found = _open(os.fspath(model_or_name), inputs, notes)
    blocks = _chosen(model, found, target_blocks)
    schedule = FeatureReuseSchedule(
        len(blocks), drop_rate, drop_rate_schedule, stochastic_depth_steps, masked_freeze_steps
    )
    step_costs = _step_costs(model, blocks, inputs, train_trunk, notes)
    _note_inexact(blocks, notes)
    # Where the user froze the whole trunk, a cycle that drops every block would train nothing: it is vanilla.
    trunk_trains = any(p.requires_grad for p in own_parameters(trunk_modules(model, blocks)))
    step_shares = _step_shares(schedule, trunk_trains)
    parameters = _count(model)
    return ModelReport(
        model=type(model).__name__ if isinstance(model_or_name, nn.Module) else os.fspath(model_or_name),
        architecture=type(model).__name__,
        parameters=parameters,
        blocks=[
            BlockReport(
                index=index,
                name=block.name,
                class_name=type(block.module).__name__,
                parameters=_count(block.module),
                share_of_parameters=_count(block.module) / parameters,
                share_of_arithmetic=None if step_costs is None else 1 - step_costs.share(_skip(index)),
                survival_probability=1 - schedule.rates[index],
                exact=block.exact,
            )
            for index, block in enumerate(blocks)
        ],
        costs={} if step_costs is None else _expected_costs(step_costs, schedule.rates, step_shares, trunk_trains),
        step_shares=step_shares,
        not_skippable=_not_skippable(model, inputs, found, blocks),
        options={
            "drop_rate": drop_rate,
            "drop_rate_schedule": drop_rate_schedule,
            "stochastic_depth_steps": stochastic_depth_steps,
            "masked_freeze_steps": masked_freeze_steps,
            "train_trunk": train_trunk,
        },
        notes=notes,
    )


# The model


def _open(name: str, inputs: Inputs | None, notes: list[str]) -> tuple[nn.Module, Inputs | None, list[ResidualBlock]]:
    """The model of a name, without its weights, its batch on the same device, and its residual blocks."""
    config = _configuration(name)
    model = _build(name, config, "meta")
    on_meta = inputs.to("meta") if isinstance(inputs, torch.Tensor) else inputs
    try:
        return model, on_meta, find_residual_blocks(model, on_meta)
    except BlockError as error:
        if error.__cause__ is None:
            raise
        notes.append("The forward fails on the meta device, so the model was built on the CPU with random weights.")
    model = _build(name, config, "cpu")
    return model, inputs, find_residual_blocks(model, inputs)


def _configuration(name: str) -> PreTrainedConfig:
    """The configuration of a local checkpoint, a model type or a Hub checkpoint, in this order."""
    types = sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    if not (Path(name) / "config.json").is_file():
        if name in types:
            return CONFIG_MAPPING[name]()
        if Path(name).is_dir():
            raise ConfigurationError(
                f"The folder `{name}` has no config.json, so it is no checkpoint. Pass a folder that "
                "`save_pretrained` wrote, a Hub id or a model type."
            )
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if Path(name).is_dir():
            raise ConfigurationError(
                f"transformers cannot read `{Path(name) / 'config.json'}`: {_one_line(error)} Pass a checkpoint of an "
                "image classifier."
            ) from error
        raise ConfigurationError(
            f"`{name}` is no model that can be inspected. It is no local folder; no model type of transformers' image "
            f"classifiers.{did_you_mean(name, types)} The Hugging Face Hub gave no checkpoint of that name: "
            f"{_one_line(error)} Pass a folder with a config.json, a Hub id, or a model type such as `vit`."
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ConfigurationError(
            f"`{name}` is a `{config.model_type}` model, for which transformers has no image classifier. Pass an "
            "image classifier, or build the model yourself and pass it to `hf_featreuse.inspect_model`."
        )
    return config


def _build(name: str, config: PreTrainedConfig, device: str) -> nn.Module:
    """The image classifier of a configuration, without touching torch's random state."""
    config = copy.deepcopy(config)
    if not config.architectures:
        # AutoModel fails on types with several classes, such as DeiT, when the configuration names none.
        classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[config.model_type]
        config.architectures = [classes if isinstance(classes, str) else classes[0]]
    try:
        with torch.random.fork_rng([]), torch.device(device):
            return AutoModelForImageClassification.from_config(config)
    except Exception as error:
        raise ConfigurationError(
            f"transformers cannot build `{name}` from its configuration: {_one_line(error)} Install what it names, or "
            "pass another model."
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _sentence(error: Exception) -> str:
    """The first sentence of an error that goes on at length."""
    return _one_line(error).partition(". ")[0].rstrip(".") + "."


# Blocks and what is none


def _chosen(
    model: nn.Module, found: list[ResidualBlock], target_blocks: str | Sequence[str] | None
) -> list[ResidualBlock]:
    """The blocks that would take part in training."""
    if target_blocks is not None:
        names = match_targets([block.name for block in found], target_blocks, type(model).__name__)
        found = [block for block in found if block.name in names]
    return trainable_blocks(model, found)


def _note_inexact(blocks: Sequence[ResidualBlock], notes: list[str]) -> None:
    inexact = [block for block in blocks if not block.exact]
    if inexact:
        notes.append(
            f"{len(inexact)} of {len(blocks)} blocks cannot be skipped exactly: {inexact[0].activation} follows the "
            "addition and would change the input again. Training refuses them, unless you leave them out with "
            "`target_blocks` or set `allow_inexact_skip=True`."
        )


def _not_skippable(
    model: nn.Module, inputs: Inputs | None, found: Sequence[ResidualBlock], blocks: Sequence[ResidualBlock]
) -> list[NotSkippable]:
    """Modules in one list with a residual block, or of its class, that do not take part, each with the reason."""
    names, taking_part = [block.name for block in found], {block.name for block in blocks}
    lists = {name.rpartition(".")[0] for name in names}
    classes = {type(block.module) for block in found if not type(block.module).__module__.startswith("torch.")}
    others = {
        name: module
        for name, module in model.named_modules()
        if name not in taking_part
        and (name.rpartition(".")[0] in lists or type(module) in classes)
        and not any(name.startswith(f"{block}.") or block.startswith(f"{name}.") for block in names)
    }
    shapes = _shapes(model, inputs, {name: module for name, module in others.items() if name not in names})
    left_out = {block.name: block.has_trainable_parameters for block in found if block.name not in taking_part}
    return [
        NotSkippable(name, type(module).__name__, _reason(module, shapes.get(name), left_out.get(name)))
        for name, module in others.items()
    ]


def _reason(module: nn.Module, shapes: tuple[list[Any], Any] | None, left_out: bool | None) -> str:
    """Why a module is no block: `left_out` says whether a block that does not take part could train."""
    if left_out is not None:
        return "left out by target_blocks" if left_out else "no parameter that requires gradients"
    if next(module.parameters(), None) is None:
        return "no parameters"
    if shapes is None:
        return "not called in the forward"
    arguments, output = shapes
    if output not in arguments:
        return "output has another shape than the input (downsampling or projection)"
    return "output is not the input plus something"


def _shapes(
    model: nn.Module, inputs: Inputs | None, modules: Mapping[str, nn.Module]
) -> dict[str, tuple[list[Any], Any]]:
    """Shapes of the tensors that go into each module and of the first that comes out, from one forward."""
    if not modules:
        return {}
    shapes: dict[str, tuple[list[Any], Any]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, call_args: tuple, call_kwargs: dict[str, Any], output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            values = [*call_args, *call_kwargs.values()]
            shapes[name] = [v.shape for v in values if isinstance(v, torch.Tensor)], getattr(first, "shape", None)

        return hook

    args, kwargs = model_inputs(model, inputs)
    handles = []
    try:
        with undisturbed(model), torch.no_grad():
            for name, module in modules.items():
                handles.append(module.register_forward_hook(record(name), with_kwargs=True))
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Costs


def _step_costs(
    model: nn.Module, blocks: Sequence[ResidualBlock], inputs: Inputs | None, train_trunk: bool, notes: list[str]
) -> StepCosts | None:
    """The measured costs, or None with a note: the blocks are worth reporting without them."""
    try:
        return measure_step_costs(model, blocks, inputs, train_trunk=train_trunk)
    except FeatureReuseError:
        raise
    except Exception as error:
        notes.append(f"The arithmetic could not be counted: {type(error).__name__}: {_sentence(error)}")
        return None


def _skip(index: int) -> StepPlan:
    return StepPlan(StepKind.STOCHASTIC_DEPTH, (index,))


def _step_shares(schedule: FeatureReuseSchedule, trunk_trains: bool) -> dict[str, float]:
    """Expected share of the steps that each kind takes; a cycle that draws no block is vanilla."""
    if not schedule.steps_per_cycle:
        return {"vanilla": 1.0, "stochastic_depth": 0.0, "masked_freeze": 0.0}
    vanilla = _vanilla_probability(schedule.rates, trunk_trains)
    depth = (1 - vanilla) * schedule.stochastic_depth_steps / schedule.steps_per_cycle
    return {"vanilla": vanilla, "stochastic_depth": depth, "masked_freeze": 1 - vanilla - depth}


def _vanilla_probability(rates: Sequence[float], trunk_trains: bool) -> float:
    return math.prod(1 - rate for rate in rates) + (0.0 if trunk_trains else math.prod(rates))


def _expected_costs(
    costs: StepCosts, rates: Sequence[float], step_shares: Mapping[str, float], trunk_trains: bool
) -> dict[str, float]:
    expected = {"vanilla": 1.0}
    for kind in (StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE):
        expected[kind.value] = expected_share(costs, kind, rates, trunk_trains)
    return {**expected, "mean": sum(share * expected[kind] for kind, share in step_shares.items())}


def expected_share(costs: StepCosts, kind: StepKind, rates: Sequence[float], trunk_trains: bool = True) -> float:
    """Give the exact expectation of `costs.share` over the sets D that make a step of this kind.

    Given the lowest block that trains, the cost of a step is a sum over the blocks above it: their expectations add.

    Args:
        costs (`StepCosts`): of the model.
        kind (`StepKind`): stochastic depth or masked freeze.
        rates (`Sequence[float]`): drop probability of each block.
        trunk_trains (`bool`, defaults to `True`): whether the trunk can train; if not, dropping all blocks is vanilla.
    """
    everything = range(len(rates))
    depth = kind is StepKind.STOCHASTIC_DEPTH
    training = [1 - rate if depth else rate for rate in rates]

    def share(*trains: int) -> float:
        dropped = tuple(block for block in everything if (block in trains) != depth)
        return costs.share(StepPlan(kind, dropped))

    total, none_below = 0.0, 1.0
    for lowest in everything:
        alone = share(lowest)
        above = sum(training[block] * (share(lowest, block) - alone) for block in range(lowest + 1, len(rates)))
        total += none_below * training[lowest] * (alone + above)
        none_below *= 1 - training[lowest]
    total += none_below * share()
    # Cycles that are vanilla are none of this kind.
    total -= math.prod(1 - rate for rate in rates) * costs.share(StepPlan(kind, ()))
    total -= 0.0 if trunk_trains else math.prod(rates) * costs.share(StepPlan(kind, tuple(everything)))
    steps = 1 - _vanilla_probability(rates, trunk_trains)
    return total / steps if steps else 1.0


# The table


def _heading(report: ModelReport) -> str:
    share = sum(block.share_of_parameters for block in report.blocks)
    classes = {block.class_name for block in report.blocks}
    kind = f" of class {classes.pop()}" if len(classes) == 1 else ""
    name = report.architecture if report.model == report.architecture else f"{report.model}: {report.architecture}"
    counted = "1 residual block" if len(report.blocks) == 1 else f"{len(report.blocks)} residual blocks"
    return f"{name}, {report.parameters:,} parameters\n{counted}{kind}, {share:.1%} of the parameters"


def _table(report: ModelReport) -> str:
    """One line a block; the prefix that all names share moves into the heading where a line would be too long."""
    names = [block.name for block in report.blocks]
    lines = _aligned(_rows(report, names, "block"))
    prefix = os.path.commonprefix(names).rpartition(".")[0]
    if len(lines[0]) > _TABLE_WIDTH and prefix:
        lines = _aligned(_rows(report, [name[len(prefix) + 1 :] for name in names], f"block of {prefix}"))
    return "\n".join(lines)


def _rows(report: ModelReport, names: Sequence[str], heading: str) -> list[list[str]]:
    same_class = len({block.class_name for block in report.blocks}) == 1
    rows = [["#", heading, "class", "parameters", "% of all", "% of arithmetic", "survival", "exact"]]
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
                f"{block.survival_probability:.3f}",
                "yes" if block.exact else "no",
            ]
        )
    return [row[:2] + row[3:] for row in rows] if same_class else rows


def _aligned(rows: list[list[str]]) -> list[str]:
    """Pad every column; those of words to the right, those of numbers to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = {index for index, heading in enumerate(rows[0]) if heading.startswith(("block", "class"))}
    return [
        "  ".join(
            cell.ljust(width) if index in words else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _summary(report: ModelReport) -> str:
    options = report.options
    lines = [
        f"Schedule: drop rate {options['drop_rate']:g}, {options['drop_rate_schedule']}; cycles of "
        f"{_steps(options['stochastic_depth_steps'], 'stochastic-depth')} and "
        f"{_steps(options['masked_freeze_steps'], 'masked-freeze')}"
        f"{' in which the trunk trains too' if options['train_trunk'] else ''}; vanilla steps, where a cycle draws no "
        f"block: {report.step_shares['vanilla']:.1%}."
    ]
    if report.costs:
        depth, freeze, mean = (report.costs[key] for key in ("stochastic_depth", "masked_freeze", "mean"))
        lines.append(
            f"Expected cost, vanilla step = 1: stochastic depth {depth:.3f}, masked freeze {freeze:.3f}, "
            f"mean {mean:.3f}."
        )
    return "\n".join(textwrap.fill(line, _TABLE_WIDTH) for line in lines)


def _steps(count: int, kind: str) -> str:
    return f"{count} {kind} step{'' if count == 1 else 's'}"


def _others(report: ModelReport) -> str:
    """Modules that are no blocks, gathered by reason, then the notes."""
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
