"""Only a second process that trains into an output folder is refused."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_resume import resumable
from training_runs import train

from hf_featreuse import CheckpointError, FeatureReuseTrainer
from hf_featreuse.checkpoints import output_lock as module
from hf_featreuse.checkpoints.output_lock import LOCK_NAME, output_lock
from hf_featreuse.hub.folders import files_to_push

HOLD = """
import sys, time
from hf_featreuse.checkpoints.output_lock import output_lock
with output_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_killed(other, tmp_path: Path) -> None:
    trainer = resumable("vit", tmp_path, FeatureReuseTrainer, max_steps=1)
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(CheckpointError, match=rf"is in use: process {other.pid} on .* Pass another `output_dir`"):
            output_lock(folder).__enter__()
    with pytest.raises(CheckpointError, match="is in use"):
        trainer.train()
    assert trainer.state.global_step == 0
    # Readers are not refused, and the file is not pushed.
    assert "eval_loss" in trainer.evaluate()
    trainer.save_model(str(tmp_path))
    assert not any(LOCK_NAME in name for name in files_to_push(tmp_path))
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert (tmp_path / LOCK_NAME).is_file()
    train(trainer)
    assert not (tmp_path / LOCK_NAME).exists()


def test_trainers_of_one_process_are_not_refused(tmp_path: Path) -> None:
    def hold() -> None:
        with output_lock(tmp_path):
            pass

    with output_lock(tmp_path):
        hold()
        thread = threading.Thread(target=hold)
        thread.start()
        thread.join()
        assert str(os.getpid()) in (tmp_path / LOCK_NAME).read_text()
    assert not (tmp_path / LOCK_NAME).exists()
    hold()


def linger(folder: Path, begun, end) -> None:
    begun.set()
    end.wait()


def test_a_worker_that_outlives_training_does_not_hold_the_folder(tmp_path: Path) -> None:
    """A forked process, such as a worker of the data loader, has the open file too."""
    context = multiprocessing.get_context("fork")
    begun, end = context.Event(), context.Event()
    with output_lock(tmp_path):
        worker = context.Process(target=linger, args=(tmp_path, begun, end), daemon=True)
        worker.start()
        begun.wait()
    code = f"from hf_featreuse.checkpoints.output_lock import output_lock\nwith output_lock({str(tmp_path)!r}): pass"
    try:
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    finally:
        end.set()
        worker.join()


def test_a_folder_that_cannot_be_locked_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    (tmp_path / LOCK_NAME).mkdir()
    with output_lock(tmp_path):
        pass
    assert len(said) == 1
    assert "cannot be locked" in said[0]
