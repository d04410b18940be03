"""Check that the optimizer and scheduler state of a checkpoint fits the run, before any of it is loaded.

torch 2.13 checks only the number of parameters and accepts moments of any shape: they are broadcast into the weights,
or a fused optimizer reads outside of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_featreuse.checkpoints.contents import FaultError, read_torch
from hf_featreuse.errors import CheckpointError, ConfigurationError
from hf_featreuse.method.fsdp import complete_state
from hf_featreuse.text import kind_and_text

# Entries of schedulers that only some versions of torch have.
_OPTIONAL = {"_is_initial", "_get_lr_called_within_step", "_last_lr", "_step_count", "verbose"}


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Return the class of an optimizer as a checkpoint records it."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def check_same_optimizer(saved: object, optimizer: torch.optim.Optimizer) -> None:
    """Raise `ConfigurationError` if another class of optimizer wrote a checkpoint; older ones do not record it."""
    if isinstance(saved, str) and saved != (now := optimizer_name(optimizer)):
        raise ConfigurationError(
            f"The checkpoint was written with the optimizer {saved}, but this run has {now}, which keeps different "
            "moments. Pass the `optim` of that run to resume, or start a new run from the weights of the checkpoint "
            "with `from_pretrained`."
        )


def check_optimizer_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise `CheckpointError` unless the moments in a checkpoint are those of the parameters that train.

    The expected shapes come from the optimizer itself: from the state that a step without gradients creates.

    Args:
        path (`Path`): the optimizer state in a checkpoint; nothing is checked if it is missing.
        model (`torch.nn.Module`): the model, not wrapped.
        optimizer (`torch.optim.Optimizer`): new, not wrapped by accelerate.
    """
    if not path.is_file():
        return
    saved = _read(path)
    groups, own = saved["param_groups"], optimizer.param_groups
    sizes, own_sizes = [len(group["params"]) for group in groups], [len(group["params"]) for group in own]
    if sizes != own_sizes:
        raise _misfit(path, f"it has groups of {sizes} parameters, but the optimizer has groups of {own_sizes}")
    try:
        _expected(model, optimizer)
    except Exception:
        # An optimizer that cannot take such a step: it needs a closure, or is in evaluation mode.
        return
    before = copy.copy(optimizer.state_dict())
    try:
        # With the options of the checkpoint, which decide what moments there are.
        optimizer.load_state_dict({"state": {}, "param_groups": groups})
        expected = _expected(model, optimizer)
    except Exception as error:
        raise _misfit(path, f"its options are those of another optimizer ({kind_and_text(error)})") from error
    finally:
        optimizer.load_state_dict(before)
    pairs = zip((key for group in groups for key in group["params"]), _parameters(optimizer), strict=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for key, parameter in pairs:
        state, wanted = saved["state"].get(key), expected.get(parameter)
        # A block that never trained has no moments.
        if state and wanted is not None:
            _compare(path, names.get(id(parameter), str(key)), state, wanted)


def _compare(path: Path, name: str, state: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if state.keys() != wanted.keys():
        raise _misfit(
            path,
            f"for {name!r} it holds {sorted(map(str, state))}, but the optimizer keeps {sorted(map(str, wanted))}",
        )
    for key, shape in wanted.items():
        value = state[key]
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        # Counts are numbers or tensors of one number, depending on the version of torch.
        is_count = shape in (None, ()) and found in (None, ()) and not isinstance(value, (str, dict))
        if found != shape and not is_count:
            raise _misfit(path, f"`{key}` of {name!r} has shape {found}, but that of the optimizer has shape {shape}")


def _expected(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Any, dict[str, Any]]:
    """Return, for each parameter, the shapes of the state that a step creates; `None` for what is not a tensor."""
    with complete_state(model, optimizer):
        return {
            parameter: {
                key: tuple(value.shape) if isinstance(value, torch.Tensor) else None for key, value in state.items()
            }
            for parameter, state in optimizer.state.items()
        }


def _parameters(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_scheduler_state(path: Path, scheduler: Any) -> None:
    """Raise `CheckpointError` unless a checkpoint holds the entries of the run's scheduler, with the same types."""
    if not path.is_file():
        return
    saved, own = _read(path), scheduler.state_dict()
    missing = sorted(own.keys() - saved.keys() - _OPTIONAL)
    # `load_state_dict` sets every entry as an attribute, and one could hide a method.
    foreign = sorted(key for key in saved.keys() - own.keys() - _OPTIONAL if hasattr(scheduler, key))
    if missing or foreign:
        raise _misfit(
            path, f"{(missing or foreign)[0]!r} is {'missing' if missing else 'not an entry of this scheduler'}"
        )
    for key in own.keys() & saved.keys():
        if not _same_form(saved[key], own[key]):
            raise _misfit(path, f"the value of {key!r} is {str(saved[key])[:80]!r}")


def _same_form(saved: Any, own: Any) -> bool:
    numbers = (int, float, type(None), torch.Tensor)
    if isinstance(own, numbers):
        return isinstance(saved, numbers) and not (isinstance(saved, torch.Tensor) and saved.numel() != 1)
    if isinstance(own, (list, tuple)):
        same = isinstance(saved, (list, tuple)) and len(saved) == len(own)
        return same and all(_same_form(a, b) for a, b in zip(saved, own, strict=True))
    return isinstance(saved, type(own))


def _read(path: Path) -> Any:
    try:
        return read_torch(path)
    except FaultError as error:
        raise CheckpointError(f"{path.parent} cannot be resumed from: {error}. Pass another checkpoint.") from error


def _misfit(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} does not fit this run: {reason}. Nothing of it was loaded. Resume with the model, `optim` and "
        "`lr_scheduler_type` that wrote it, with `layer_decay` if it had it, or pass the folder of another checkpoint."
    )
