"""Every damaged or foreign checkpoint gets its verdict: no raw traceback, no hang, and no code in it is run."""

import pickle
import shutil
from collections import Counter
from pathlib import Path

import checkpoint_cases
import pytest
from checkpoint_cases import CASES
from tiny_models import build, examples
from training_runs import RecordingTrainer, config, with_dropout

from hf_featreuse import CheckpointError, FeatureReuseError
from hf_featreuse.checkpoints import completeness
from hf_featreuse.checkpoints.completeness import resolve_checkpoint

pytestmark = pytest.mark.slow


def trainer(folder: Path, **changed) -> RecordingTrainer:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, **changed}
    # With dropout, random states change from step to step.
    return RecordingTrainer(with_dropout(build("vit")), config(folder, **options), train_dataset=examples(16))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, and the second one of another run."""
    folder = tmp_path_factory.mktemp("original")
    trainer(folder).train()
    trainer(folder / "again", seed=7, reuse_seed=7, learning_rate=1e-3).train()
    (folder / "again" / "checkpoint-2").rename(folder / "other")
    shutil.rmtree(folder / "again")
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checkpoint_cases, "TRACE", tmp_path / "trace")
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(completeness.logger, "warning", found.append)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_gets_its_verdict(name: str, run: Path, said: list[str], tmp_path: Path) -> None:
    verdict, damage = CASES[name]
    damaged = run / "checkpoint-2"
    damage(damaged)
    if verdict == "skipped":
        assert resolve_checkpoint(True, str(run)) == str(run / "checkpoint-1")
        assert len(said) == 1
        assert str(damaged) in said[0]
        with pytest.raises(CheckpointError):
            resolve_checkpoint(str(damaged), str(run))
        shutil.rmtree(run / "checkpoint-1")
        with pytest.raises(CheckpointError, match="No checkpoint to resume from is complete"):
            resolve_checkpoint(True, str(run))
    elif verdict == "refused":
        assert resolve_checkpoint(str(damaged), str(run)) == str(damaged)
        with pytest.raises(FeatureReuseError):
            trainer(run, max_steps=3).train(resume_from_checkpoint=str(damaged))
    else:
        resolved = resolve_checkpoint(True, str(run))
        assert resolved == str(damaged)
        assert ["cannot be verified" in line for line in said] == [True] * (verdict == "unverified")
        resumed = trainer(run, max_steps=3)
        resumed.train(resume_from_checkpoint=resolved)
        assert resumed.state.global_step == 3
    assert not (tmp_path / "trace").exists()


def test_the_table_is_large_enough_and_its_pickles_do_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"\n{len(CASES)} damaged checkpoints: {dict(Counter(verdict for verdict, _ in CASES.values()))}")
    assert len(CASES) >= 120
    monkeypatch.setattr(checkpoint_cases, "TRACE", tmp_path / "trace")
    pickle.loads(pickle.dumps(checkpoint_cases.Harmful()))
    assert (tmp_path / "trace").is_dir()
