"""Checkpoints of the example without a Trainer, and starting a new run in the folder of an earlier one."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from pathlib import Path

import safetensors
from accelerate import Accelerator
from torch import nn

from hf_featreuse import CheckpointError, FeatureReuse, FeatureReuseConfig, check_finite
from hf_featreuse.checkpoints import PlanSource, check_plans, check_scaling

logger = logging.getLogger("run_image_classification")

# In each checkpoint: the settings that decide what its steps did.
PLANS_FILE = "plans.json"
_NEEDED = ("optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "random_states_0.pkl")


def start_anew(args: FeatureReuseConfig) -> None:
    """Delete the checkpoints of an earlier run, from which a new one that is killed would resume."""
    folder = Path(str(args.output_dir))
    with args.main_process_first(desc="deleting earlier checkpoints"):
        if args.should_save:
            for old in (*folder.glob("checkpoint-*"), *folder.glob("unfinished-*")):
                if old.is_dir():
                    shutil.rmtree(old)
            # This file marks the earlier run as finished.
            (folder / "trainer_state.json").unlink(missing_ok=True)


def plan_source(reuse: FeatureReuse, args: FeatureReuseConfig, processes: int) -> PlanSource:
    """What the steps of a run follow from, to compare with a checkpoint's."""
    blocks = tuple(block.name for block in reuse.blocks)
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    options = {name: getattr(args, name) for name in ("scale_kept", "train_trunk", "frozen_batch_norm")}
    return PlanSource(reuse.schedule, blocks, reuse.trunk_trains, samples, options)


def save_checkpoint(
    accelerator: Accelerator, model: nn.Module, step: int, args: FeatureReuseConfig, plans: PlanSource
) -> None:
    """Write a checkpoint, unless the weights are lost, and give it its name once it is complete."""
    check_finite(accelerator.unwrap_model(model), step)
    folder = Path(str(args.output_dir)) / f"checkpoint-{step}"
    unfinished = folder.with_name(f"unfinished-{step}")
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / PLANS_FILE).write_text(json.dumps(plans.to_json()), encoding="utf-8")
        name_checkpoint(unfinished, folder, args.save_total_limit)


def name_checkpoint(unfinished: Path, folder: Path, limit: int | None) -> None:
    """Give a checkpoint its name now that it is complete, and delete the oldest others beyond the limit."""
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    others = [path for path in _checkpoints(folder.parent) if path != folder]
    for old in others[: max(0, len(others) - limit + 1)] if limit else []:
        shutil.rmtree(old)


def find_checkpoint(asked: str | bool | None, output_dir: str | None) -> str | None:
    """The checkpoint to resume from: the one asked for, or with `True` the last complete one."""
    if not asked:
        return None
    last, skipped = _last_whole(Path(str(output_dir)))
    if asked is True:
        if last is None:
            raise CheckpointError(
                f"No checkpoint in {output_dir} is complete: {'; '.join(skipped) or 'there is none'}. Pass another "
                "`--output_dir`, or `--overwrite_output_dir` to start a new run."
            )
        if skipped:
            logger.warning(f"Resumes from {last}. Skipped: {'; '.join(skipped)}.")
        return str(last)
    folder = Path(asked)
    if fault := _fault(folder):
        beside, _ = _last_whole(folder.parent)
        use = "Pass a folder `checkpoint-<step>` of this example."
        if beside:
            use = f"Pass {beside}, the last complete one."
        raise CheckpointError(f"`--resume_from_checkpoint {asked}` cannot be used: {fault}. {use}")
    return str(folder)


def load_checkpoint(accelerator: Accelerator, folder: str, plans: PlanSource) -> None:
    """Load a checkpoint; one of another model or other options is refused."""
    check_settings(Path(folder), plans)
    try:
        accelerator.load_state(folder)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"The checkpoint {folder} does not fit this run: {str(error).splitlines()[0]} Pass the flags that it was "
            "written with, or `--overwrite_output_dir` to start a new run."
        ) from error


def check_settings(folder: Path, plans: PlanSource) -> None:
    """Refuse a checkpoint whose steps would have been others under the settings of this run."""
    if not (folder / PLANS_FILE).is_file():
        logger.warning(
            f"The checkpoint {folder} records no settings of feature reuse, so changed ones, such as `scale_kept`, "
            "which is on by default now, go unnoticed."
        )
        return
    saved = json.loads((folder / PLANS_FILE).read_text(encoding="utf-8"))
    check_scaling(saved, plans.options["scale_kept"])
    changed = check_plans(PlanSource.from_json(saved), plans, _step(folder) or 0)
    if changed is not None:
        logger.warning(changed)


def _checkpoints(folder: Path) -> list[Path]:
    """Folders `checkpoint-<step>`, in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if _step(path) is not None]
    return sorted(found, key=lambda path: _step(path) or 0)


def _step(path: Path) -> int | None:
    digits = path.name.removeprefix("checkpoint-")
    return int(digits) if path.name.startswith("checkpoint-") and digits.isdigit() else None


def _last_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The last complete checkpoint, and what is wrong with those after it."""
    faults = []
    for path in reversed(_checkpoints(folder)):
        if (fault := _fault(path)) is None:
            return path, faults
        faults.append(f"{path} ({fault})")
    return None, faults


def _fault(folder: Path) -> str | None:
    """Why a folder is not a complete checkpoint of this example; `None` if it is."""
    if not folder.is_dir() or _step(folder) is None:
        return "it is not a folder `checkpoint-<step>`"
    if (folder / "trainer_state.json").is_file():
        return "it was written by run_image_classification.py, which can resume from it"
    try:
        with safetensors.safe_open(folder / "model.safetensors", framework="pt"):
            pass
    except (OSError, safetensors.SafetensorError):
        return "model.safetensors is missing or cut short"
    broken = [name for name in _NEEDED if not zipfile.is_zipfile(folder / name)]
    return f"{broken[0]} is missing or cut short" if broken else None
