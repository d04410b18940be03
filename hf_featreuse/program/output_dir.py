"""Check the output folder of a run, and find the checkpoint to resume from."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hf_featreuse.checkpoints.output_lock import LOCK_NAME, output_lock
from hf_featreuse.errors import ConfigurationError
from hf_featreuse.folders import new_folder
from hf_featreuse.program.arguments import Options
from hf_featreuse.program.config_file import RUN_FILE
from hf_featreuse.text import flat, one_line
from hf_featreuse.trainer.arguments import FeatureReuseConfig

# Values of `--resume_from_checkpoint` for the newest checkpoint.
_LAST = ("last", "True", "true", True)
# Files that a run leaves if it ends before its first checkpoint.
_LEFT_BEHIND = (LOCK_NAME, RUN_FILE)


def check_output_dir(options: Options) -> str | bool | None:
    """Raise for a folder that is not writable, or contains a finished run or checkpoints of a run not resumed.

    Returns:
        `str` or `bool`, *optional*: the checkpoint to resume from; `True` for the last complete one in the folder.

    Raises:
        ConfigurationError: the folder cannot be used.
    """
    args = options.training
    folder = Path(str(args.output_dir))
    _check_writable(folder)
    asked = args.resume_from_checkpoint
    if args.do_train and options.run.overwrite_output_dir:
        if asked and (asked in _LAST or Path(asked).resolve().parent == folder.resolve()):
            raise ConfigurationError(
                f"`--resume_from_checkpoint {asked}` resumes the run in {folder}, whose checkpoints "
                "`--overwrite_output_dir` deletes. Pass one of them."
            )
        return asked
    if args.do_train:
        _check_unfinished(folder, args)
        if not asked:
            _check_empty(folder)
    return True if asked in _LAST else asked


def _check_writable(folder: Path) -> None:
    try:
        # A later failure must not leave an empty folder.
        with new_folder(folder, keep=False), tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # The second for a null character.
        raise ConfigurationError(
            f"`--output_dir {flat(folder)}` cannot be written: {one_line(error)} Pass another folder."
        ) from None


def _check_unfinished(folder: Path, args: FeatureReuseConfig) -> None:
    state_file = folder / "trainer_state.json"
    if not state_file.is_file():
        return
    state: dict[str, Any] = json.loads(state_file.read_text(encoding="utf-8"))
    is_longer = args.max_steps > state["global_step"] or (
        args.max_steps <= 0 and args.num_train_epochs > state["num_train_epochs"]
    )
    if state["global_step"] >= state["max_steps"] and not is_longer:
        raise ConfigurationError(
            f"`--output_dir {folder}` contains a finished run of {state['global_step']} steps. Pass another folder, "
            "`--overwrite_output_dir` to train again, more epochs and `--resume_from_checkpoint last` to continue, or "
            f"`--do_eval` with `--model_name_or_path {folder}` to evaluate it."
        )


def _check_empty(folder: Path) -> None:
    if not folder.is_dir():
        return
    if any(path.is_dir() for path in folder.glob("checkpoint-*")):
        # Not resumed automatically: the checkpoints may belong to another run.
        raise ConfigurationError(
            f"`--output_dir {folder}` contains checkpoints. Pass `--resume_from_checkpoint last` to resume from the "
            "last one, `--overwrite_output_dir` to start a new run, or another folder."
        )
    if any(path.name not in _LEFT_BEHIND for path in folder.iterdir()):
        raise ConfigurationError(
            f"`--output_dir {folder}` is not empty and contains no checkpoint. Pass another folder, or "
            "`--overwrite_output_dir` to write into this one."
        )


def delete_checkpoints(args: FeatureReuseConfig) -> None:
    """Delete the checkpoints of an earlier run, so that a new run that is killed does not resume from them."""
    folder = Path(str(args.output_dir))
    with args.main_process_first(desc="deleting earlier checkpoints"):
        if not args.should_save:
            return
        with output_lock(folder):  # Raises if another run is still writing here.
            for old in (*folder.glob("checkpoint-*"), *folder.glob("unfinished-*")):
                if old.is_dir():
                    shutil.rmtree(old)
            # This file marks the earlier run as finished.
            (folder / "trainer_state.json").unlink(missing_ok=True)
