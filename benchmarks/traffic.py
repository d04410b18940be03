"""Bytes that the ranks exchange in a step, counted at the process group: plain DDP and feature reuse.

    python benchmarks/traffic.py

starts two processes on the CPU and prints a Markdown table. A count is the sum over the tensors of every call that
reaches the process group, gradients, buffers and bookkeeping alike, on rank 0; what an all-reduce of them puts on the
network is up to the backend, and proportional to it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    StepKind,
    find_residual_blocks,
    reduce_active_gradients,
)

COLUMNS = ("model", "plain DDP", "feature reuse", "share", "stochastic depth", "masked freeze")


class GroupCounter(TorchDispatchMode):
    """Sums the bytes of the calls that reach a process group."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self.bytes += sum(tensor.nbytes for tensor in args[0] if isinstance(tensor, torch.Tensor))
        return func(*args, **(kwargs or {}))


def vit() -> nn.Module:
    """12 layers of one width, as ViT-Ti has them."""
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
    """ConvNeXt-T at a quarter of its width: three quarters of its weights lie in two stages."""
    config = ConvNextConfig(depths=[3, 3, 9, 3], hidden_sizes=[24, 48, 96, 192])
    return ConvNextForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"ViT, 12 layers": vit, "ConvNeXt, 18 blocks": convnext}


def count(make: Callable[[], nn.Module], options: argparse.Namespace, *, reused: bool) -> list[tuple[StepKind, int]]:
    """Kind and bytes of each step."""
    torch.manual_seed(0)
    model = make()
    images = torch.randn(1, 3, 32, 32)
    blocks = find_residual_blocks(model, {"pixel_values": images})
    schedule = FeatureReuseSchedule(len(blocks), options.drop_rate, options.drop_rate_schedule, seed=options.seed)
    reuse = FeatureReuse(model, blocks, schedule, train_trunk=not options.freeze_trunk)
    ddp_model = DistributedDataParallel(model, find_unused_parameters=reused)
    if reused:
        reduce_active_gradients(ddp_model, reuse)
    found = []
    for step in range(options.steps if reused else 2):
        with reuse.step(step if reused else -1) as plan, GroupCounter() as counter:
            ddp_model(pixel_values=images).logits.sum().backward()
        model.zero_grad(set_to_none=True)
        found.append((plan.kind, counter.bytes))
    return found


def mean(sizes: list[int]) -> float:
    """In kB; 0 of none."""
    return sum(sizes) / max(len(sizes), 1) / 1000


def row(name: str, options: argparse.Namespace) -> list[str]:
    """One line of the table."""
    plain = mean([size for _, size in count(MODELS[name], options, reused=False)])
    steps = count(MODELS[name], options, reused=True)
    reused = mean([size for _, size in steps])
    kinds = [
        mean([size for kind, size in steps if kind is wanted])
        for wanted in (StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE)
    ]
    return [name, f"{plain:.1f}", f"{reused:.1f}", f"{reused / plain:.3f}", *(f"{size:.1f}" for size in kinds)]


def work(rank: int, options: argparse.Namespace, store: str) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows = [row(name, options) for name in MODELS]
    if rank == 0:
        for line in [list(COLUMNS), ["---"] * len(COLUMNS), *rows]:
            print(f"| {' | '.join(line)} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps to average over")
    parser.add_argument("--drop_rate", type=float, default=0.5)
    parser.add_argument("--drop_rate_schedule", default="uniform", choices=("uniform", "linear"))
    parser.add_argument("--freeze_trunk", action="store_true", help="as train_trunk=False")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, args=(options, str(Path(folder) / "store")), nprocs=2)


if __name__ == "__main__":
    main()
