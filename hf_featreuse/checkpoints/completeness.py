"""Tell whole checkpoints from those that were cut short, and find the newest whole one."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_featreuse.checkpoints.resume_state import resume_state_fault
from hf_featreuse.errors import CheckpointError

logger = logging.get_logger(__name__)

_RECORDS = "torch.distributed.checkpoint.metadata"
# What else the index of a sharded checkpoint is made of, besides the records of that module and dtypes of torch.
_PARTS_OF_RECORDS = {
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}


class _ForeignNameError(pickle.UnpicklingError):
    """A pickle names something that no index of a checkpoint holds."""


class _IndexUnpickler(pickle.Unpickler):
    """Read `.metadata`, a pickle, by its known parts alone: any other name could run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if is_dtype or (module_name, global_name) in _PARTS_OF_RECORDS or module_name == _RECORDS:
            found = super().find_class(module_name, global_name)
            # The module of the records imports others, whose names could be reached through it.
            if module_name != _RECORDS or (isinstance(found, type) and found.__module__ == _RECORDS):
                return found
        raise _ForeignNameError(f"{module_name}.{global_name}")


def checkpoint_fault(folder: str | Path) -> str | None:
    """Say what is wrong with a checkpoint folder, or give `None` for a whole one.

    A file that was cut short is found by its length and its end, without reading it through.

    Raises:
        CheckpointError: the index of a sharded checkpoint, a pickle, names what could run code.
    """
    folder = Path(folder)
    state = folder / TRAINER_STATE_NAME
    if not state.is_file():
        return f"{TRAINER_STATE_NAME}, which is written last, is missing"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut short"
    if fault := resume_state_fault(folder):
        return fault
    return _weights_fault(folder) or _optimizer_fault(folder)


def _weights_fault(folder: Path) -> str | None:
    for path in sorted(folder.rglob("*.safetensors")):
        if not is_whole_safetensors(path):
            return f"{path.name} is cut short"
    for path in sorted(folder.rglob("*.index.json")):
        try:
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except ValueError:
            return f"{path.name} is cut short"
        missing = sorted(shard for shard in shards if not (path.parent / shard).is_file())
        if missing:
            return f"{missing[0]} is missing"
    faults = (_sharded_fault(path) for path in sorted({shard.parent for shard in folder.rglob("*.distcp")}))
    return next(filter(None, faults), None)


def _optimizer_fault(folder: Path) -> str | None:
    # With `save_only_model` there is neither; sharded engines write the optimizer under other names.
    if (folder / "scheduler.pt").is_file() and not [*folder.glob("optimizer*"), *folder.glob("global_step*")]:
        return "optimizer.pt is missing"
    for path in sorted(path for ending in ("*.pt", "*.bin", "*.pth") for path in folder.rglob(ending)):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is cut short"
    return None


def _sharded_fault(folder: Path) -> str | None:
    """Say what is wrong with a folder of `torch.distributed.checkpoint`, whose `.metadata` is written last."""
    if not (folder / ".metadata").is_file():
        return f"{folder.name}/.metadata, which is written last, is missing"
    try:
        with open(folder / ".metadata", "rb") as file:
            parts = (_IndexUnpickler(file).load().storage_data or {}).values()
    except _ForeignNameError as error:
        raise CheckpointError(
            f"{folder / '.metadata'} names {error}, which is no part of a checkpoint and could run code when it is "
            "read. Nothing of it was run. Delete this folder, and resume from a checkpoint of your own."
        ) from error
    except (EOFError, ValueError, pickle.UnpicklingError):
        return f"{folder.name}/.metadata is cut short"
    for name in sorted({part.relative_path for part in parts}):
        path, end = folder / name, max(part.offset + part.length for part in parts if part.relative_path == name)
        if not path.is_file() or path.stat().st_size < end:
            return f"{folder.name}/{name} is {'cut short' if path.is_file() else 'missing'}"
    return None


def newest_whole(run_folder: str | Path, not_after: int | None = None) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint of a run, or `None`, and what is wrong with each of the newer ones."""
    found = [
        (step, path) for path in Path(run_folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (step := _step(path)) >= 0
    ]
    faults = []
    for _, path in sorted((step, path) for step, path in found if not_after is None or step <= not_after)[::-1]:
        fault = checkpoint_fault(path)
        if fault is None:
            return str(path), faults
        faults.append(f"{path} ({fault})")
    return None, faults


def last_whole_checkpoint(run_folder: str | Path, not_after: int | None = None) -> str | None:
    """The newest whole checkpoint of a run; what is passed over is said in a warning.

    Args:
        run_folder (`str` or `Path`): the `output_dir` of a run, with folders `checkpoint-<step>`.
        not_after (`int`, *optional*): leave out checkpoints of later steps.

    Returns:
        `str`: its folder; `None` where there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    path, faults = newest_whole(run_folder, not_after)
    if path is not None:
        if faults:
            logger.warning(f"Resuming from {path}, the last whole checkpoint. Passed over: {'; '.join(faults)}.")
        return path
    if faults:
        raise CheckpointError(
            f"No checkpoint to resume from is whole: {'; '.join(faults)}. Delete them and pass "
            "`resume_from_checkpoint=False`, or another `output_dir`, to start anew."
        )
    return None


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | bool | None:
    """The checkpoint to resume from: the one asked for, or the last whole one before it.

    `True` and `"last"` ask for the newest in `output_dir`.
    """
    if resume_from_checkpoint in (None, False):
        return None
    if resume_from_checkpoint is True or resume_from_checkpoint == "last":
        # Where there is none at all, Trainer's own error says so.
        return last_whole_checkpoint(output_dir) or True
    path = Path(str(resume_from_checkpoint))
    if not path.is_dir():
        raise CheckpointError(
            f"`resume_from_checkpoint={str(path)!r}` is no folder. Pass a folder `checkpoint-<step>` of an earlier "
            "run, or `True` for the newest one in `output_dir`."
        )
    fault = checkpoint_fault(path)
    if fault is None or _step(path) < 0:
        return str(path)
    return last_whole_checkpoint(path.parent, not_after=_step(path))


def _step(path: Path) -> int:
    digits = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(digits) if digits.isdigit() else -1


def is_whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length or length == 0:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)
