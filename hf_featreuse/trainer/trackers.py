"""Log a plot of the schedule to trackers that support images: tensorboard, Weights & Biases, trackio.

Scalars reach every tracker of Trainer through `FeatureReuseTrainer.log`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.method.schedule import FeatureReuseSchedule
from hf_featreuse.plotting import plot_training
from hf_featreuse.trainer.console import Run

logger = logging.get_logger(__name__)

SCHEDULE_FILE = "schedule.png"
_NAME = "feature_reuse/schedule"


class SchedulePicture(TrainerCallback):
    """Plots the whole schedule before the first step, when it is known, and logs it to the trackers.

    `schedule.png` in `output_dir` is written only if a run of such a tracker is open and matplotlib is installed. If
    plotting fails, a warning is logged and training continues.

    Args:
        run (`FeatureReuseTrainer`): the trainer; it adds this callback itself.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._is_due = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Schedule the plot for the first step: trackers later in the list of callbacks open their runs after this."""
        self._is_due = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Plot and log the schedule, once per run."""
        due, self._is_due = self._is_due, False
        if due and state.is_world_process_zero:
            try:
                self._draw(args, state)
            except Exception as error:
                logger.warning(f"Plotting the schedule failed; training continues: {error}", exc_info=True)

    def _draw(self, args: Any, state: Any) -> None:
        trackers = [callback for callback in self.run.callback_handler.callbacks if _is_open(callback)]
        reuse = self.run.feature_reuse
        if not trackers or reuse is None or not reuse.blocks:
            return
        if type(reuse.schedule) is not FeatureReuseSchedule:
            # A schedule of the user may depend on past training, and planning ahead may change its state.
            return
        names = [block.name for block in reuse.blocks]
        path = Path(args.output_dir) / SCHEDULE_FILE
        try:
            plot_training([{"step": state.max_steps}], reuse.schedule, path, block_names=names)
        except ConfigurationError as error:
            logger.info(f"No plot of the schedule: {error}")
            return
        for tracker in trackers:
            _log_picture(tracker, path, state.global_step)


def _is_open(callback: TrainerCallback) -> bool:
    """Return whether a callback is a tracker that supports images and has opened its run."""
    if isinstance(callback, TensorBoardCallback):
        return callback.tb_writer is not None
    if isinstance(callback, WandbCallback):
        import wandb

        return wandb.run is not None
    return isinstance(callback, TrackioCallback) and callback._initialized


def _log_picture(tracker: TrainerCallback, path: Path, step: int) -> None:
    """Log a PNG to the run that a callback of transformers has opened."""
    if isinstance(tracker, TensorBoardCallback):
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert tracker.tb_writer is not None
        tracker.tb_writer.add_image(_NAME, pixels, step, dataformats="HWC")
    elif isinstance(tracker, WandbCallback):
        import wandb

        wandb.log({_NAME: wandb.Image(str(path)), "train/global_step": step})
    else:
        import trackio  # pyright: ignore[reportMissingImports]  # optional: its Pillow is older than the one tested

        trackio.log({_NAME: trackio.Image(str(path)), "train/global_step": step})
