"""Settings that changed since a checkpoint are refused only if a past step would have differed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_resume import resumable
from training_runs import RecordingTrainer, same_bits, state_of, train

from hf_featreuse import ConfigurationError, FeatureReuseSchedule, StepKind
from hf_featreuse.checkpoints.changed_settings import PlanSource, check_plans
from hf_featreuse.trainer import trainer

NAMES = tuple(f"layers.{index}" for index in range(4))


def source(blocks: tuple[str, ...] = NAMES, **changed: Any) -> PlanSource:
    own = {name: changed.pop(name) for name in ("trunk_trains", "samples", "options") if name in changed}
    schedule = FeatureReuseSchedule(
        len(blocks), **{"stochastic_depth_steps": 1, "drop_rate_schedule": "uniform", "seed": 5, **changed}
    )
    return PlanSource(schedule, blocks, **own)


CHANGES = {
    "rate": {"drop_rate": 0.9},
    "schedule": {"drop_rate_schedule": "linear"},
    "seed": {"seed": 6},
    "ratio": {"stochastic_depth_steps": 2},
    "plain steps in a cycle": {"vanilla_steps": 1},
    "over time": {"drop_rate_over_time": "falling", "last_step": 40},
    "rate of zero": {"drop_rate": 0},
    "plain": {"stochastic_depth_steps": 0, "masked_freeze_steps": 0},
    "granularity": {"drop_granularity": "sample"},
    "window": {"first_step": 3},
    "end": {"last_step": 2},
    "fewer blocks": {"blocks": NAMES[1:]},
    "other blocks": {"blocks": ("stem.0", *NAMES[1:])},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_difference_is_the_first_step_that_the_schedules_plan_differently(change: str) -> None:
    saved, now = source(), source(**CHANGES[change])
    differing = [step for step in range(40) if saved.plan(step) != now.plan(step)]
    assert differing
    first = differing[0]
    assert saved.first_difference(now, 40) == first
    assert saved.first_difference(now, first) is None
    assert check_plans(saved, now, first).startswith("Settings changed")
    with pytest.raises(ConfigurationError) as caught:
        check_plans(saved, now, first + 1)
    message = str(caught.value)
    assert f"step {first}" in message
    assert all(word in message for word in ("Saved:", "Passed:", "Pass the saved settings"))


def test_plans_are_compared_by_the_names_of_the_blocks() -> None:
    saved = source()
    dropped = [NAMES[index] for index in saved.schedule.plan(0).dropped]
    assert saved.plan(0) == (StepKind.STOCHASTIC_DEPTH, dict.fromkeys(dropped, b""))


def test_sets_per_sample_are_compared_for_every_sample() -> None:
    # Rates of 8 and 9 sixteenths: one sample in 16 drops a block more. Two samples agree at first.
    saved, now = (source(drop_granularity="sample", drop_rate=rate, samples=2, seed=2) for rate in (0.5, 0.5 + 1 / 16))
    masks = [
        np.stack([each.schedule.plan(step, batch_size=2).sample_masks for step in range(20)]) for each in (saved, now)
    ]
    expected = int(np.flatnonzero((masks[0] != masks[1]).any((1, 2)))[0])
    assert expected > 0
    # The first sample draws the same, the second does not.
    assert (masks[0][expected] != masks[1][expected]).any(1).tolist() == [False, True]
    assert saved.first_difference(now, 20) == expected
    assert check_plans(saved, now, expected) is not None


def test_rates_that_are_rounded_to_the_same_sixteenth_plan_the_same() -> None:
    saved, now = (source(drop_granularity="sample", drop_rate=rate, samples=64) for rate in (0.5, 0.502))
    assert saved.first_difference(now, 20) is None
    assert "drop_rate=0.502 (before: drop_rate=0.5)" in check_plans(saved, now, 20)


def test_another_number_of_samples_does_not_change_the_plan() -> None:
    saved = source(drop_granularity="sample", samples=4, last_step=30)
    assert check_plans(saved, source(drop_granularity="sample", samples=8), 20) is not None


def test_a_cycle_that_drops_all_is_vanilla_if_the_trunk_is_frozen() -> None:
    free, frozen = source(drop_rate=0.99), source(drop_rate=0.99, trunk_trains=False)
    assert free.plan(0) == (StepKind.STOCHASTIC_DEPTH, dict.fromkeys(NAMES, b""))
    assert frozen.plan(0) == (StepKind.VANILLA, {})
    assert free.first_difference(frozen, 5) == 0


def test_nothing_is_reported_if_nothing_changed() -> None:
    saved = source(options={"train_trunk": "head"}, drop_rate_over_time="falling", last_step=40, vanilla_steps=1)
    again = PlanSource.from_json(json.loads(json.dumps(saved.to_json())))
    assert check_plans(again, saved, 10) is None
    assert again == dataclasses.replace(saved, schedule=again.schedule)


def test_an_option_that_changes_no_plan_is_reported() -> None:
    said = check_plans(source(options={"train_trunk": "none"}), source(options={"train_trunk": "all"}), 10)
    assert "train_trunk='all' (before: train_trunk='none')" in said


# In the trainer: ViT of 4 blocks, checkpoints of steps 1 to 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    train(resumable("vit", path))
    return path


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(trainer.logger, "warning", found.append)
    return found


def resume(folder: Path, step: int, target: Path, **changed: Any) -> RecordingTrainer:
    resumed = resumable("vit", target, save_strategy="no", **changed)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return resumed


REFUSED = {
    "drop_rate=0.9": {"drop_rate": 0.9},
    "drop_rate_schedule='linear'": {"drop_rate_schedule": "linear"},
    "seed=6": {"reuse_seed": 6},
    "masked_freeze_steps=2": {"masked_freeze_steps": 2},
    "stochastic_depth_steps=0": {"masked_freeze_steps": 0, "stochastic_depth_steps": 0},
    "drop_granularity='sample'": {"drop_granularity": "sample"},
    "vanilla_steps=1": {"vanilla_steps": 1},
    "drop_rate_over_time='falling'": {"drop_rate_over_time": "falling"},
    "first_step=3": {"reuse_start": 0.5},
    "last_step=0": {"reuse_end": 0.1},
    "num_blocks=3, blocks=": {"target_blocks": ["1", "2", "3"]},
}


@pytest.mark.parametrize("said_of_it", REFUSED)
def test_the_trainer_refuses_changes_to_past_steps(said_of_it: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"Passed: .*{said_of_it}"):
        resume(folder, 5, tmp_path, **REFUSED[said_of_it])


def test_training_can_be_extended(folder: Path, tmp_path: Path, said: list[str]) -> None:
    extended = resume(folder, 6, tmp_path, max_steps=9)
    assert extended.state.global_step == 9
    assert [step for step, _ in extended.plans[::2]] == [6, 7, 8]
    assert said == []


def test_the_window_of_an_extended_run_may_move_behind_the_steps_taken(tmp_path: Path, said: list[str]) -> None:
    window = {"reuse_end": 0.5}
    train(resumable("vit", tmp_path / "run", max_steps=8, **window))
    # Steps up to 4 of 8, then up to 5 of 10: after three steps no difference, after six step 5 would be another.
    resume(tmp_path / "run", 3, tmp_path / "again", max_steps=10, **window)
    assert ["last_step=5 (before: last_step=4)" in line for line in said] == [True]
    with pytest.raises(ConfigurationError, match="plan step 5 as"):
        resume(tmp_path / "run", 6, tmp_path / "again", max_steps=10, **window)


def test_a_rate_may_change_if_no_past_step_drew_differently(folder: Path, tmp_path: Path, said: list[str]) -> None:
    resume(folder, 2, tmp_path, drop_rate=0.5 + 1e-9)
    assert len(said) == 1
    assert "drop_rate=0.500000001 (before: drop_rate=0.5)" in said[0]


def test_feature_reuse_may_start_after_plain_training(tmp_path: Path) -> None:
    plain = {"stochastic_depth_steps": 0, "masked_freeze_steps": 0}
    train(resumable("vit", tmp_path / "run", max_steps=3, **plain))
    resumed = resume(tmp_path / "run", 3, tmp_path / "again", reuse_start=0.5)
    assert {plan.kind for _, plan in resumed.plans} > {StepKind.STOCHASTIC_DEPTH}
    with pytest.raises(ConfigurationError, match="step 0 was vanilla"):
        resume(tmp_path / "run", 3, tmp_path / "again")


def test_a_custom_schedule_is_not_compared(folder: Path, tmp_path: Path) -> None:
    class Own(FeatureReuseSchedule):
        pass

    class WithOwn(RecordingTrainer):
        def get_schedule(self, num_blocks: int, max_steps: int) -> FeatureReuseSchedule:
            return Own(num_blocks, seed=9)

    resumed = resumable("vit", tmp_path, kind=WithOwn)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert resumed.state.global_step == 6


def test_a_refusal_leaves_the_weights_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    same = resume(folder, 6, tmp_path)
    refused = resumable("vit", tmp_path, reuse_seed=6)
    with pytest.raises(ConfigurationError):
        refused.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert same_bits(state_of(refused.model), state_of(same.model))
    assert all(parameter.requires_grad for parameter in refused.model.parameters())


def test_scaled_steps_whose_survival_changed_differ():
    """A falling run that is to end later: its steps so far drew the same sets, with other divisors."""
    names = ("a", "b")

    def source(last_step: int, **options) -> PlanSource:
        schedule = FeatureReuseSchedule(
            2, drop_rate=0.5, seed=0, last_step=last_step, drop_rate_over_time="falling", stochastic_depth_steps=1
        )
        return PlanSource(schedule, names, options={"scale_kept": True, **options})

    saved, longer = source(1000), source(1100)
    assert all(saved.plan(step) == longer.plan(step) for step in range(6))
    # The first cycle has the full rates in both.
    assert saved.first_difference(longer, steps=2) is None
    assert saved.first_difference(longer, steps=6) == 2
    with pytest.raises(ConfigurationError, match=r"step 2 as .* with survival probabilities \(0\.7505, 0\.5009\)"):
        check_plans(saved, longer, 6)
    unscaled = source(1000, scale_kept=False)
    assert unscaled.first_difference(source(1100, scale_kept=False), steps=6) is None
