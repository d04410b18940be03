"""Check folders of `torch.distributed.checkpoint` before torch reads them.

torch 2.13 unpickles the index of such a folder, `.metadata`, and every value in its shards that is not a tensor.
Either could run code, so both are checked here: the index by the classes it consists of, the values by
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from hf_featreuse.checkpoints.contents import FaultError, walk

_INDEX = ".metadata"
_SHARD = ".distcp"
_RECORDS = "torch.distributed.checkpoint.metadata"
# What an index consists of in addition to the records of that module and dtypes of torch.
_PARTS_OF_RECORDS = {
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}


class _ForeignNameError(pickle.UnpicklingError):
    """A pickle names something that does not belong in the index of a checkpoint."""


class _IndexUnpickler(pickle.Unpickler):
    """Read only the known parts of an index: any other name could run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if is_dtype or (module_name, global_name) in _PARTS_OF_RECORDS or module_name == _RECORDS:
            found = super().find_class(module_name, global_name)
            # The module of the records imports others, which could be reached through it.
            if module_name != _RECORDS or (isinstance(found, type) and found.__module__ == _RECORDS):
                return found
        raise _ForeignNameError(f"{module_name}.{global_name}")


def check_sharded(folder: Path) -> None:
    """Raise `FaultError` unless every index in a folder, at any depth, is safe to read and its shards are complete.

    The case of names is ignored: on some file systems torch opens `.METADATA` as `.metadata`.
    """
    paths = list(walk(folder))
    indices = [path for path in paths if path.name.lower().endswith(_INDEX)]
    for path in indices:
        _check_index(path, f"{path.parent.name}/{path.name}")
    for parent in sorted({path.parent for path in paths if path.name.lower().endswith(_SHARD)}):
        if not any(path.parent == parent for path in indices):
            raise FaultError(f"{parent.name}/{_INDEX}, which is written last, is missing")


def _check_index(path: Path, name: str) -> None:
    if not path.is_file():
        raise FaultError(f"{name} is neither a file nor a link to one")
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except _ForeignNameError as error:
        raise FaultError(
            f"{name} names {error}, which is not a part of a checkpoint and could run code when it is read; none of "
            "it was run"
        ) from error
    # For bad data pickle raises errors of many classes.
    except Exception as error:
        raise FaultError(f"{name} is cut short") from error
    try:
        _check_shards(path.parent, index)
    except FaultError:
        raise
    except Exception as error:
        raise FaultError(f"{name} does not describe shards") from error


def _check_shards(folder: Path, index: Metadata) -> None:
    """Raise `FaultError` for a shard that is missing or cut short, or for a value in one that could run code."""
    if not isinstance(index, Metadata):
        raise TypeError(type(index))
    kinds = index.state_dict_metadata
    for place, part in sorted(index.storage_data.items(), key=lambda item: (item[1].relative_path, item[1].offset)):
        path, name = folder / part.relative_path, f"{folder.name}/{part.relative_path}"
        if Path(part.relative_path).name != part.relative_path or getattr(part, "transform_descriptors", None):
            raise FaultError(f"{name} is not a plain shard in this folder")
        if not path.is_file():
            raise FaultError(f"{name} is missing")
        if part.offset < 0 or part.length < 0 or path.stat().st_size < part.offset + part.length:
            raise FaultError(f"{name} is cut short")
        if isinstance(kinds[place.fqn], BytesStorageMetadata):
            with path.open("rb") as file:
                file.seek(part.offset)
                value = io.BytesIO(file.read(part.length))
            try:
                torch.load(value, weights_only=True)
            except Exception as error:
                raise FaultError(
                    f"{name} holds under {place.fqn!r} a value that is damaged or could run code when it is read; "
                    "none of it was run"
                ) from error
