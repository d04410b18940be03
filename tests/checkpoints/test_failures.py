"""A run that cannot continue reports why, and leaves the last complete checkpoint and no skipping or frozen model."""

import math
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_same_run, resumable
from tiny_models import build, examples
from training_runs import RecordingTrainer, traces, train

from hf_featreuse import CheckpointError, StepError, StepKind, check_finite
from hf_featreuse.checkpoints.completeness import newest_whole
from hf_featreuse.trainer import resumable as resumable_module

LAST = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RecordingTrainer:
    """An undisturbed run of 6 steps with a checkpoint after each."""
    return train(resumable("vit", tmp_path_factory.mktemp("whole")))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(resumable_module.logger, "warning", found.append)
    return found


def broken_off(trainer: RecordingTrainer, error: type[BaseException], match: str | None, step: int) -> str:
    """Train until the error, check the model and the checkpoints, and return the message."""
    before = traces(trainer.model)
    with pytest.raises(error, match=match) as caught:
        trainer.train()
    assert traces(trainer.model) == before
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert trainer.feature_reuse.current_plan is None
    folder = Path(trainer.args.output_dir)
    assert newest_whole(folder)[0] == (str(folder / f"checkpoint-{step}") if step else None)
    return str(caught.value)


def resumes_exactly(folder: Path, whole: RecordingTrainer, step: int) -> None:
    resumed = resumable("vit", folder)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole, step)


# Where checkpoints are written


def mount(folder: Path, options: str) -> None:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path, whole: RecordingTrainer) -> Iterator[Path]:
    """A folder with room for two checkpoints and a part of the third."""
    folder = tmp_path / "disk"
    folder.mkdir()
    files = (Path(whole.args.output_dir) / "checkpoint-6").iterdir()
    pages = sum(-(-path.stat().st_size // 4096) for path in files)
    mount(folder, f"size={int(2.6 * pages) * 4}k")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, whole: RecordingTrainer) -> None:
    message = broken_off(resumable("vit", small_disk), CheckpointError, "step 3 could not be written", 2)
    assert "checkpoint-2; `resume_from_checkpoint=True` resumes" in message
    assert "Free space" in message
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    resumes_exactly(small_disk, whole, 2)


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.pt"])
def test_a_file_that_the_system_cuts_short(part: str, whole: RecordingTrainer, tmp_path: Path) -> None:
    """A limit on the size of files, from step 3 on, in the place of a full disk: it needs no privilege."""
    limit = (Path(whole.args.output_dir) / "checkpoint-6" / part).stat().st_size - 4096
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limited(RecordingTrainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            if self.state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            super()._save_checkpoint(*args, **kwargs)

    try:
        message = broken_off(
            resumable("vit", tmp_path, kind=Limited), CheckpointError, "step 3 could not be written", 2
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "checkpoint-2" in message
    resumes_exactly(tmp_path, whole, 2)


def test_a_folder_that_becomes_read_only(tmp_path: Path, whole: RecordingTrainer) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=50m")

    class Closing(RecordingTrainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            if self.state.global_step == 3:
                # On top: what is open in the folder keeps it from being mounted again.
                subprocess.run(["mount", "--bind", "-o", "ro", str(folder), str(folder)], check=True)
            super()._save_checkpoint(*args, **kwargs)

    try:
        message = broken_off(resumable("vit", folder, kind=Closing), CheckpointError, "Read-only file system", 2)
        assert "checkpoint-2" in message
        # A run that starts in such a folder ends before its first step.
        late = resumable("vit", folder)
        with pytest.raises(CheckpointError, match=r"cannot be written: Read-only file system. Pass another folder"):
            late.train(resume_from_checkpoint=True)
        assert late.plans == []
        subprocess.run(["umount", str(folder)], check=True)
        resumes_exactly(folder, whole, 2)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_run_without_checkpoints_needs_no_folder_to_write_into(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=1m,ro")
    try:
        assert train(resumable("vit", folder, save_strategy="no")).state.global_step == LAST
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# What is trained on


class Deadly(torch.utils.data.Dataset):
    """The usual examples; in the second epoch the process that reads one is killed."""

    def __init__(self) -> None:
        self.items, self.epoch = examples(12), 0

    def __len__(self) -> int:
        return len(self.items)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.epoch == 1:
            assert torch.utils.data.get_worker_info() is not None
            os.kill(os.getpid(), signal.SIGKILL)
        return self.items[index]


def test_a_worker_that_is_killed(tmp_path: Path, whole: RecordingTrainer, said: list[str]) -> None:
    trainer = resumable("vit", tmp_path, dataloader_num_workers=1)
    trainer.train_dataset = Deadly()
    broken_off(trainer, RuntimeError, r"DataLoader worker .* (killed by signal|exited unexpectedly)", 3)
    assert len(said) == 1
    assert "RuntimeError stopped training after 3 optimizer steps" in said[0]
    assert "checkpoint-3; `resume_from_checkpoint=True` resumes" in said[0]
    resumes_exactly(tmp_path, whole, 3)


class Infected(RecordingTrainer):
    """The loss of the fourth optimizer step is NaN, and so are its gradients."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * (math.nan if self.state.global_step == 3 else 1)


@pytest.mark.parametrize("logging_steps", [1, 100], ids=["found when logging", "found when saving"])
def test_a_loss_of_nan(logging_steps: int, tmp_path: Path) -> None:
    trainer = resumable("vit", tmp_path, kind=Infected, logging_steps=logging_steps)
    message = broken_off(trainer, StepError, "After 4 optimizer steps the weight `.*` is NaN or infinite", 3)
    assert not (tmp_path / "checkpoint-4").exists()
    assert "checkpoint-3" in message
    assert "learning_rate" in message


def test_a_loss_of_nan_without_logs_and_checkpoints(tmp_path: Path) -> None:
    trainer = resumable("vit", tmp_path, kind=Infected, logging_steps=100, save_strategy="no")
    message = broken_off(trainer, StepError, "After 6 optimizer steps", 0)
    assert "There is no complete checkpoint" in message


# Ctrl-C


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler: a process in the background of a shell ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("kind", [StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE])
def test_an_interrupt_in_a_step(kind: StepKind, tmp_path: Path, whole: RecordingTrainer, said: list[str]) -> None:
    class Interrupted(RecordingTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step >= 2 and self.feature_reuse.current_plan.kind is kind:
                signal.raise_signal(signal.SIGINT)
            return loss

    step = next(step for step, plan in whole.plans if step >= 2 and plan.kind is kind)
    broken_off(resumable("vit", tmp_path, kind=Interrupted), KeyboardInterrupt, None, step)
    assert f"KeyboardInterrupt stopped training after {step} optimizer steps" in said[0]
    assert f"checkpoint-{step}; `resume_from_checkpoint=True` resumes" in said[0]
    resumes_exactly(tmp_path, whole, step)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_an_interrupt_during_a_save(method: str, tmp_path: Path, whole: RecordingTrainer, said: list[str]) -> None:
    def interrupted(self: RecordingTrainer, *args: Any) -> None:
        if self.state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        getattr(RecordingTrainer, method)(self, *args)

    kind: Callable = type("Interrupted", (RecordingTrainer,), {method: interrupted})
    broken_off(resumable("vit", tmp_path, kind=kind), KeyboardInterrupt, None, 2)
    assert "checkpoint-2" in said[0]
    resumes_exactly(tmp_path, whole, 2)


def test_a_frozen_parameter_may_be_infinite_on_purpose():
    model = build("vit")
    model.register_parameter("mask", torch.nn.Parameter(torch.full((2, 2), float("-inf")), requires_grad=False))
    check_finite(model, step=1)
    model.mask.requires_grad_(True)
    with pytest.raises(StepError, match="`mask` is NaN or infinite"):
        check_finite(model, step=1)
