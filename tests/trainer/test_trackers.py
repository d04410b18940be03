"""What trackers get, read back from what each wrote: scalars by kind of step, and a plot of the schedule."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import build, examples
from training_runs import config, train
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback

from hf_featreuse import FeatureReuseTrainer
from hf_featreuse.data.metrics import build_compute_metrics
from hf_featreuse.trainer.trackers import SCHEDULE_FILE

pytestmark = pytest.mark.slow
PICTURE = "feature_reuse/schedule"
SCALARS = {
    *("train/loss", "train/loss/stochastic_depth", "train/loss/masked_freeze", "train/dropped_blocks"),
    *("train/compute_share", "eval/accuracy"),
}
# A separate process: trackers read their settings from the environment when they are imported, and leave threads.
PROGRAM = """
import sys
sys.path[:0] = {folders!r}
from test_trackers import tracked
tracked({folder!r}, {tracker!r})
"""


def tracked(folder, tracker):
    """Train a few steps with one tracker."""
    args = config(
        Path(folder) / "out", report_to=[tracker], logging_steps=2, eval_strategy="steps", eval_steps=6,
        project="featreuse-test", run_name="first", trackio_static_space_id=False,
    )  # fmt: skip
    data = {"train_dataset": examples(), "eval_dataset": examples(8)}
    return train(FeatureReuseTrainer(build("vit"), args, **data, compute_metrics=build_compute_metrics()))


def in_a_process(tmp_path, tracker, **environment):
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    program = PROGRAM.format(folders=folders, folder=str(tmp_path), tracker=tracker)
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    picture = tmp_path / "out" / SCHEDULE_FILE
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tracked(str(tmp_path), "tensorboard")
    events = EventAccumulator(str(next((tmp_path / "out" / "runs").iterdir())))
    events.Reload()
    assert SCALARS <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == [PICTURE]
    assert events.Images(PICTURE)[0].width == 1200
    for name in ("compute_share", "loss/masked_freeze"):
        found = [event.value for event in events.Scalars(f"train/{name}")]
        logged = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert found == pytest.approx(logged)


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    in_a_process(tmp_path, "wandb", WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DIR=str(tmp_path))
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = folder.glob("*.wandb")
    logged = record.read_bytes()
    assert not [name for name in SCALARS if name.encode() not in logged]
    pictures = list((folder / "files" / "media" / "images").rglob("*.png"))
    assert len(pictures) == 1
    assert pictures[0].read_bytes() == (tmp_path / "out" / SCHEDULE_FILE).read_bytes()


def test_trackio(tmp_path):
    pytest.importorskip("trackio", "0.40")
    in_a_process(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    program = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
print("LOGS" + json.dumps(SQLiteStorage.get_logs("featreuse-test", "first"), default=str))
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    logs = json.loads(result.stdout.split("LOGS")[1])
    assert SCALARS | {PICTURE} <= set().union(*logs)
    assert list((tmp_path / "trackio").rglob("*.png"))


class HalfOpen(TrackioCallback):
    """Opens no run."""

    def setup(self, *args, **kwargs):
        pass

    def on_log(self, *args, **kwargs):
        pass


def test_a_tracker_that_is_added_later_gets_the_picture_and_one_without_a_run_none(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("trackio", "0.40")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path, max_steps=1), train_dataset=examples(8))
    trainer.add_callback(HalfOpen)
    train(trainer)
    assert not (tmp_path / SCHEDULE_FILE).exists()
    trainer.add_callback(TensorBoardCallback)
    train(trainer)
    events = EventAccumulator(str(next((tmp_path / "runs").iterdir())))
    events.Reload()
    assert events.Tags()["images"] == [PICTURE]


def test_a_picture_that_fails_is_a_warning(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / SCHEDULE_FILE).mkdir()
    args = config(tmp_path, report_to=["tensorboard"], max_steps=1)
    with caplog.at_level("WARNING", logger="hf_featreuse"):
        trainer = train(FeatureReuseTrainer(build("vit"), args, train_dataset=examples(8)))
    assert trainer.state.global_step == 1
    assert "Plotting the schedule failed" in caplog.text


def test_without_a_tracker_nothing_is_drawn(tmp_path):
    train(FeatureReuseTrainer(build("vit"), config(tmp_path), train_dataset=examples()))
    assert not (tmp_path / SCHEDULE_FILE).exists()
