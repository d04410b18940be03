"""The log history of an interrupted run is bit-identical to that of an uninterrupted one, except for times."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_resume import STEPS, assert_same_run, history, resumable
from tiny_models import build, examples
from training_runs import RecordingTrainer, config, train
from transformers import Trainer

from hf_featreuse import StepKind
from hf_featreuse.checkpoints import completeness
from hf_featreuse.checkpoints.completeness import checkpoint_fault
from hf_featreuse.checkpoints.resume_state import read_resume_state
from hf_featreuse.trainer import resumable as resumable_module

pytestmark = pytest.mark.slow

CASES = {
    "every fourth step": {"logging_steps": 4},
    "longer than the run": {"logging_steps": 100},
    "first step": {"logging_steps": 4, "logging_first_step": True},
    "epochs": {"logging_strategy": "epoch"},
    "evaluated by epoch": {"logging_steps": 4, "eval_strategy": "epoch"},
    "unfiltered": {"logging_steps": 4, "logging_nan_inf_filter": False},
    "by sample": {"logging_steps": 4, "drop_granularity": "sample"},
}


def run(folder: Path, kind: type = RecordingTrainer, **changed: Any) -> RecordingTrainer:
    """A run of two epochs of three optimizer steps; `max_steps=5` ends it in the middle of an epoch."""
    return resumable("vit", folder, kind=kind, **changed)


@pytest.mark.parametrize("options_", CASES)
def test_the_log_history_is_that_of_the_uninterrupted_run(options_: str, tmp_path: Path) -> None:
    changed = {"max_steps": 5, **CASES[options_]}
    whole = train(run(tmp_path, **changed))
    for step in range(1, 6):
        resumed = run(tmp_path / "again", **changed)
        output = resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole, step)
        assert resumed.state.global_step == 5
        assert output.training_loss == whole.state.log_history[-1]["train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_end_of_an_epoch_is_logged_once(strategy: str, tmp_path: Path) -> None:
    changed = {"save_strategy": strategy, "save_steps": 3, "logging_strategy": "epoch", "eval_strategy": "epoch"}
    whole = train(run(tmp_path, **changed))
    assert sum("loss" in entry for entry in history(whole)) == 2
    for step in (3, 6):
        resumed = run(tmp_path / "again", **changed)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole, step)


class NotFinite(RecordingTrainer):
    """Adds NaN to the value of the loss at two steps, and nothing to its gradient."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss + math.nan if self.state.global_step in (1, 4) else loss


@pytest.mark.parametrize("filtered", [True, False])
def test_losses_that_are_not_finite_count_the_same(filtered: bool, tmp_path: Path) -> None:
    changed = {"logging_steps": 6, "logging_nan_inf_filter": filtered}
    whole = train(run(tmp_path, NotFinite, **changed))
    for step in (1, 2, 5):
        resumed = run(tmp_path / "again", NotFinite, **changed)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        # NaN is not equal to itself.
        assert json.dumps(history(resumed)) == json.dumps(history(whole))
        assert math.isfinite(history(resumed)[0]["loss"]) is filtered


def test_the_sums_are_all_that_the_file_holds_of_a_log(tmp_path: Path) -> None:
    trainer = train(run(tmp_path, logging_steps=4))
    state = read_resume_state(tmp_path / "checkpoint-3")
    assert (state["last_logged"], state["total_loss"]) == (0, 0.0)
    assert sum(state["by_kind"]["steps"]) == 3
    assert sum(state["by_kind"]["losses"]) == pytest.approx(state["loss"])
    assert len(state["by_kind"]["losses"]) == len(StepKind)
    later = read_resume_state(tmp_path / "checkpoint-5")
    assert (later["last_logged"], sum(later["by_kind"]["steps"])) == (4, 1)
    assert later["total_loss"] == pytest.approx(4 * history(trainer)[0]["loss"])


def without_state(folder: Path) -> None:
    (folder / "resume_state.json").unlink()


@pytest.fixture
def warnings_said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    for logger in (resumable_module.logger, completeness.logger):
        monkeypatch.setattr(logger, "warning", said.append)
    return said


def test_an_older_checkpoint_resumes_and_warns_of_the_consequences(tmp_path: Path, warnings_said: list[str]) -> None:
    whole = train(run(tmp_path, logging_steps=4))
    without_state(tmp_path / "checkpoint-3")
    assert checkpoint_fault(tmp_path / "checkpoint-3") is None
    resumed = run(tmp_path / "again", logging_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.plans == [plan for plan in whole.plans if plan[0] >= 3]
    assert history(resumed) != history(whole)
    assert len(warnings_said) == 1
    assert "resume_state.json" in warnings_said[0]
    # What it writes records this too, so a resume from there does not have the full mean either.
    assert read_resume_state(tmp_path / "again" / "checkpoint-4")["total_loss"] is None


def test_a_state_that_was_cut_short_is_skipped(tmp_path: Path, warnings_said: list[str]) -> None:
    whole = train(run(tmp_path, logging_steps=4))
    path = tmp_path / "checkpoint-6" / "resume_state.json"
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        assert checkpoint_fault(path.parent) == "resume_state.json is cut short"
    resumed = run(tmp_path, logging_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole, 5)
    assert "resume_state.json is cut short" in warnings_said[0]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_that_is_gone_is_found(name: str, tmp_path: Path) -> None:
    train(run(tmp_path, max_steps=1))
    (tmp_path / "checkpoint-1" / name).unlink()
    assert checkpoint_fault(tmp_path / "checkpoint-1") == f"{name} is missing"


def test_the_mark_of_a_complete_checkpoint_is_removed_before_it_is_overwritten(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    trainer.train()
    marked = tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json"
    assert marked.is_file()

    class Looking(RecordingTrainer):
        def save_model(self, *args: Any, **kwargs: Any) -> None:
            assert not marked.exists()
            super().save_model(*args, **kwargs)

    again = run(tmp_path, Looking)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS - 1}"))
    assert marked.is_file()


def test_the_stock_trainer_differs_in_its_first_loss(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 4, "max_steps": 5}
    whole = train(Trainer(build("convnext"), config(tmp_path, **arguments), train_dataset=examples()))
    resumed = Trainer(build("convnext"), config(tmp_path / "again", **arguments), train_dataset=examples())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert history(resumed)[0]["loss"] != history(whole)[0]["loss"]
