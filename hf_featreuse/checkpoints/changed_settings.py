"""Whether settings that changed since a checkpoint would have planned a step that was already taken otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.method.draws import SAMPLE_DRAW_VERSION
from hf_featreuse.method.schedule import FeatureReuseSchedule, StepKind, trunk_option


@dataclass(frozen=True)
class PlanSource:
    """All that the plans of a run follow from.

    Args:
        schedule (`FeatureReuseSchedule`): for the blocks.
        blocks (`tuple[str, ...]`): their names, in forward order.
        trunk_trains (`bool`, defaults to `True`): whether anything outside them trains; where nothing does, a cycle
            that drops every block is vanilla.
        samples (`int`, defaults to 1): in the global batch of an optimizer step; sets by sample are compared for all.
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
        """Numbers, strings and lists that [`from_json`] reads back."""
        return {
            "schedule": self.schedule.settings(),
            "sample_draw": SAMPLE_DRAW_VERSION,
            "blocks": list(self.blocks),
            "trunk_trains": self.trunk_trains,
            "samples": self.samples,
            "options": self.options,
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> PlanSource:
        """Read back what [`to_json`] gave.

        Raises:
            ConfigurationError: sets per sample were drawn by an older version, which this one cannot repeat.
        """
        schedule = FeatureReuseSchedule(**saved["schedule"])
        version = saved.get("sample_draw", 1)
        if schedule.drop_granularity == "sample" and version != SAMPLE_DRAW_VERSION:
            raise ConfigurationError(
                f'The checkpoint was written with version {version} of the draw of `drop_granularity="sample"`, and '
                f"this package has version {SAMPLE_DRAW_VERSION}, which draws other sets. Resume it with the version "
                "of hf_featreuse that wrote it, or start a new run from its weights with `from_pretrained`."
            )
        known = {name: saved[name] for name in ("trunk_trains", "samples", "options") if name in saved}
        # Before it was a word, the option was a boolean.
        options = {**known.get("options", {})}
        if "train_trunk" in options:
            options["train_trunk"] = trunk_option(options["train_trunk"])
        return cls(**{**known, "options": options, "schedule": schedule, "blocks": (*saved["blocks"],)})

    def plan(self, step: int) -> tuple[StepKind, dict[str, bytes]]:
        """Kind of a step, and by name of the dropped blocks the samples that drop them."""
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
        """Survival probability by name of each block, if a step divides the increments of the kept ones by it."""
        samples = {"batch_size": 1} if self.schedule.drop_granularity == "sample" else {}
        survival = self.schedule.plan(step, **samples).survival if self.options.get("scale_kept") else None
        # Rounded: a change that no step could notice is none.
        return {} if survival is None else {name: round(p, 6) for name, p in zip(self.blocks, survival, strict=True)}

    def describe(self, step: int) -> str:
        """The plan of a step in words."""
        survival = tuple(round(probability, 4) for probability in self.survival(step).values())
        return _describe(self.plan(step)) + (f" with survival probabilities {_short(survival)}" if survival else "")

    def first_difference(self, other: PlanSource, steps: int) -> int | None:
        """The first of the steps 0..steps-1 that the two plan differently, or `None`."""
        if not self.changes(other, with_options=False):
            return None
        # A sample's set follows from its position, not from how many there are; `check_scaling` compares scaling.
        other = replace(other, samples=self.samples, options=self.options)
        same = (
            self.plan(step) == other.plan(step) and self.survival(step) == other.survival(step)
            for step in range(steps)
        )
        return next((step for step, is_same in enumerate(same) if not is_same), None)

    def changes(self, now: PlanSource, *, with_options: bool = True) -> dict[str, tuple[Any, Any]]:
        """What was and is, by name, of all settings that differ."""
        first, second = self._named(with_options), now._named(with_options)
        return {name: (first.get(name), value) for name, value in second.items() if first.get(name) != value}

    def _named(self, with_options: bool) -> dict[str, Any]:
        named = {**self.schedule.settings(), "blocks": self.blocks, "trunk_trains": self.trunk_trains}
        return {**named, **(self.options if with_options else {})}


def check_plans(saved: PlanSource, now: PlanSource, steps: int) -> str | None:
    """Say what changed since a checkpoint; `None` where nothing did.

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
            f"after {steps} steps of which step {step} was {saved.describe(step)}. Saved: {before}. Passed: "
            f"{after}. Pass the saved settings to go on, or settings that differ only from step "
            f"{steps} on; to train anew from these weights, load them with `from_pretrained` and leave "
            "`resume_from_checkpoint` out."
        )
    return (
        f"Settings changed since the checkpoint, and the plans of its {steps} steps are the same: from here on "
        f"{after} (before: {before})."
    )


def check_scaling(saved: Mapping[str, Any], scale_kept: bool) -> None:
    """Raise `ConfigurationError` if the steps taken until a checkpoint were not scaled and those to come would be.

    Args:
        saved (`dict`): what [`PlanSource.to_json`] gave for the checkpoint.
        scale_kept (`bool`): the option of the run that resumes it.
    """
    schedule = saved["schedule"]
    scaled_a_step = schedule["drop_rate"] > 0 and schedule["stochastic_depth_steps"] > 0
    if scale_kept and scaled_a_step and saved["options"].get("scale_kept") is False:
        raise ConfigurationError(
            "The checkpoint was written with `scale_kept=False`, and this run has `scale_kept=True`, which is the "
            "default now: the weights were trained for residual increments that are not scaled. Pass "
            "`scale_kept=False` to resume, or start a new run from these weights with `from_pretrained`."
        )


def _short(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 3:
        return f"({value[0]!r}, ..., {value[-1]!r}; {len(value)})"
    return repr(value)


def _describe(plan: tuple[StepKind, dict[str, bytes]]) -> str:
    kind, dropped = plan
    if not dropped:
        return kind.value
    by_sample = ", by sample" if any(dropped.values()) else ""
    return f"{kind.value} of {_short(tuple(dropped))}{by_sample}"
