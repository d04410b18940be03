"""Failures of a run: which checkpoint is the last complete one, and how to resume from it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from hf_featreuse.checkpoints.completeness import newest_whole
from hf_featreuse.checkpoints.resume_state import resume_state_files
from hf_featreuse.errors import CheckpointError, FeatureReuseError, StepError
from hf_featreuse.method.fsdp import local_part
from hf_featreuse.text import kind_and_text

_FIX = (
    "Lower `learning_rate`, clip gradients with `max_grad_norm`, use bf16 instead of fp16, or look for bad values in "
    "the data."
)


def open_checkpoint(folder: str | Path) -> None:
    """Remove what marks a checkpoint as complete, before files of an earlier run are overwritten one by one."""
    for path in (Path(folder) / TRAINER_STATE_NAME, *resume_state_files(Path(folder))):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def loading(part: str, folder: str | Path | None) -> Iterator[None]:
    """Turn any error of loading a part of a checkpoint into a `CheckpointError`; do nothing if `folder` is `None`."""
    try:
        yield
    except (FeatureReuseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if folder is None:
            raise
        raise CheckpointError(
            f"The {part} of the checkpoint {folder} cannot be loaded: {kind_and_text(error)} Resume with the model, "
            "options and package versions that wrote it, or pass the folder of another checkpoint."
        ) from error


def describe_last_whole(run_folder: str | Path) -> str:
    """Describe from which checkpoint a stopped run can resume."""
    # Without digests: a run that is being stopped has little time to read its files again.
    last, _ = newest_whole(run_folder, digests=False)
    if last is None:
        return f"There is no complete checkpoint in {run_folder} to resume from."
    return f"The last complete checkpoint is {last}; `resume_from_checkpoint=True` resumes from it."


def describe_ranks(rank: int, ranks: int) -> str:
    """Describe which of several processes failed, and that another may have failed first; empty for one process."""
    if ranks == 1:
        return ""
    return (
        f"This is rank {rank} of {ranks} processes; if an exchange between them failed, another one ended first, and "
        "its output shows why. "
    )


def check_writable(run_folder: str | Path) -> None:
    """Raise `CheckpointError` if no checkpoint could be written, before hours of training."""
    try:
        Path(run_folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"`output_dir={str(run_folder)!r}` cannot be written: {error.strerror}. Pass another folder, or pass "
            '`save_strategy="no"` to train without checkpoints.'
        ) from error


def find_not_finite(model: nn.Module) -> str | None:
    """Return the name of a weight that is NaN or infinite, or `None`; of a sharded model this rank's part is checked.

    Frozen parameters are left out: they do not change, and some are infinite on purpose, such as masks.
    """
    for name, parameter in model.named_parameters():
        can_move = parameter.requires_grad and parameter.is_floating_point()
        if can_move and not bool(local_part(parameter).isfinite().all()):
            return name
    return None


def check_finite(model: nn.Module, step: int) -> None:
    """Raise `StepError` if a weight is NaN or infinite; call it in your own loop before you save.

    Args:
        model (`torch.nn.Module`): the model, not wrapped.
        step (`int`): optimizer steps taken.

    Raises:
        StepError: a weight is NaN or infinite.

    Example:
        >>> import torch
        >>> from hf_featreuse import check_finite
        >>> check_finite(torch.nn.Linear(2, 2), step=10)
    """
    if (name := find_not_finite(model)) is not None:
        raise StepError(f"After {step} optimizer steps the weight `{name}` is NaN or infinite. {_FIX}")


def refuse_not_finite(name: str, step: int, run_folder: str | Path) -> NoReturn:
    """Raise `StepError` for a weight that is NaN or infinite: such a model is not worth a checkpoint."""
    raise StepError(
        f"After {step} optimizer steps the weight `{name}` is NaN or infinite, so training was stopped without "
        f"saving this state. {describe_last_whole(run_folder)} {_FIX}"
    )
