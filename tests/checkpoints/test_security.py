"""The table of SECURITY.md, row by row: a pickle that creates a folder is put in each place, and no folder appears."""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_resume import resumable
from test_weights import adapter_trainer
from tiny_models import build
from training_runs import train
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_featreuse import CheckpointError, FeatureReuseError
from hf_featreuse.checkpoints.completeness import checkpoint_fault
from hf_featreuse.checkpoints.resume_state import write_resume_state
from hf_featreuse.checkpoints.weights import load_weights
from hf_featreuse.data.loading import load_image_data
from hf_featreuse.hub.folders import check_folder_to_push

ROOT = Path(__file__).parents[2]


class Harmful:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path: Path):
    """A path that exists at the end only if a pickle was read."""
    path = tmp_path / "trace"
    pickle.loads(pickle.dumps(Harmful(path)))
    path.rmdir()
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(resumable("vit", folder, max_steps=1, ema_decay=0.5))
    return folder / "checkpoint-1"


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "checkpoint-1"))


def refused(checkpoint: Path) -> None:
    """Recompute the digests from the changed files, as a forger could."""
    with contextlib.suppress(ValueError):
        state = json.loads((checkpoint / "resume_state.json").read_text())
        write_resume_state(checkpoint, {k: v for k, v in state.items() if k not in ("files", "digest")})
    trainer = resumable("vit", checkpoint.parent / "again", ema_decay=0.5, save_strategy="no")
    with pytest.raises(CheckpointError):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def both(trace: Path) -> list[bytes]:
    """A plain pickle, and one in a file of `torch.save`."""
    path = trace.with_name("harmful.pt")
    torch.save({"state": Harmful(trace)}, path)
    return [pickle.dumps(Harmful(trace)), path.read_bytes()]


def test_the_table_has_a_test_for_each_row() -> None:
    lines = (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and line.count("|") == 5][1:]
    assert [row.split(",")[0].split(" of ")[0] for row in rows] == list(ROWS)
    assert all(callable(test) for test in ROWS.values())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_model_weights(name: str, checkpoint: Path, trace: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    for content in both(trace):
        (checkpoint / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            load_weights(build("vit"), checkpoint)
        with pytest.raises(Exception):  # noqa: B017 - of transformers
            AutoModelForImageClassification.from_pretrained(checkpoint)
        refused(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_configuration_and_image_processor(name: str, checkpoint: Path, trace: Path) -> None:
    for content in both(trace):
        (checkpoint / name).write_bytes(content)
        for kind in (AutoModelForImageClassification, AutoImageProcessor):
            with contextlib.suppress(OSError, ValueError):
                kind.from_pretrained(checkpoint)
        refused(checkpoint)


def test_adapters(tmp_path: Path, trace: Path) -> None:
    train(adapter_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1))
    folder = tmp_path / "checkpoint-1"
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        (folder / "adapter_model.safetensors").unlink(missing_ok=True)
        (folder / "resume_state.json").unlink(missing_ok=True)
        for content in both(trace):
            (folder / name).write_bytes(content)
            with pytest.raises(CheckpointError):
                adapter_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(folder))


def test_images(tmp_path: Path, trace: Path) -> None:
    folder = tmp_path / "images"
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        for index, content in enumerate(both(trace)):
            (folder / name / f"{index}.png").write_bytes(content)
    (folder / "images.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    with pytest.raises(FeatureReuseError):
        data = load_image_data(dataset_name=str(folder))
        [row for split in data.splits.values() for row in split]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"])
def test_optimizer_and_other_states(name: str, checkpoint: Path, trace: Path) -> None:
    for content in both(trace):
        (checkpoint / name).write_bytes(content)
        refused(checkpoint)


def test_moving_average(checkpoint: Path, trace: Path) -> None:
    for content in both(trace):
        (checkpoint / "averaged.safetensors").write_bytes(content)
        refused(checkpoint)


@pytest.mark.parametrize("name", ["resume_state.json", "trainer_state.json"])
def test_log_state_and_progress(name: str, checkpoint: Path, trace: Path) -> None:
    for content in both(trace):
        (checkpoint / name).write_bytes(content)
        refused(checkpoint)


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0/.metadata", "optimizer_0/__0_0.distcp"])
def test_sharded_states(name: str, checkpoint: Path, trace: Path) -> None:
    """Values in shards: `test_completeness.py`."""
    path = checkpoint / name
    path.parent.mkdir()
    for content in both(trace):
        path.write_bytes(content)
        refused(checkpoint)


def test_checkpoint_of_the_example_without_a_trainer(tmp_path: Path, trace: Path) -> None:
    from hf_featreuse.checkpoints import plain_loop as example

    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    build("vit").save_pretrained(folder)
    for name in ("optimizer.bin", "scheduler.pt", "random_states_0.pkl"):
        torch.save({}, folder / name)
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.pt"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        for content in both(trace):
            (folder / name).write_bytes(content)
            write_resume_state(folder, {})
            assert example._fault(folder) is not None
        if before is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(before)
    # accelerate reads random states by `torch.load(weights_only=True)`, and leaves them out if it cannot.
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(pickle.dumps(Harmful(trace)))
    assert "could run code" in example._fault(folder)


def test_model_card(checkpoint: Path, trace: Path) -> None:
    text = f"---\nlicense: !!python/object/apply:os.mkdir [{str(trace)!r}]\n---\n# x\n"
    (checkpoint / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(FeatureReuseError):
        check_folder_to_push(checkpoint, "ada/x")


def test_what_nothing_reads(checkpoint: Path, trace: Path) -> None:
    for content in both(trace):
        (checkpoint / "custom_checkpoint_0.pkl").write_bytes(content)
        assert checkpoint_fault(checkpoint) is None
    (checkpoint / "training_args.bin").write_bytes(both(trace)[1])
    resumed = resumable("vit", checkpoint.parent / "again", ema_decay=0.5, save_strategy="no", max_steps=2)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 2


ROWS: dict[str, Callable] = {
    "model weights": test_model_weights,
    "configuration": test_configuration_and_image_processor,
    "adapters": test_adapters,
    "images": test_images,
    "optimizer": test_optimizer_and_other_states,
    "moving average": test_moving_average,
    "log state": test_log_state_and_progress,
    "sharded states": test_sharded_states,
    "checkpoint": test_checkpoint_of_the_example_without_a_trainer,
    "model card": test_model_card,
}
