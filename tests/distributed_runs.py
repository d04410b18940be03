"""Two gloo processes that run scenarios for the tests, and what watches them."""

import datetime
import faulthandler
import os
import shutil
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tiny_models import build, examples
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import StepWatch, config, state_of
from transformers import TrainerCallback

from hf_featreuse import FeatureReuseTrainer

RANKS = 2
Scenario = Callable[[Path], Any]


class GroupCounter(TorchDispatchMode):
    """Counts the bytes of each call that reaches a process group: below DDP and its hooks, above the network."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            tensors = [tensor for tensor in args[0] if isinstance(tensor, torch.Tensor)]
            self.calls.append((func.__name__, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.calls)


class StatesByStep(TrainerCallback):
    """Keeps the weights and buffers after every optimizer step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.states.append(state_of(model))


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_on_ranks(scenarios: dict[str, Scenario], folder: Path, timeout: float = 600) -> dict[str, list[Any]]:
    """Run all scenarios on two processes, one after the other; results by name, then rank.

    A scenario that raises gives its exception's class and message. If a process dies inside of torch, which was seen
    once in many runs (glibc: "unaligned tcache chunk detected"), its last words become a warning, and all run again.
    """
    try:
        return _run_once(scenarios, folder, timeout)
    except multiprocessing.ProcessExitedException as error:
        if error.signal_name not in ("SIGABRT", "SIGSEGV"):
            raise
        log = (folder / f"log_{error.error_index}.txt").read_text(encoding="utf-8")
        log = log.partition("\nExtension modules:")[0][-3000:]
        warnings.warn(f"Rank {error.error_index} died of {error.signal_name}. Its log ends:\n{log}", stacklevel=2)
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return _run_once(scenarios, folder, timeout)


def _run_once(scenarios: dict[str, Scenario], folder: Path, timeout: float) -> dict[str, list[Any]]:
    context = multiprocessing.start_processes(
        _work, args=(scenarios, folder, free_port(), timeout), nprocs=RANKS, join=False, start_method="spawn"
    )
    assert context is not None
    deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
    while not context.join(timeout=1):
        if datetime.datetime.now() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"The ranks did not end in {timeout} s; see {folder}")
    by_rank = [torch.load(folder / f"results_{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {name: [results[name] for results in by_rank] for name in scenarios}


def _work(rank: int, scenarios: dict[str, Scenario], folder: Path, port: int, timeout: float) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(folder / f"log_{rank}.txt", "w", buffering=1)
    faulthandler.enable(sys.stderr)
    faulthandler.dump_traceback_later(timeout * 0.9, exit=True)
    # A rank that waits in vain raises.
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=120))
    results: dict[str, Any] = {}
    for name, scenario in scenarios.items():
        print(f"--- {name}")
        try:
            results[name] = scenario(folder / name)
        except Exception as error:
            traceback.print_exc()
            results[name] = (type(error).__name__, str(error))
        torch.save(results, folder / f"results_{rank}.pt")
    dist.destroy_process_group()


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def arguments(folder: Path, **changed: Any) -> Any:
    """The same global batch of 8 in one process or two."""
    accumulation = changed.get("gradient_accumulation_steps", 1)
    return config(folder, **{"per_device_train_batch_size": 8 // world() // accumulation, **changed})


def watched(
    folder: Path,
    model: nn.Module | None = None,
    watch: bool = True,
    trainer_class: Any = FeatureReuseTrainer,
    **changed: Any,
) -> dict[str, Any]:
    """Train, and keep the weights after every step and the bytes of every call at the process group.

    With `watch`, `StepWatch` asserts after every step that inactive parameters and their moments did not change.
    """
    states, step_watch = StatesByStep(), StepWatch()
    trainer = FeatureReuseTrainer(
        build("vit") if model is None else model,
        arguments(folder, **changed),
        train_dataset=examples(),
        callbacks=[states, step_watch] if watch else [states],
    )
    step_watch.trainer = trainer
    with GroupCounter() as counter:
        trainer.train()
    return {
        "states": states.states,
        "calls": counter.calls,
        "kinds": sorted(step_watch.kinds),
        "world": trainer.accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "grad": [name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None],
    }
