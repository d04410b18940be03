"""Read the files of a checkpoint without running code, and report what is wrong with them.

A checkpoint may come from elsewhere. Nothing is unpickled here except by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

# JSON files that resuming reads, or that are written with the weights.
_JSON_FILES = ("*config.json", "*.index.json")
_TORCH_FILES = (".pt", ".pth", ".bin")


class FaultError(Exception):
    """What is wrong with a checkpoint, worded to follow its path; raised and caught only in this package."""


def walk(folder: Path) -> Iterator[Path]:
    """Yield every path in a checkpoint folder that is not a directory; follow links, read each directory once.

    Checkpoints inside, as in the folder of a run, are not part of it.
    """
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"))
        for name in sorted(names):
            yield Path(parent, name)


def check_contents(folder: Path) -> None:
    """Raise `FaultError` unless every file of a known name or ending can be read and holds the right content.

    Tensors are mapped, not read: this finds files of the wrong kind and files that were cut short, not changed bytes.
    """
    for path in walk(folder):
        if not path.is_file():
            raise FaultError(f"{path.name} is neither a file nor a link to one")
        if path.suffix == ".safetensors":
            check_safetensors(path)
        elif path.suffix in _TORCH_FILES:
            _check_torch_file(path)
        elif any(fnmatchcase(path.name, pattern) for pattern in _JSON_FILES):
            content = read_json(path)
            if path.name.endswith(".index.json"):
                _check_index(path, content)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise `FaultError` if it holds anything else."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise FaultError(f"{path.name} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise FaultError(f"{path.name} is not JSON") from error
    except (ValueError, RecursionError) as error:
        cut = not text.rstrip().endswith("}")
        raise FaultError(f"{path.name} is cut short" if cut else f"{path.name} is not JSON") from error
    if not isinstance(content, dict):
        raise FaultError(f"{path.name} holds a {type(content).__name__} instead of a JSON object")
    return content


def check_safetensors(path: Path) -> None:
    """Raise `FaultError` unless a file matches its header and has the full length."""
    try:
        with safetensors.safe_open(path, framework="pt"):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        # safetensors refuses a header of more than 100 MB, so such a number is not its length.
        cut = 0 <= length <= 10**8 and length != 0 and path.stat().st_size < 8 + length
        cut = cut or path.stat().st_size < 8 or "not fully covered" in str(error)
        raise FaultError(f"{path.name} is cut short" if cut else f"{path.name} is not a safetensors file") from error


def read_torch(path: Path) -> Any:
    """Return what `torch.save` wrote, with mapped tensors; raise `FaultError` if it cannot be read safely."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if not zipfile.is_zipfile(path):
            cut = start in (b"", b"P", b"PK")
            raise FaultError(f"{path.name} is cut short" if cut else f"{path.name} is not a file of `torch.save`")
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise FaultError(
            f"{path.name} holds more than tensors and plain values, which could run code when it is read"
        ) from error
    except FaultError:
        raise
    # For bad data torch raises errors of many classes.
    except Exception as error:
        raise FaultError(f"{path.name} is damaged ({type(error).__name__})") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights that `torch.save` wrote to a file; raise `FaultError` if it holds anything else."""
    content = read_torch(path)
    _check_tensors(path.name, content)
    return content


def _check_torch_file(path: Path) -> None:
    check = next((check for pattern, check in _TORCH_CHECKS.items() if fnmatchcase(path.name, pattern)), None)
    if check is not None:
        check(path.name, read_torch(path))
    elif not zipfile.is_zipfile(path):
        # A file of an engine, or `training_args.bin`: nothing here reads it.
        raise FaultError(f"{path.name} is cut short")


def _check_index(path: Path, content: Mapping[str, Any]) -> None:
    """Check an index of sharded weights, and that each shard exists."""
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise FaultError(f"{path.name} does not map weights to files")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise FaultError(f"{path.name} names {shard}, which is not in this folder")
        if not (path.parent / shard).is_file():
            raise FaultError(f"{shard} is missing")


def _check_optimizer(name: str, content: Any) -> None:
    _check_mapping(name, content)
    groups, state = content.get("param_groups"), content.get("state")
    if not isinstance(state, dict) or not all(isinstance(value, dict) for value in state.values()):
        raise FaultError(f"{name} holds no optimizer state")
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise FaultError(f"{name} holds no groups of parameters")
    keys = [key for group in groups for key in group["params"]]
    if not all(isinstance(key, (int, str)) for key in keys) or not state.keys() <= set(keys):
        raise FaultError(f"{name} holds moments of parameters that are not in its groups")


def _check_mapping(name: str, content: Any) -> None:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise FaultError(f"{name} is not a dictionary with string keys")


def _check_tensors(name: str, content: Any) -> None:
    _check_mapping(name, content)
    if not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise FaultError(f"{name} holds more than tensors")


def _check_random_state(name: str, content: Any) -> None:
    """Try the states in spare generators: a wrong state raises there, or would later read outside its memory."""
    _check_mapping(name, content)
    try:
        random.Random().setstate(content["python"])
        kind, keys, position, *_ = content["numpy"]
        if kind != "MT19937" or keys.shape != (624,) or not 0 <= position <= 624:
            raise ValueError(position)
        np.random.RandomState().set_state(content["numpy"])
        torch.Generator().set_state(content["cpu"].clone())
    except Exception as error:
        raise FaultError(f"{name} holds no random state") from error


_TORCH_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "optimizer.pt": _check_optimizer,
    "optimizer.bin": _check_optimizer,
    "scheduler.pt": _check_mapping,
    "scaler.pt": _check_mapping,
    "rng_state*.pth": _check_random_state,
    "pytorch_model*.bin": _check_tensors,
    "adapter_model.bin": _check_tensors,
}
