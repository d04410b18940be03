"""Training options that changed since a checkpoint: their effect is reported, or that they have none."""

import re
from pathlib import Path
from typing import Any

import pytest
from test_resume import resumable
from training_runs import RecordingTrainer, train

from hf_featreuse import ConfigurationError
from hf_featreuse.checkpoints.changed_training import describe_changed_training
from hf_featreuse.trainer import resumable as module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    train(resumable("vit", path, max_steps=2, save_steps=2))
    return path / "checkpoint-2"


def resume(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    resumed: RecordingTrainer = resumable("vit", target, save_strategy="no", **{"max_steps": 4, **changed})
    resumed.train(resume_from_checkpoint=str(folder))
    return resumed, said


CHANGES = {
    "seed": ({"seed": 7}, r"`seed=7` \(before: 42\): the rest of the data is shuffled in another order"),
    "accumulation": (
        {"gradient_accumulation_steps": 1},
        r"`gradient_accumulation_steps=1` \(before: 2\): the position in the data follows from",
    ),
    "precision": ({"bf16": True}, r"`precision='bf16'` \(before: 'float32'\): steps are computed"),
    "learning rate": ({"learning_rate": 0.5}, r"have no effect.*`learning_rate=0.5` \(before: 0.01\)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_reported_with_its_effect(
    change: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, expected = CHANGES[change]
    resumed, said = resume(folder, tmp_path, monkeypatch, **changed)
    assert len(said) == 1
    assert re.search(expected, said[0])
    if change == "learning rate":
        assert max(entry.get("learning_rate", 0) for entry in resumed.state.log_history) <= 0.01


def test_nothing_is_reported_if_nothing_changed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resume(folder, tmp_path, monkeypatch)[1] == []


def test_another_optimizer_is_one_clear_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"written with the optimizer torch.*AdamW, but this run has .*SGD"):
        resume(folder, tmp_path, monkeypatch, optim="sgd")


def test_records_of_another_form_are_not_compared() -> None:
    for saved in (None, 5, [], {}, {"unknown": 3}):
        assert describe_changed_training(saved, {"seed": 1}) is None
