"""Scaled training on two processes, with DDP and with FSDP2, is that of one process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import run_on_ranks, watched
from sharded_runs import run_sharded
from tiny_architectures import ARCHITECTURES
from tiny_models import build
from torch import nn

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1, "max_steps": 8, "train_trunk": "all"}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
# The model, and the options of the run.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "resnet": ("resnet", {}),
    "bit": ("bit", {}),
    "vit_checkpointing": ("vit", {"activation_checkpointing": True}),
    "resnet_accumulation": ("resnet", {"gradient_accumulation_steps": 2}),
    "vit_head": ("vit", {"train_trunk": "head"}),
    "resnet_compiled": ("resnet", COMPILED),
    "resnet_bf16": ("resnet", {"bf16": True}),
}
# FSDP2 does not run them.
BY_SAMPLE: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_by_sample": ("vit", {"drop_granularity": "sample"}),
    "bit_by_sample": ("bit", {"drop_granularity": "sample"}),
}
DDP = {f"ddp_{name}": run for name, run in {**RUNS, **BY_SAMPLE}.items()}
FSDP = {f"fsdp_{name}": run for name, run in RUNS.items()}


def made(name: str) -> nn.Module:
    """A model without BatchNorm, whose statistics depend on how a batch is shared out."""
    if name == "bit":
        return next(case for case in ARCHITECTURES if case.name == "bit-bottleneck").build()
    model = build(name)
    for part, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(part, nn.GroupNorm(1, module.num_features))
    return model


def replicated(folder: Path, name: str) -> dict[str, Any]:
    architecture, options = DDP[name]
    return watched(folder, made(architecture), watch=False, **{**SGD, **options})


def in_shards(folder: Path, name: str) -> dict[str, Any]:
    architecture, options = FSDP[name]
    return run_sharded(folder, made(architecture), watch=False, **{**SGD, **options})


# DDP comes first: accelerate keeps the kind of engine for the process.
SCENARIOS = {
    **{name: partial(replicated, name=name) for name in DDP},
    **{name: partial(in_shards, name=name) for name in FSDP},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_on_ranks(SCENARIOS, tmp_path_factory.mktemp("ranks"))


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_give_what_one_process_gives(name: str, results: dict[str, list[Any]], tmp_path: Path) -> None:
    architecture, options = {**DDP, **FSDP}[name]
    assert isinstance(results[name][0], dict), results[name][0]
    together = results[name][0]["states"]
    alone = watched(tmp_path, made(architecture), watch=False, **{**SGD, **options})["states"]
    assert len(alone) == len(together) == 8
    differences = [largest_difference(*states) for states in zip(alone, together, strict=True)]
    print(f"{name}: largest difference of a weight {max(differences):.1e}")
    # A ReLU at zero can turn rounding into more.
    assert max(differences) < (2e-6 if architecture == "vit" else 5e-4)


@pytest.mark.parametrize("architecture", ["vit", "resnet", "bit"])
def test_a_run_that_is_not_scaled_ends_elsewhere(architecture: str, results: dict[str, list[Any]], tmp_path: Path):
    plain = watched(tmp_path, made(architecture), watch=False, scale_kept=False, **SGD)["states"]
    for engine in ("ddp", "fsdp"):
        scaled = results[f"{engine}_{architecture}"][0]["states"]
        difference = largest_difference(scaled[-1], plain[-1])
        print(f"{engine}, {architecture}: differs by {difference:.1e}")
        assert difference > 1e-3


@pytest.mark.parametrize("name", DDP)
def test_both_ranks_hold_the_same_weights(name: str, results: dict[str, list[Any]]) -> None:
    first, second = (run["states"][-1] for run in results[name])
    assert all(torch.equal(first[key], second[key]) for key in first)
