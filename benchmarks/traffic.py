"""Count what the ranks exchange in a step, at the process group: DDP and FSDP2, plain and with feature reuse.

    python benchmarks/traffic.py

starts two processes on the CPU and prints two Markdown tables. Under DDP a count is the sum of bytes over the tensors
of every call that reaches the process group, gradients, buffers and bookkeeping alike, on rank 0; what an all-reduce
of them puts on the network is up to the backend, and proportional to it. Under FSDP2, with each block a unit and the
rest one more, gathers of weights and reductions of gradients are counted, in calls and in bytes of the whole tensors.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    StepKind,
    StepPlan,
    find_residual_blocks,
    reduce_active_gradients,
)

# A batch of one, and plain steps, which come before the first.
IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PLAIN = range(-2, 0)
SHARDED_COLUMNS = ("model", "step", "gathers", "reductions", "gathered kB", "reduced kB")
COLUMNS = ("model", "plain DDP", "feature reuse", "share", "stochastic depth", "masked freeze")


class GroupCounter(TorchDispatchMode):
    """Sums the bytes of the calls that reach a process group, and counts those of FSDP2 by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.gathers: list[int] = []
        self.reductions: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            # The first argument is what comes out, the second what goes in.
            if func.__name__.startswith("_allgather_base_"):
                self.gathers.append(args[0].nbytes)
            elif func.__name__.startswith("_reduce_scatter_base_"):
                self.reductions.append(args[1].nbytes)
            else:
                self.bytes += sum(tensor.nbytes for tensor in args[0] if isinstance(tensor, torch.Tensor))
        return func(*args, **(kwargs or {}))


def vit() -> nn.Module:
    """Return a ViT of 12 layers with the width of ViT-Ti."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=192,
            num_hidden_layers=12,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=32,
            patch_size=4,
        )
    )


def convnext() -> nn.Module:
    """Return a ConvNeXt-T of a quarter of its width, with three quarters of its weights in two stages."""
    config = ConvNextConfig(depths=[3, 3, 9, 3], hidden_sizes=[24, 48, 96, 192])
    return ConvNextForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"ViT, 12 layers": vit, "ConvNeXt, 18 blocks": convnext}


def reusing(make: Callable[[], nn.Module], options: argparse.Namespace) -> FeatureReuse:
    """Return a new model with its blocks and schedule."""
    torch.manual_seed(0)
    model = make()
    blocks = find_residual_blocks(model, {"pixel_values": IMAGES})
    schedule = FeatureReuseSchedule(len(blocks), options.drop_rate, options.drop_rate_schedule, seed=options.seed)
    return FeatureReuse(model, blocks, schedule, train_trunk="none" if options.freeze_trunk else "all")


def counted(reuse: FeatureReuse, wrapped: nn.Module, steps: range) -> Iterator[tuple[StepPlan, GroupCounter]]:
    """Yield the plan and counts of each step."""
    for step in steps:
        with reuse.step(step) as plan, GroupCounter() as counter:
            wrapped(pixel_values=IMAGES).logits.sum().backward()
        reuse.model.zero_grad(set_to_none=True)
        yield plan, counter


def count(make: Callable[[], nn.Module], options: argparse.Namespace, *, reused: bool) -> list[tuple[StepKind, int]]:
    """Return the kind and bytes of each step under DDP."""
    reuse = reusing(make, options)
    ddp_model = DistributedDataParallel(reuse.model, find_unused_parameters=reused)
    if reused:
        reduce_active_gradients(ddp_model, reuse)
    steps = range(options.steps) if reused else PLAIN
    return [(plan.kind, counter.bytes) for plan, counter in counted(reuse, ddp_model, steps)]


def count_sharded(
    make: Callable[[], nn.Module], options: argparse.Namespace, *, reused: bool
) -> list[tuple[StepPlan, GroupCounter]]:
    """Return the plan and counts of each step under FSDP2."""
    reuse = reusing(make, options)
    for block in reuse.blocks:
        fully_shard(block.module)
    fully_shard(reuse.model)
    return list(counted(reuse, reuse.model, range(options.steps) if reused else PLAIN))


def mean(sizes: Sequence[float]) -> float:
    """Return the mean in kB; 0 without sizes."""
    return sum(sizes) / max(len(sizes), 1) / 1000


def sharded_rows(name: str, options: argparse.Namespace) -> list[list[str]]:
    """Return the lines of a model in the table of FSDP2: means over the steps of a kind, and over all."""
    steps = count_sharded(MODELS[name], options, reused=True)
    groups = {
        "plain FSDP2": [counter for _, counter in count_sharded(MODELS[name], options, reused=False)],
        "stochastic depth": [counter for plan, counter in steps if plan.kind is StepKind.STOCHASTIC_DEPTH],
        "masked freeze": [counter for plan, counter in steps if plan.kind is StepKind.MASKED_FREEZE],
        "feature reuse": [counter for _, counter in steps],
    }
    rows = []
    for kind, counters in groups.items():
        calls = [
            1000 * mean([len(getattr(counter, what)) for counter in counters]) for what in ("gathers", "reductions")
        ]
        sizes = [mean([sum(getattr(counter, what)) for counter in counters]) for what in ("gathers", "reductions")]
        rows.append([name, kind, *(f"{value:.1f}" for value in (*calls, *sizes))])
    return rows


def row(name: str, options: argparse.Namespace) -> list[str]:
    """Return one line of the table."""
    plain = mean([size for _, size in count(MODELS[name], options, reused=False)])
    steps = count(MODELS[name], options, reused=True)
    reused = mean([size for _, size in steps])
    kinds = [
        mean([size for kind, size in steps if kind is wanted])
        for wanted in (StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE)
    ]
    return [name, f"{plain:.1f}", f"{reused:.1f}", f"{reused / plain:.3f}", *(f"{size:.1f}" for size in kinds)]


def work(rank: int, options: argparse.Namespace, store: str) -> None:
    """Run one of the two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows = [row(name, options) for name in MODELS]
    sharded = [line for name in MODELS for line in sharded_rows(name, options)]
    if rank == 0:
        for columns, lines in ((COLUMNS, rows), (SHARDED_COLUMNS, sharded)):
            for line in [list(columns), ["---"] * len(columns), *lines]:
                print(f"| {' | '.join(line)} |", flush=True)
            print()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps to average over")
    parser.add_argument("--drop_rate", type=float, default=0.5)
    parser.add_argument("--drop_rate_schedule", default="uniform", choices=("uniform", "linear"))
    parser.add_argument("--freeze_trunk", action="store_true", help='as train_trunk="none"')
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, args=(options, str(Path(folder) / "store")), nprocs=2)


if __name__ == "__main__":
    main()
