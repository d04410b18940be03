"""Checkpoints of the example without a Trainer, and starting anew in the folder of an earlier run."""

from __future__ import annotations

import logging
import shutil
import zipfile
from pathlib import Path

import safetensors
from accelerate import Accelerator
from torch import nn

from hf_featreuse import CheckpointError, FeatureReuseConfig, check_finite

logger = logging.getLogger("run_image_classification")

_NEEDED = ("optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "random_states_0.pkl")


def start_anew(args: FeatureReuseConfig) -> None:
    """Delete the checkpoints of an earlier run, which a new one that is killed would go on from."""
    folder = Path(str(args.output_dir))
    with args.main_process_first(desc="deleting earlier checkpoints"):
        if args.should_save:
            for old in (*folder.glob("checkpoint-*"), *folder.glob("unfinished-*")):
                if old.is_dir():
                    shutil.rmtree(old)
            # Which says that the earlier run is finished.
            (folder / "trainer_state.json").unlink(missing_ok=True)


def save_checkpoint(accelerator: Accelerator, model: nn.Module, step: int, args: FeatureReuseConfig) -> None:
    """Write a checkpoint, unless the weights are lost, and give it its name once it is whole."""
    check_finite(accelerator.unwrap_model(model), step)
    folder = Path(str(args.output_dir)) / f"checkpoint-{step}"
    unfinished = folder.with_name(f"unfinished-{step}")
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        name_checkpoint(unfinished, folder, args.save_total_limit)


def name_checkpoint(unfinished: Path, folder: Path, limit: int | None) -> None:
    """Give a checkpoint its name now that it is whole, and delete the oldest others beyond the limit."""
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    others = [path for path in _checkpoints(folder.parent) if path != folder]
    for old in others[: max(0, len(others) - limit + 1)] if limit else []:
        shutil.rmtree(old)


def find_checkpoint(asked: str | bool | None, output_dir: str | None) -> str | None:
    """The checkpoint to resume from: the one asked for, or with `True` the last whole one."""
    if not asked:
        return None
    last, passed_over = _last_whole(Path(str(output_dir)))
    if asked is True:
        if last is None:
            raise CheckpointError(
                f"No checkpoint in {output_dir} is whole: {'; '.join(passed_over) or 'there is none'}. Pass another "
                "`--output_dir`, or `--overwrite_output_dir` to start anew."
            )
        if passed_over:
            logger.warning(f"Resumes from {last}. Passed over: {'; '.join(passed_over)}.")
        return str(last)
    folder = Path(asked)
    if fault := _fault(folder):
        beside, _ = _last_whole(folder.parent)
        use = f"Pass {beside}, the last whole one." if beside else "Pass a folder `checkpoint-<step>` of this example."
        raise CheckpointError(f"`--resume_from_checkpoint {asked}` cannot be used: {fault}. {use}")
    return str(folder)


def load_checkpoint(accelerator: Accelerator, folder: str) -> None:
    """Take up a checkpoint; one of another model or other options is refused."""
    try:
        accelerator.load_state(folder)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"The checkpoint {folder} does not fit this run: {str(error).splitlines()[0]} Pass the flags that it was "
            "written with, or `--overwrite_output_dir` to start anew."
        ) from error


def _checkpoints(folder: Path) -> list[Path]:
    """Folders `checkpoint-<step>`, in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if _step(path) is not None]
    return sorted(found, key=lambda path: _step(path) or 0)


def _step(path: Path) -> int | None:
    digits = path.name.removeprefix("checkpoint-")
    return int(digits) if path.name.startswith("checkpoint-") and digits.isdigit() else None


def _last_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint, and what is wrong with those after it."""
    faults = []
    for path in reversed(_checkpoints(folder)):
        if (fault := _fault(path)) is None:
            return path, faults
        faults.append(f"{path} ({fault})")
    return None, faults


def _fault(folder: Path) -> str | None:
    """Say why a folder is no whole checkpoint of this example."""
    if not folder.is_dir() or _step(folder) is None:
        return "it is no folder `checkpoint-<step>`"
    if (folder / "trainer_state.json").is_file():
        return "it was written by run_image_classification.py, which goes on from it"
    try:
        with safetensors.safe_open(folder / "model.safetensors", framework="pt"):
            pass
    except (OSError, safetensors.SafetensorError):
        return "model.safetensors is missing or cut short"
    broken = [name for name in _NEEDED if not zipfile.is_zipfile(folder / name)]
    return f"{broken[0]} is missing or cut short" if broken else None
