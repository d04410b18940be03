"""The state that a checkpoint holds in addition to Trainer's own files: sums behind the logs, settings, digests.

transformers 5.23 keeps these sums only in memory, so the first `loss` after a resume differs. One small JSON file per
rank is written before `trainer_state.json`, which completes a checkpoint. It records an xxh3 digest of each file that
resuming reads, and of itself, so that changed bytes and files of another step or run are found.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_featreuse.checkpoints.changed_settings import PlanSource
from hf_featreuse.checkpoints.contents import FaultError, read_json, walk
from hf_featreuse.errors import CheckpointError, ConfigurationError

RESUME_STATE_NAME = "resume_state.json"
# Endings of the files that an exact resume needs; `.metadata` is the index of sharded ones.
_NEEDED = (".safetensors", ".pt", ".pth", ".bin", ".pkl", ".distcp", ".metadata")
# Resuming does not read it, and a checkpoint on the Hub lacks it: it may hold a token.
_SPARE = "training_args.bin"
# Written by one rank each; all others are written by the rank that saves.
_OF_A_RANK = re.compile(r"(?:rng_state_|random_states_|__)(\d+)\b.*|__(\d+)_.*")
# One file or shards: these may be saved again in the other form.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
# Files that resuming would read although nothing recorded them.
_READ_IF_THERE = (
    *("model.safetensors", "adapter_model.safetensors", "averaged.safetensors"),
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
)
_NUMBER, _NONE = (int, float), type(None)
# The sums behind the logs, and what may still be pending at the end of an epoch.
_SUMS = {
    "loss": _NUMBER,
    "total_loss": (*_NUMBER, _NONE),
    "last_logged": int,
    "at_epoch_end": bool,
    "due": list,
}
# Entries of `trainer_state.json` that resuming relies on and nobody edits.
_TRAINER_STATE = (
    *("global_step", "epoch", "log_history", "train_batch_size", "best_metric", "best_global_step"),
    *("total_flos", "num_input_tokens_seen"),
)


def write_resume_state(
    folder: str | Path, state: Mapping[str, Any], rank: int = 0, ranks: int = 1, *, saves: bool = True
) -> None:
    """Write the state of one rank with digests of the files that it wrote, and flush them to disk.

    Args:
        folder (`str` or `Path`): the checkpoint folder, to which every rank has written its files.
        state (`dict`): values that JSON holds exactly: numbers, strings, lists, dictionaries with string keys.
        rank (`int`, defaults to 0): of this process.
        ranks (`int`, defaults to 1): number of processes; with more than one each writes its own file.
        saves (`bool`, defaults to `True`): whether this rank wrote the files that belong to no single rank.

    Example:
        >>> import tempfile
        >>> from hf_featreuse.checkpoints.resume_state import read_resume_state, write_resume_state
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_resume_state(folder, {"loss": 0.1})
        ...     read_resume_state(folder)["loss"]
        0.1
    """
    folder = Path(folder)
    files = {}
    for path in _needed_files(folder):
        match = _OF_A_RANK.fullmatch(path.name)
        own = saves if match is None or ranks == 1 else int(match[1] or match[2]) == rank
        if own and path.name != _SPARE:
            flush(path)
            files[path.relative_to(folder).as_posix()] = file_digest(path)
    record = {**state, "files": files}
    record["digest"] = _digest_of(record)
    path = _path(folder, rank, ranks)
    path.write_text(json.dumps(record), encoding="utf-8")
    flush(path)


def read_resume_state(folder: str | Path, rank: int = 0, ranks: int = 1) -> dict[str, Any] | None:
    """Return the state of one rank, as [`write_resume_state`] wrote it; `None` if the checkpoint has none for it."""
    path = _path(Path(folder), rank, ranks)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def resume_state_files(folder: Path) -> list[Path]:
    """Return the files of all ranks."""
    return sorted(folder.glob(f"{Path(RESUME_STATE_NAME).stem}*.json"))


def trainer_state_digest(state: Mapping[str, Any]) -> str:
    """Return a digest of `trainer_state.json` without the paths and settings that may change."""
    return _digest_of({name: state.get(name) for name in _TRAINER_STATE})


def check_resume_state(folder: Path, trainer_state: Mapping[str, Any]) -> None:
    """Raise `FaultError` if a resume state in a checkpoint of Trainer was changed, or is of another step."""
    digest, step = trainer_state_digest(trainer_state), trainer_state.get("global_step")
    for path in resume_state_files(folder):
        record = read_json(path)
        if wrong := [name for name, kinds in _SUMS.items() if not isinstance(record.get(name), kinds)]:
            raise FaultError(f"{path.name} lacks {wrong[0]}, or holds a value of another type")
        if (plans := record.get("plans")) is not None:
            try:
                PlanSource.from_json(plans)
            except CheckpointError as error:
                raise FaultError(f"{path.name} holds settings of feature reuse that cannot be read") from error
            except ConfigurationError:
                pass  # Of another version: not damaged, and refused with the reason when settings are compared.
        if record.get("step", step) != step:
            raise FaultError(f"{path.name} is of step {record['step']}, but {TRAINER_STATE_NAME} is of step {step}")
        if record.get("trainer_state", digest) != digest:
            raise FaultError(f"{TRAINER_STATE_NAME} is not the one that was saved with {path.name}")


def check_files(folder: Path, *, digests: bool = True) -> None:
    """Raise `FaultError` if the files of a checkpoint are not those that its resume states recorded.

    Args:
        folder (`Path`): the checkpoint folder.
        digests (`bool`, defaults to `True`): read all files and compare digests. If `False`, only check that they
            exist.
    """
    files: dict[str, str | None] = {}
    for path in resume_state_files(folder):
        files |= _recorded(path.name, read_json(path))
    resaved = _resaved(folder, files)
    for name, digest in files.items():
        if name == _SPARE or name in resaved:
            continue
        if not (folder / name).is_file():
            raise FaultError(f"{name} is missing")
        if digests and digest is not None and file_digest(folder / name) != digest:
            raise FaultError(f"{name} is not the file that was saved: its content has changed")
    if any(files.values()):
        for path in sorted(folder.iterdir()):
            added = path.name not in files and not (resaved and _is_weights(path.name))
            if added and any(fnmatchcase(path.name, pattern) for pattern in _READ_IF_THERE):
                raise FaultError(f"{path.name} was added after the checkpoint was written")


def resaved_weights(folder: Path) -> list[str]:
    """Return the names of weight files that were saved again in another form, such as shards, and have no digest."""
    files = [name for path in resume_state_files(folder) for name in read_json(path)["files"]]
    return sorted(path.name for path in folder.iterdir() if _is_weights(path.name)) if _resaved(folder, files) else []


def _resaved(folder: Path, files: Mapping[str, Any] | list[str]) -> set[str]:
    """Return the recorded weight files if all of them are gone and other, complete weights took their place."""
    recorded = {name for name in files if _is_weights(name)}
    there = {path.name for path in folder.iterdir() if _is_weights(path.name)}
    # Shards without an index are only a part of the weights.
    complete = there & {"model.safetensors", "pytorch_model.bin"} or list(folder.glob("*.index.json"))
    return recorded if recorded and there and not recorded & there and complete else set()


def _is_weights(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)


def _recorded(name: str, record: dict[str, Any]) -> dict[str, str | None]:
    """Return the files that a state recorded, with their digests; states of older versions have none."""
    if "digest" in record and record["digest"] != _digest_of({k: v for k, v in record.items() if k != "digest"}):
        raise FaultError(f"{name} is not the file that was saved: its content has changed")
    files = record.get("files")
    if isinstance(files, list) and all(isinstance(file, str) for file in files):
        files = dict.fromkeys(files)
    elif not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise FaultError(f"{name} does not name the files of the checkpoint")
    if any(Path(file).is_absolute() or ".." in Path(file).parts for file in files):
        raise FaultError(f"{name} names files outside the checkpoint")
    return files


def _needed_files(folder: Path) -> Iterator[Path]:
    return (path for path in walk(folder) if path.name.endswith(_NEEDED))


def file_digest(path: Path) -> str:
    """Return the xxh3 digest of a file."""
    digest, buffer = xxhash.xxh3_128(), bytearray(2**22)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    # Keys become strings first, as in a file, so that they can be sorted.
    as_read = json.loads(json.dumps(content))
    return xxhash.xxh3_128_hexdigest(json.dumps(as_read, sort_keys=True).encode())


def flush(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    if not path.is_dir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return
    # Not every system can open directories, and not every file system flushes them.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def flush_checkpoint(state: TrainerState) -> Iterator[None]:
    """Flush a checkpoint to disk when Trainer completes it, before it deletes older ones."""

    def save_to_json(json_path: str) -> None:
        TrainerState.save_to_json(state, json_path)
        folder = Path(json_path).parent
        for path in (*folder.iterdir(), folder, folder.parent):
            flush(path)

    # Trainer has no hook between the two.
    state.save_to_json = save_to_json
    try:
        yield
    finally:
        del state.save_to_json


def _path(folder: Path, rank: int, ranks: int) -> Path:
    name = Path(RESUME_STATE_NAME)
    return folder / (name.name if ranks == 1 else f"{name.stem}_{rank}{name.suffix}")
