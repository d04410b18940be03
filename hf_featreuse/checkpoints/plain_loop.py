"""Save and load checkpoints of a loop with accelerate, without a Trainer: each is complete, or it does not exist.

The functions take a run as an object with the attributes of [`Training`]; the loop of
`examples/run_image_classification_no_trainer.py` is one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from hf_featreuse.checkpoints.changed_settings import PlanSource, check_plans, check_scaling
from hf_featreuse.checkpoints.completeness import folder_fault
from hf_featreuse.checkpoints.failures import check_finite
from hf_featreuse.checkpoints.optimizer_state import check_optimizer_state, check_scheduler_state
from hf_featreuse.checkpoints.output_lock import output_lock
from hf_featreuse.checkpoints.resume_state import RESUME_STATE_NAME, read_resume_state, write_resume_state
from hf_featreuse.errors import CheckpointError
from hf_featreuse.method.feature_reuse import FeatureReuse
from hf_featreuse.recipe.weight_average import WeightAverage

logger = logging.getLogger(__name__)

__all__ = ["Training", "find_checkpoint", "hold_folder", "load_checkpoint", "plan_source", "save_checkpoint"]

# In each checkpoint: the settings that decide what its steps did.
PLANS_FILE = "plans.json"
_OPTIMIZER, _SCHEDULER = "optimizer.bin", "scheduler.pt"
_NEEDED = ("model.safetensors", _OPTIMIZER, _SCHEDULER, "random_states_0.pkl", RESUME_STATE_NAME)


class Training(Protocol):
    """What is saved and resumed of a run.

    Args:
        accelerator (`Accelerator`): saves model, optimizer and random states.
        model (`torch.nn.Module`): prepared by the accelerator.
        optimizer (`AcceleratedOptimizer`): prepared by the accelerator.
        scheduler (`LRScheduler`): not prepared.
        average (`WeightAverage`, *optional*): the average of the weights.
        progress (`object`): with the attribute `step` and with `state_dict` and `load_state_dict` for JSON.
        args (`FeatureReuseConfig`): the options of the run.
        plans (`PlanSource`): from [`plan_source`].
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    scheduler: Any
    average: WeightAverage | None
    progress: Any
    args: Any
    plans: PlanSource


def plan_source(reuse: FeatureReuse, args: Any, processes: int) -> PlanSource:
    """Return what determines the plans of a run, to compare it with that of a checkpoint.

    Args:
        reuse (`FeatureReuse`): of the run.
        args (`FeatureReuseConfig`): the options of the run.
        processes (`int`): number of processes that train together.
    """
    blocks = tuple(block.name for block in reuse.blocks)
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    options = {name: getattr(args, name) for name in ("scale_kept", "train_trunk", "frozen_batch_norm")}
    return PlanSource(reuse.schedule, blocks, reuse.trunk_trains, samples, options)


def save_checkpoint(training: Training) -> None:
    """Write a checkpoint into the output folder, give it its name once it is complete, and delete the oldest ones.

    accelerate would save further objects as pickles, and run the code in them when it loads them. Every process must
    call this.

    Args:
        training (`Training`): the run; `args.save_total_limit` checkpoints are kept.

    Raises:
        StepError: weights are NaN or infinite.
    """
    accelerator, step = training.accelerator, training.progress.step
    check_finite(accelerator.unwrap_model(training.model), step)
    folder = Path(str(training.args.output_dir)) / f"checkpoint-{step}"
    unfinished = folder.with_name(f"unfinished-{step}")
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        torch.save(training.scheduler.state_dict(), unfinished / _SCHEDULER)
        if training.average is not None:
            training.average.save(unfinished)
        (unfinished / PLANS_FILE).write_text(json.dumps(training.plans.to_json()), encoding="utf-8")
        write_resume_state(unfinished, training.progress.state_dict())
        name_checkpoint(unfinished, folder, training.args.save_total_limit)


def name_checkpoint(unfinished: Path, folder: Path, limit: int | None) -> None:
    """Give a checkpoint its name now that it is complete, and delete the oldest others beyond the limit."""
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    others = [path for path in _checkpoints(folder.parent) if path != folder]
    for old in others[: max(0, len(others) - limit + 1)] if limit else []:
        shutil.rmtree(old)


def hold_folder(accelerator: Accelerator, args: Any) -> contextlib.AbstractContextManager[None]:
    """Refuse, inside the `with` block, a second run that trains into the output folder.

    Args:
        accelerator (`Accelerator`): of the run.
        args (`FeatureReuseConfig`): the options of the run.
    """
    return output_lock(str(args.output_dir)) if accelerator.is_main_process else contextlib.nullcontext()


def find_checkpoint(asked: str | bool | None, args: Any) -> str | None:
    """Find the checkpoint to resume from.

    Args:
        asked (`str` or `bool`, *optional*): a folder; `True` for the last complete one of the output folder; `None`
            for none.
        args (`FeatureReuseConfig`): the options of the run.

    Returns:
        `str`, *optional*: the folder; `None` if none is asked for.

    Raises:
        CheckpointError: the requested checkpoint is not complete, or none is.
    """
    if not asked:
        return None
    if asked is True:
        last, skipped = _last_whole(Path(str(args.output_dir)))
        if last is None:
            raise CheckpointError(
                f"No checkpoint in {args.output_dir} is complete: {'; '.join(skipped) or 'there is none'}. Pass "
                "another `--output_dir`, or `--overwrite_output_dir` to start a new run."
            )
        if skipped:
            logger.warning(f"Resumes from {last}. Skipped: {'; '.join(skipped)}.")
        return str(last)
    folder = Path(asked)
    if fault := _fault(folder):
        last, _ = _last_whole(folder.parent)
        use = "Pass a folder `checkpoint-<step>` that `save_checkpoint` wrote."
        if last:
            use = f"Pass {last}, the last complete one."
        raise CheckpointError(f"`--resume_from_checkpoint {asked}` cannot be used: {fault}. {use}")
    return str(folder)


def load_checkpoint(training: Training, folder: str) -> None:
    """Load a checkpoint, unless it is of another model or other options.

    Args:
        training (`Training`): the run, as it was when the checkpoint was written: before an epoch, or inside it when
            iteration of the data loader has started.
        folder (`str`): from [`find_checkpoint`].

    Raises:
        ConfigurationError: the steps of the checkpoint would have differed under the options of this run.
        CheckpointError: the checkpoint does not fit the run.
    """
    check_settings(Path(folder), training.plans)
    model = training.accelerator.unwrap_model(training.model)
    check_optimizer_state(Path(folder, _OPTIMIZER), model, training.optimizer.optimizer)
    check_scheduler_state(Path(folder, _SCHEDULER), training.scheduler)
    try:
        training.accelerator.load_state(folder)
        training.scheduler.load_state_dict(torch.load(Path(folder) / _SCHEDULER, weights_only=True))
        training.progress.load_state_dict(read_resume_state(folder))
        averages = training.average is not None
        if averages != (Path(folder) / "averaged.safetensors").is_file():
            raise ValueError(f"it holds {'no' if averages else 'an'} average of the weights.")
        if training.average is not None:
            training.average.load(folder)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {folder} does not fit this run: {str(error).splitlines()[0]} Pass the flags that it was "
            "written with, or `--overwrite_output_dir` to start a new run."
        ) from error


def check_settings(folder: Path, plans: PlanSource) -> None:
    """Refuse a checkpoint whose steps would have differed under the settings of this run."""
    if not (folder / PLANS_FILE).is_file():
        logger.warning(
            f"The checkpoint {folder} records no settings of feature reuse, so changed ones, such as `scale_kept`, "
            "which is on by default now, go unnoticed."
        )
        return
    try:
        saved: Mapping[str, Any] = json.loads((folder / PLANS_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / PLANS_FILE} is not JSON. Pass another checkpoint.") from error
    check_scaling(saved, plans.options["scale_kept"])
    changed = check_plans(PlanSource.from_json(saved), plans, _step(folder) or 0)
    if changed is not None:
        logger.warning(changed)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the folders `checkpoint-<step>`, in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if _step(path) is not None]
    return sorted(found, key=lambda path: _step(path) or 0)


def _step(path: Path) -> int | None:
    digits = path.name.removeprefix("checkpoint-")
    return int(digits) if path.name.startswith("checkpoint-") and digits.isdigit() else None


def _last_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the last complete checkpoint, and what is wrong with later ones."""
    faults = []
    for path in reversed(_checkpoints(folder)):
        if (fault := _fault(path)) is None:
            return path, faults
        faults.append(f"{path} ({fault})")
    return None, faults


def _fault(folder: Path) -> str | None:
    """Return why a folder is not a complete checkpoint of a plain loop; `None` if it is."""
    if not folder.is_dir() or _step(folder) is None:
        return "it is not a folder `checkpoint-<step>`"
    if (folder / "trainer_state.json").is_file():
        return "it was written by FeatureReuseTrainer, which can resume from it"
    if foreign := sorted(path.name for path in folder.glob("custom_checkpoint_*")):
        return f"{foreign[0]} could run code when it is read, and `save_checkpoint` does not write it"
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    return f"{missing[0]} is missing" if missing else folder_fault(folder)
