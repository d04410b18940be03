"""Check that a checkpoint is complete and unchanged, and find the newest complete one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_featreuse.checkpoints.contents import FaultError, check_contents, check_safetensors, read_json
from hf_featreuse.checkpoints.resume_state import check_files, check_resume_state, resaved_weights
from hf_featreuse.checkpoints.sharded import check_sharded
from hf_featreuse.errors import CheckpointError

logger = logging.get_logger(__name__)

_STEP = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)")
_NUMBER, _NONE = (int, float), type(None)
# The entries of its state file that Trainer reads, with the types it needs.
_STATE = {
    "global_step": int,
    "train_batch_size": int,
    "epoch": (*_NUMBER, _NONE),
    "log_history": list,
    "best_metric": (*_NUMBER, _NONE),
    "best_global_step": (int, _NONE),
    "best_model_checkpoint": (str, _NONE),
    "total_flos": _NUMBER,
    "num_input_tokens_seen": _NUMBER,
    "stateful_callbacks": dict,
}


def checkpoint_fault(folder: str | Path, *, digests: bool = True) -> str | None:
    """Describe what is wrong with a checkpoint folder; `None` for a complete one. No code in it is run.

    Args:
        folder (`str` or `Path`): the checkpoint folder.
        digests (`bool`, defaults to `True`): read all files to find changed bytes. If `False`, only files that are
            missing, cut short or of the wrong kind are found.
    """
    folder = Path(folder)
    try:
        check_sharded(folder)
        state = folder / TRAINER_STATE_NAME
        if not state.is_file():
            raise FaultError(f"{TRAINER_STATE_NAME}, which is written last, is missing")
        trainer_state = read_json(state)
        _check_trainer_state(trainer_state)
        check_contents(folder)
        check_resume_state(folder, trainer_state)
        # `save_only_model` writes neither; sharded engines write the optimizer under other names.
        if (folder / "scheduler.pt").is_file() and not [*folder.glob("optimizer*"), *folder.glob("global_step*")]:
            raise FaultError("optimizer.pt is missing")
        check_files(folder, digests=digests)
    except FaultError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror or error})"
    return None


def folder_fault(folder: Path) -> str | None:
    """Describe what is wrong with a checkpoint of a loop without a Trainer, or return `None`. No code in it is run."""
    try:
        check_sharded(folder)
        check_contents(folder)
        check_files(folder)
    except FaultError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror or error})"
    return None


def _check_trainer_state(state: dict[str, Any]) -> None:
    wrong = [name for name, kinds in _STATE.items() if name in state and not isinstance(state[name], kinds)]
    wrong += [name for name in ("global_step", "train_batch_size") if name not in state]
    # `isinstance(True, int)` holds.
    wrong += [name for name in ("global_step", "train_batch_size") if isinstance(state.get(name), bool)]
    if wrong:
        raise FaultError(f"{TRAINER_STATE_NAME} lacks {wrong[0]}, or holds a value of another type")
    if state["global_step"] < 0 or not all(isinstance(entry, dict) for entry in state.get("log_history", [])):
        raise FaultError(f"{TRAINER_STATE_NAME} does not hold the state of a run")
    if unknown := sorted(state.keys() - TrainerState.__dataclass_fields__.keys()):
        raise FaultError(
            f"{TRAINER_STATE_NAME} holds {unknown[0]!r}, which this version of transformers does not know"
        )


def newest_whole(
    run_folder: str | Path, not_after: int | None = None, *, digests: bool = True
) -> tuple[str | None, list[str]]:
    """Return the newest complete checkpoint of a run, or `None`, and what is wrong with each of the newer ones."""
    found = [
        (step, path) for path in Path(run_folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (step := _step(path)) >= 0
    ]
    faults = []
    for _, path in sorted((step, path) for step, path in found if not_after is None or step <= not_after)[::-1]:
        fault = checkpoint_fault(path, digests=digests)
        if fault is None:
            return str(path), faults
        faults.append(f"{path} ({fault})")
    return None, faults


def last_whole_checkpoint(run_folder: str | Path, not_after: int | None = None) -> str | None:
    """Return the newest complete checkpoint of a run, and warn of newer ones that are skipped.

    Args:
        run_folder (`str` or `Path`): the `output_dir` of a run, with folders `checkpoint-<step>`.
        not_after (`int`, *optional*): leave out checkpoints of later steps.

    Returns:
        `str`: its folder; `None` if there is no checkpoint at all.

    Raises:
        CheckpointError: no checkpoint is complete.
    """
    path, faults = newest_whole(run_folder, not_after)
    if path is not None:
        if faults:
            logger.warning(f"Resuming from {path}, the last complete checkpoint. Skipped: {'; '.join(faults)}.")
        return path
    if faults:
        raise CheckpointError(
            f"No checkpoint to resume from is complete: {'; '.join(faults)}. Pass the folder of another checkpoint, "
            "or pass `resume_from_checkpoint=False` and another `output_dir` to start a new run."
        )
    return None


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """Return the checkpoint to resume from: the one that is named, or with `True` or `"last"` the newest complete one.

    Raises:
        CheckpointError: the one that is named is not complete, or there is none.
    """
    if resume_from_checkpoint in (None, False):
        return None
    if resume_from_checkpoint is True or resume_from_checkpoint == "last":
        found = last_whole_checkpoint(output_dir)
        if found is None:
            raise CheckpointError(
                f"No valid checkpoint found in output directory ({output_dir}). Pass the folder of a checkpoint, or "
                "pass `resume_from_checkpoint=False` to start a new run."
            )
    else:
        found = str(resume_from_checkpoint)
        _check_named(found)
    if names := resaved_weights(Path(found)):
        logger.warning(
            f"The weights in {found} were saved again after the checkpoint was written ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}), so they have no digest and cannot be verified."
        )
    return found


def _check_named(asked: str) -> None:
    """Raise `CheckpointError` unless a checkpoint that was asked for by its path is complete."""
    path = Path(asked)
    if not asked or not path.is_dir():
        raise CheckpointError(
            f"`resume_from_checkpoint={asked!r}` is not a directory. Pass a folder `checkpoint-<step>` of an "
            "earlier run, or pass `True` for the newest one in `output_dir`."
        )
    if (fault := checkpoint_fault(path)) is not None:
        earlier, _ = newest_whole(path.parent, _step(path) - 1) if _step(path) >= 0 else (None, [])
        use = "Pass the folder of another checkpoint"
        if earlier:
            use = f"Pass `resume_from_checkpoint={earlier!r}`, the last complete one before it"
        raise CheckpointError(
            f"The checkpoint {path} cannot be resumed from: {fault}. {use}, or leave out `resume_from_checkpoint` to "
            "start a new run."
        )


def _step(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def is_whole_safetensors(path: Path) -> bool:
    """Return whether a file matches its header and has the full length."""
    try:
        check_safetensors(path)
    except FaultError:
        return False
    return True
