"""Checkpoints of runs without scaling, of an older draw, or of older versions of the options."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_resume import resumable
from training_runs import RecordingTrainer, same_bits, state_of, train

from hf_featreuse import CheckpointError, ConfigurationError, FeatureReuseSchedule, StepKind
from hf_featreuse.checkpoints.changed_settings import PlanSource, check_scaling
from hf_featreuse.checkpoints.resume_state import RESUME_STATE_NAME
from hf_featreuse.method.draws import SAMPLE_DRAW_VERSION
from hf_featreuse.trainer import trainer

STEP = 2


def checkpoint(folder: Path, **options: Any) -> Path:
    """A checkpoint after one cycle of a run of ViT."""
    train(resumable("vit", folder, max_steps=STEP, save_steps=STEP, **options))
    return folder / f"checkpoint-{STEP}"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a checkpoint records of the settings."""
    path = folder / RESUME_STATE_NAME
    state = json.loads(path.read_text())
    state.pop("digest", None)  # Of the state as it was written.
    change(state)
    path.write_text(json.dumps(state))


def resume(folder: Path, target: Path, kind: type[RecordingTrainer] = RecordingTrainer, **options: Any):
    resumed = resumable("vit", target, kind, save_strategy="no", **{"max_steps": STEP + 1, **options})
    resumed.train(resume_from_checkpoint=str(folder))
    return resumed


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(trainer.logger, "warning", found.append)
    return found


# Scaling


def test_a_run_that_did_not_scale_is_not_resumed_with_scaling(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "run", scale_kept=False)
    resumed = resumable("vit", tmp_path / "again", save_strategy="no")
    for parameter in resumed.model.parameters():
        parameter.data += 1  # So that weights that were loaded show.
    before = state_of(resumed.model)
    with pytest.raises(ConfigurationError, match=r"written with `scale_kept=False`.*Pass `scale_kept=False`"):
        resumed.train(resume_from_checkpoint=str(folder))
    assert same_bits(state_of(resumed.model), before)
    # With the option of the checkpoint it resumes.
    assert resume(folder, tmp_path / "again", scale_kept=False).state.global_step == STEP + 1


def test_scaling_may_be_turned_off_and_that_is_reported(tmp_path: Path, said: list[str]) -> None:
    resume(checkpoint(tmp_path / "run"), tmp_path / "again", scale_kept=False)
    assert len(said) == 1
    assert "From here on: scale_kept=False (before: scale_kept=True)" in said[0]


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({}, True),
        ({"masked_freeze_steps": 0}, True),
        ({"vanilla_steps": 1}, True),
        ({"drop_granularity": "sample"}, True),
        # No step is scaled, with either value.
        ({"stochastic_depth_steps": 0}, False),
        ({"drop_rate": 0}, False),
    ],
)
def test_only_a_run_with_steps_to_scale_is_refused(changed: dict[str, Any], refused: bool) -> None:
    schedule = FeatureReuseSchedule(3, **changed)
    for saved in (True, False):
        written = PlanSource(schedule, ("0", "1", "2"), options={"scale_kept": saved}).to_json()
        check_scaling(written, False)
        if refused and not saved:
            with pytest.raises(ConfigurationError, match="`scale_kept=False`"):
                check_scaling(written, True)
        else:
            check_scaling(written, True)


# Draws


def test_sets_per_sample_of_an_older_draw_are_not_resumed(tmp_path: Path) -> None:
    options = {"drop_granularity": "sample"}
    folder = checkpoint(tmp_path / "run", **options)
    assert resume(folder, tmp_path / "again", **options).state.global_step == STEP + 1
    rewrite(folder, lambda state: state["plans"].pop("sample_draw"))
    with pytest.raises(ConfigurationError, match=r"version 1 of the draw of `drop_granularity=\"sample\"`"):
        resume(folder, tmp_path / "again", **options)


def test_the_version_of_the_draw_is_recorded_and_matters_only_to_sets_per_sample() -> None:
    for granularity, version in (("batch", 1), ("batch", SAMPLE_DRAW_VERSION + 1), ("sample", SAMPLE_DRAW_VERSION)):
        source = PlanSource(FeatureReuseSchedule(2, drop_granularity=granularity), ("0", "1"))
        written = source.to_json()
        assert written["sample_draw"] == SAMPLE_DRAW_VERSION
        again = PlanSource.from_json({**written, "sample_draw": version})
        assert again.first_difference(source, 10) is None
    for version in (1, SAMPLE_DRAW_VERSION + 1):
        with pytest.raises(ConfigurationError, match=f"version {version} of the draw"):
            PlanSource.from_json({**written, "sample_draw": version})


# Options that were not there, or of another type


def test_settings_of_an_older_version_are_read(tmp_path: Path, said: list[str]) -> None:
    folder = checkpoint(tmp_path / "run")

    def make_older(state: dict[str, Any]) -> None:
        plans = state["plans"]
        assert plans["options"]["train_trunk"] == "none"
        plans["options"]["train_trunk"] = False
        del plans["sample_draw"], plans["schedule"]["vanilla_steps"], plans["schedule"]["drop_rate_over_time"]

    rewrite(folder, make_older)
    resumed = resume(folder, tmp_path / "again")
    assert resumed.state.global_step == STEP + 1
    assert said == []
    rewrite(folder, lambda state: state["plans"]["options"].update(train_trunk=True))
    resume(folder, tmp_path / "again")
    assert ["train_trunk='none' (before: train_trunk='all')" in line for line in said] == [True]
    with pytest.raises(ConfigurationError, match="vanilla_steps=1"):
        resume(folder, tmp_path / "again", vanilla_steps=1)


class OwnSchedule(RecordingTrainer):
    def get_schedule(self, num_blocks: int, max_steps: int) -> FeatureReuseSchedule:
        class Own(FeatureReuseSchedule):
            pass

        return Own(num_blocks, drop_rate=0.5, drop_rate_schedule="uniform", seed=5)


def test_a_checkpoint_that_records_no_settings_warns(tmp_path: Path, said: list[str]) -> None:
    train(resumable("vit", tmp_path / "run", OwnSchedule, max_steps=STEP, save_steps=STEP, scale_kept=False))
    folder = tmp_path / "run" / f"checkpoint-{STEP}"
    assert json.loads((folder / RESUME_STATE_NAME).read_text())["plans"] is None
    resumed = resume(folder, tmp_path / "again")
    assert len(said) == 1
    assert "records no settings" in said[0]
    assert "`scale_kept`" in said[0]
    assert {plan.kind for _, plan in resumed.plans} == {StepKind.STOCHASTIC_DEPTH}
    # If this run has a custom schedule too, there is nothing to compare.
    resume(folder, tmp_path / "again", OwnSchedule)
    assert len(said) == 1


def test_a_checkpoint_without_our_file_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = checkpoint(tmp_path / "run")
    (folder / RESUME_STATE_NAME).unlink()
    with caplog.at_level("WARNING", logger="hf_featreuse"):
        assert resume(folder, tmp_path / "again").state.global_step == STEP + 1
    assert "changed settings go unnoticed" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": {"drop_shape": "cosine"}},
        {"schedule": {"drop_granularity": "token"}},
        {"options": {"train_trunk": "norms"}},
        {"more": 1},
    ],
)
def test_settings_of_a_newer_version_are_refused_with_the_version(change: dict[str, Any]) -> None:
    written = PlanSource(FeatureReuseSchedule(2), ("0", "1"), options={"train_trunk": "all"}).to_json()
    for name, value in change.items():
        written[name] = {**written[name], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigurationError, match=r"written by 7\.1 of hf_featreuse.*does not know"):
        PlanSource.from_json({**written, "version": "7.1"})


@pytest.mark.parametrize("wrong", [3, [], {}, {"schedule": 3, "blocks": []}, {"schedule": {}, "blocks": ["0"]}])
def test_settings_of_another_form_are_a_checkpoint_error(wrong: Any) -> None:
    for read in (PlanSource.from_json, lambda saved: check_scaling(saved, True)):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read(wrong)
