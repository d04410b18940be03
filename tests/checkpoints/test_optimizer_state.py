"""The moments of a checkpoint fit the parameters, or it is refused before any of it is loaded."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import same_bits
from transformers import get_scheduler
from transformers.optimization import Adafactor

from hf_featreuse import CheckpointError, ConfigurationError
from hf_featreuse.checkpoints.optimizer_state import (
    check_optimizer_state,
    check_same_optimizer,
    check_scheduler_state,
    optimizer_name,
)

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "adamax": torch.optim.Adamax,
    "adafactor": lambda parameters: Adafactor(parameters, lr=0.1, relative_step=False),
}


def trained(make: Callable, frozen: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model after a step; with `frozen` its last layer has never trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = make(list(model.parameters()))
    (model[:2] if frozen else model)(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def check(tmp_path: Path, make: Callable, state: dict[str, Any]) -> None:
    torch.save(state, tmp_path / "optimizer.pt")
    model, _ = trained(make)
    fresh = make(list(model.parameters()))
    before, weights = copy.deepcopy(fresh.state_dict()), copy.deepcopy(model.state_dict())
    try:
        check_optimizer_state(tmp_path / "optimizer.pt", model, fresh)
    finally:
        assert same_bits(fresh.state_dict(), before)
        assert same_bits(dict(model.state_dict()), dict(weights))


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "one never trained"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_that_an_optimizer_wrote_fits(name: str, frozen: bool, tmp_path: Path) -> None:
    check(tmp_path, OPTIMIZERS[name], trained(OPTIMIZERS[name], frozen)[1].state_dict())


@pytest.mark.parametrize("shape", [(), (1,), (2, 2), "more", "a word"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_another_shape_are_refused(name: str, shape: Any, tmp_path: Path) -> None:
    state = trained(OPTIMIZERS[name])[1].state_dict()
    moments = state["state"][0]
    key = next(key for key, value in moments.items() if isinstance(value, torch.Tensor) and value.ndim)
    if isinstance(shape, str):
        moments[key] = torch.zeros(3, *moments[key].shape) if shape == "more" else shape
    else:
        moments[key] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match="Nothing of it was loaded"):
        check(tmp_path, OPTIMIZERS[name], state)


@pytest.mark.parametrize(("old", "new"), [("adamw", "momentum"), ("momentum", "adamw"), ("adamw", "adamax")])
def test_another_optimizer_gives_one_clear_error(old: str, new: str, tmp_path: Path) -> None:
    _, optimizer = trained(OPTIMIZERS[old])
    with pytest.raises(CheckpointError, match="does not fit this run"):
        check(tmp_path, OPTIMIZERS[new], optimizer.state_dict())
    check_same_optimizer(None, optimizer)
    with pytest.raises(ConfigurationError, match=r"was written with the optimizer torch\.optim.*Pass the `optim`"):
        check_same_optimizer(optimizer_name(optimizer), trained(OPTIMIZERS[new])[1])


@pytest.mark.parametrize("change", ["a group less", "a parameter less", "a learning rate in words", "no options"])
def test_groups_of_another_model_or_form_are_refused(change: str, tmp_path: Path) -> None:
    state = trained(torch.optim.AdamW)[1].state_dict()
    group = state["param_groups"][0]
    if change == "a group less":
        state["param_groups"] = []
    elif change == "a parameter less":
        group["params"].pop()
    elif change == "a learning rate in words":
        group["betas"] = "fast"
    else:
        state["param_groups"] = [{"params": group["params"]}]
    with pytest.raises(CheckpointError):
        check(tmp_path, torch.optim.AdamW, state)


def scheduler(name: str) -> Any:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    return get_scheduler(name, optimizer, 2, 10)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "reduce_lr_on_plateau"])
def test_the_state_of_a_scheduler_fits_or_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "scheduler.pt"
    check_scheduler_state(path, scheduler(name))  # There is none.
    torch.save(scheduler(name).state_dict(), path)
    check_scheduler_state(path, scheduler(name))
    good = scheduler(name).state_dict()
    for bad in ({}, {**good, "last_epoch": "x"}, {**good, "step": 3}, {**good, "optimizer": 3}):
        torch.save(bad, path)
        with pytest.raises(CheckpointError, match="does not fit this run"):
            check_scheduler_state(path, scheduler(name))


def test_another_kind_of_scheduler_is_refused(tmp_path: Path) -> None:
    torch.save(scheduler("linear").state_dict(), tmp_path / "scheduler.pt")
    with pytest.raises(CheckpointError, match="is missing"):
        check_scheduler_state(tmp_path / "scheduler.pt", scheduler("reduce_lr_on_plateau"))
