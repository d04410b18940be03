"""Check whether settings that changed since a checkpoint would have planned its steps differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_featreuse import __version__
from hf_featreuse.errors import CheckpointError, ConfigurationError
from hf_featreuse.method.draws import SAMPLE_DRAW_VERSION
from hf_featreuse.method.schedule import FeatureReuseSchedule, StepKind, trunk_option
from hf_featreuse.text import kind_and_text, one_line

# The keys of `PlanSource.to_json`.
_SAVED = {"version", "schedule", "sample_draw", "blocks", "trunk_trains", "samples", "options"}
_UNREADABLE = "The checkpoint holds settings of feature reuse that cannot be read"
_INSTEAD = "Pass the folder of another checkpoint, or start a new run from its weights with `from_pretrained`."


class _NewerVersionError(ConfigurationError):
    """A checkpoint of a newer version of this package."""


@dataclass(frozen=True)
class PlanSource:
    """Everything that determines the plans of a run.

    Args:
        schedule (`FeatureReuseSchedule`): for the blocks.
        blocks (`tuple[str, ...]`): their names, in forward order.
        trunk_trains (`bool`, defaults to `True`): whether anything outside them trains; if nothing does, a cycle
            that drops every block is vanilla.
        samples (`int`, defaults to 1): in the global batch of an optimizer step; sets per sample are compared for all.
        options (`dict`, *optional*): further options of the method; they change what a step does, not its plan.

    Example:
        >>> from hf_featreuse import FeatureReuseSchedule
        >>> from hf_featreuse.checkpoints.changed_settings import PlanSource
        >>> source = PlanSource(FeatureReuseSchedule(2, seed=1, drop_rate_schedule="uniform"), ("layer.0", "layer.1"))
        >>> PlanSource.from_json(source.to_json()).first_difference(source, steps=10) is None
        True
    """

    schedule: FeatureReuseSchedule
    blocks: tuple[str, ...]
    trunk_trains: bool = True
    samples: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return numbers, strings and lists that [`from_json`] reads back."""
        return {
            "version": __version__,
            "schedule": self.schedule.settings(),
            "sample_draw": SAMPLE_DRAW_VERSION,
            "blocks": list(self.blocks),
            "trunk_trains": self.trunk_trains,
            "samples": self.samples,
            "options": self.options,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> PlanSource:
        """Read back what [`to_json`] gave, of this version or an older one.

        Raises:
            ConfigurationError: a newer version wrote it, with settings that this one does not know; or sets per sample
                were drawn by another version of the draw, which this one cannot repeat.
            CheckpointError: it is not what `to_json` gave.
        """
        try:
            schedule, blocks, options = saved["schedule"], saved["blocks"], {**saved.get("options", {})}
            names = {name for name in blocks if isinstance(name, str)}
            more = {name: saved[name] for name in ("trunk_trains", "samples") if name in saved}
            known_settings = FeatureReuseSchedule(1).settings().keys()
            _refuse_newer(saved, [*(schedule.keys() - known_settings), *(saved.keys() - _SAVED)])
            schedule = FeatureReuseSchedule(**schedule)
            # In older versions the option was a boolean.
            if "train_trunk" in options:
                options["train_trunk"] = trunk_option(options["train_trunk"])
            if len(names) != schedule.num_blocks or not isinstance(more.get("samples", 1), int):
                raise ValueError("the blocks are not those of the schedule")
        except _NewerVersionError:
            raise
        except ConfigurationError as error:
            if saved.get("version", __version__) != __version__:
                _refuse_newer(saved, [one_line(error)])
            raise CheckpointError(f"{_UNREADABLE}: {one_line(error)} {_INSTEAD}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{_UNREADABLE} ({kind_and_text(error)}). {_INSTEAD}") from error
        version = saved.get("sample_draw", 1)
        if schedule.drop_granularity == "sample" and version != SAMPLE_DRAW_VERSION:
            raise ConfigurationError(
                f'The checkpoint was written with version {version} of the draw of `drop_granularity="sample"`, and '
                f"this package has version {SAMPLE_DRAW_VERSION}, which draws different sets. Resume it with the "
                "version of hf_featreuse that wrote it, or start a new run from its weights with `from_pretrained`."
            )
        return cls(schedule, (*blocks,), options=options, **more)

    def plan(self, step: int) -> tuple[StepKind, dict[str, bytes]]:
        """Return the kind of a step, and for each dropped block, by name, the samples that drop it."""
        if self.schedule.drop_granularity == "sample":
            plan = self.schedule.plan(step, batch_size=self.samples)
        else:
            plan = self.schedule.plan(step)
        if plan.sample_masks is not None:
            columns = plan.sample_masks.T
            return plan.kind, {self.blocks[i]: column.tobytes() for i, column in enumerate(columns) if column.any()}
        if not self.trunk_trains and len(plan.dropped) == len(self.blocks):
            return StepKind.VANILLA, {}
        return plan.kind, {self.blocks[index]: b"" for index in plan.dropped}

    def survival(self, step: int) -> dict[str, float]:
        """Return each block's survival probability by name, if a step divides the increments of kept blocks by it."""
        samples = {"batch_size": 1} if self.schedule.drop_granularity == "sample" else {}
        survival = self.schedule.plan(step, **samples).survival if self.options.get("scale_kept") else None
        # Rounded, so that a change too small to affect a step does not count.
        return {} if survival is None else {name: round(p, 6) for name, p in zip(self.blocks, survival, strict=True)}

    def describe(self, step: int) -> str:
        """Return the plan of a step in words."""
        survival = tuple(round(probability, 4) for probability in self.survival(step).values())
        said = _describe(self.plan(step)) + (f" with survival probabilities {_short(survival)}" if survival else "")
        frozen = self.schedule.frozen_below(step)
        return said + (f" with {frozen} of {len(self.blocks)} blocks still frozen" if frozen else "")

    def first_difference(self, other: PlanSource, steps: int) -> int | None:
        """Return the first of the steps 0..steps-1 that the two plan differently; `None` if there is none."""
        if not self.changes(other, with_options=False):
            return None
        # A sample's set depends on its position, not on how many there are; `check_scaling` compares the scaling.
        other = replace(other, samples=self.samples, options=self.options)
        same = (
            self.plan(step) == other.plan(step)
            and self.survival(step) == other.survival(step)
            and self.schedule.frozen_below(step) == other.schedule.frozen_below(step)
            for step in range(steps)
        )
        return next((step for step, is_same in enumerate(same) if not is_same), None)

    def changes(self, now: PlanSource, *, with_options: bool = True) -> dict[str, tuple[Any, Any]]:
        """Return the old and the new value, by name, of all settings that differ."""
        first, second = self._named(with_options), now._named(with_options)
        names = dict.fromkeys((*second, *first))
        return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}

    def _named(self, with_options: bool) -> dict[str, Any]:
        named = {**self.schedule.settings(), "blocks": self.blocks, "trunk_trains": self.trunk_trains}
        return {**named, **(self.options if with_options else {})}


def check_plans(saved: PlanSource, now: PlanSource, steps: int) -> str | None:
    """Describe what changed since a checkpoint; `None` if nothing did.

    Args:
        saved (`PlanSource`): of the run that wrote the checkpoint.
        now (`PlanSource`): of the run that resumes it.
        steps (`int`): optimizer steps taken until the checkpoint.

    Raises:
        ConfigurationError: one of the steps taken would have had another plan.
    """
    changes = saved.changes(now)
    if not changes:
        return None
    before = ", ".join(f"{name}={_short(old)}" for name, (old, _) in changes.items())
    after = ", ".join(f"{name}={_short(new)}" for name, (_, new) in changes.items())
    step = saved.first_difference(now, steps)
    if step is not None:
        raise ConfigurationError(
            f"The settings passed plan step {step} as {now.describe(step)}, but the checkpoint was written "
            f"after {steps} steps, and its step {step} was {saved.describe(step)}. Saved: {before}. Passed: "
            f"{after}. Pass the saved settings to resume, or settings that differ only from step "
            f"{steps} on. To start a new run from these weights, load them with `from_pretrained` and leave "
            "out `resume_from_checkpoint`."
        )
    return (
        f"Settings changed since the checkpoint, but the plans of its {steps} steps are the same. From here on: "
        f"{after} (before: {before})."
    )


def check_scaling(saved: Mapping[str, Any], scale_kept: bool) -> None:
    """Raise `ConfigurationError` if the steps before a checkpoint were not scaled and those after it would be.

    Args:
        saved (`dict`): what [`PlanSource.to_json`] gave for the checkpoint.
        scale_kept (`bool`): the option of the run that resumes it.
    """
    source = PlanSource.from_json(saved)
    scaled_a_step = source.schedule.drop_rate > 0 and source.schedule.stochastic_depth_steps > 0
    if scale_kept and scaled_a_step and source.options.get("scale_kept") is False:
        raise ConfigurationError(
            "The checkpoint was written with `scale_kept=False`, and this run has `scale_kept=True`, which is now "
            "the default: the weights were trained for residual increments that are not scaled. Pass "
            "`scale_kept=False` to resume, or start a new run from these weights with `from_pretrained`."
        )


def _refuse_newer(saved: Mapping[str, Any], unknown: list[Any]) -> None:
    if unknown:
        raise _NewerVersionError(
            f"The checkpoint was written by {saved.get('version', 'another version')} of hf_featreuse, with a setting "
            f"that this version, {__version__}, does not know: {sorted(map(str, unknown))[0]!r}. This version cannot "
            "repeat its steps. Resume it with the version that wrote it, or start a new run from its weights with "
            "`from_pretrained`."
        )


def _short(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 3:
        return f"({value[0]!r}, ..., {value[-1]!r}; {len(value)})"
    return repr(value)


def _describe(plan: tuple[StepKind, dict[str, bytes]]) -> str:
    kind, dropped = plan
    if not dropped:
        return kind.value
    by_sample = ", per sample" if any(dropped.values()) else ""
    return f"{kind.value} of {_short(tuple(dropped))}{by_sample}"
