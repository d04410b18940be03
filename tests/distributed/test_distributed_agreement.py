"""Ranks that disagree stop at the start, all with one error; launches with missing processes are reported."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import DistributedDataParallelKwargs
from distributed_runs import arguments, free_port, rank, run_on_ranks
from tiny_models import build, examples
from torch import nn

from hf_featreuse import FeatureReuseSchedule, FeatureReuseTrainer
from hf_featreuse.distributed import find_lone_launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


class OtherSchedule(FeatureReuseSchedule):
    """The same settings, another class."""


class Holder:
    """Its repr holds an address, which differs between processes."""


class OneRankOtherTrainer(FeatureReuseTrainer):
    def get_schedule(self, num_blocks: int, max_steps: int) -> FeatureReuseSchedule:
        schedule = OtherSchedule if rank() else FeatureReuseSchedule
        return schedule(num_blocks, seed=5)


class AddressTrainer(FeatureReuseTrainer):
    def get_schedule(self, num_blocks: int, max_steps: int) -> FeatureReuseSchedule:
        schedule = super().get_schedule(num_blocks, max_steps)
        schedule.holder = Holder()
        return schedule


class OneRankFailsTrainer(FeatureReuseTrainer):
    def get_residual_blocks(self, model: nn.Module) -> Any:
        if rank() == 1:
            raise OSError("the disk of rank 1 is gone")
        return super().get_residual_blocks(model)


class OwnOptionsTrainer(FeatureReuseTrainer):
    """Passes its own DDP options to accelerate."""

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True, static_graph=True)]
        return {**super()._build_accelerator_args(**kwargs), "kwargs_handlers": handlers}


def starts(
    folder: Path,
    trainer_class: type[FeatureReuseTrainer] = FeatureReuseTrainer,
    other: dict | None = None,
    **changed: Any,
) -> str:
    """Train two steps; rank 1 with the options `other`."""
    options = {**changed, **(other or {})} if rank() else changed
    trainer = trainer_class(build("vit"), arguments(folder, max_steps=2, **options), train_dataset=examples())
    trainer.train()
    return "trained"


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "same": starts,
    "address": partial(starts, trainer_class=AddressTrainer),
    "seed": partial(starts, other={"reuse_seed": 6}),
    "rate": partial(starts, other={"drop_rate": 0.25}),
    "blocks": partial(starts, other={"target_blocks": ["layers.0", "layers.1"]}),
    "trunk": partial(starts, other={"train_trunk": True}),
    "class": partial(starts, trainer_class=OneRankOtherTrainer),
    "failure": partial(starts, trainer_class=OneRankFailsTrainer),
    "static_graph": partial(starts, ddp_static_graph=True),
    "static_graph_by_accelerate": partial(starts, trainer_class=OwnOptionsTrainer),
    "no_search": partial(starts, ddp_find_unused_parameters=False),
    "plain_training": partial(
        starts, stochastic_depth_steps=0, masked_freeze_steps=0, ddp_find_unused_parameters=False
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_on_ranks(SCENARIOS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["same", "address", "plain_training"])
def test_ranks_that_agree_train(name: str, results: dict[str, list[Any]]) -> None:
    assert results[name] == ["trained", "trained"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seed", "seed: 5 on rank 0, 6 on rank 1"),
        ("rate", r"drop rates: \(0\.5, .*\) on rank 0, \(0\.25, .*\) on rank 1"),
        ("blocks", r"blocks: \[.*layers\.3'\] on rank 0, \[.*layers\.1'\] on rank 1"),
        ("trunk", "options: .*'train_trunk': 'none'.* on rank 0, .*'train_trunk': 'all'"),
        ("class", "class of the schedule: .*FeatureReuseSchedule' on rank 0, .*OtherSchedule' on rank 1"),
    ],
)
def test_ranks_that_differ_stop_with_the_same_error(name: str, message: str, results: dict[str, list[Any]]) -> None:
    first, second = results[name]
    assert first == second
    assert first[0] == "ConfigurationError"
    assert re.search(f"The ranks do not agree .*{message}.*Start every rank with the same", first[1]), first[1]


def test_a_rank_that_cannot_start_stops_the_others(results: dict[str, list[Any]]) -> None:
    first, second = results["failure"]
    assert second == ("OSError", "the disk of rank 1 is gone")
    assert first[0] == "ConfigurationError"
    assert "rank 1 (OSError: the disk of rank 1 is gone)" in first[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("static_graph", "`static_graph=True` promises"),
        ("static_graph_by_accelerate", "`static_graph=True` promises"),
        ("no_search", "`find_unused_parameters=False` promises"),
    ],
)
def test_options_of_ddp_that_cannot_work_are_refused(name: str, message: str, results: dict[str, list[Any]]) -> None:
    for error, text in results[name]:
        assert error == "ConfigurationError"
        assert text.startswith(message)


# Launches


@pytest.mark.parametrize(
    ("environment", "num_processes", "message"),
    [
        ({}, 1, None),
        ({"WORLD_SIZE": "1"}, 1, None),
        ({"WORLD_SIZE": "2"}, 2, None),
        ({"WORLD_SIZE": ""}, 1, None),
        ({"WORLD_SIZE": "2"}, 1, r"started 2 processes \(WORLD_SIZE=2\).*world size of 1.*--use_cpu"),
        ({"WORLD_SIZE": "4"}, 2, r"started 4 processes \(WORLD_SIZE=4\).*world size of 2"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 1, r"OMPI_COMM_WORLD_SIZE=3"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1, None),
        ({"MASTER_ADDR": "127.0.0.1"}, 1, None),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, 1, "but started one.*torchrun"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "a", "WORLD_SIZE": "2"}, 2, None),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "a", "WORLD_SIZE": "1"}, 1, None),
    ],
)
def test_a_lone_launch_is_found(environment: dict[str, str], num_processes: int, message: str | None) -> None:
    found = find_lone_launch(environment, num_processes)
    assert (found is None) == (message is None)
    assert message is None or re.search(message, found), found


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    "multi_gpu": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
    "accelerate_cpu": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port"],
}
TINY = "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=16"


def launch(name: str, folder: Path, *flags: str, succeeds: bool = True) -> str:
    command = [sys.executable, *LAUNCHERS[name], str(free_port()), str(ROOT / "examples/run_image_classification.py")]
    command += ["--output_dir", str(folder), "--config_overrides", TINY, "--max_steps", "3", "--logging_steps", "1"]
    command += ["--eval_strategy", "no", "--save_strategy", "no", "--max_eval_samples", "64", *flags]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TRANSFORMERS_VERBOSITY": "warning",
        "CUDA_VISIBLE_DEVICES": "",
    }
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(variable, None)
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    assert (result.returncode == 0) is succeeds, result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "multi_gpu"])
def test_the_example_runs_on_two_processes(name: str, tmp_path: Path) -> None:
    output = launch(name, tmp_path, "--use_cpu", "true")
    assert "do not exchange gradients" not in output
    assert (tmp_path / "model.safetensors").is_file()
    assert "train_loss" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message", "succeeds"),
    [
        # Two processes that train separately would write into one folder.
        ("torchrun", "error: The launcher started 2 processes", False),
        ("accelerate_cpu", "was asked for several processes", True),
    ],
)
def test_a_launch_that_trains_in_one_process_warns(name: str, message: str, succeeds: bool, tmp_path: Path) -> None:
    assert message in launch(name, tmp_path, succeeds=succeeds)
