"""Measure costs of the method other than step time: memory, overhead, finding the blocks."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator

import torch
from torch import nn

from hf_featreuse import FeatureReuse, FeatureReuseConfig, FeatureReuseTrainer, find_residual_blocks

MEBIBYTE = 2**20


def kind_row(kind: str, granularity: str) -> str:
    """Return the name of the row of a kind of step."""
    return kind if granularity == "batch" else f"{kind} by sample"


def measure_overhead(trainer: FeatureReuseTrainer, options: argparse.Namespace, steps: int = 400) -> float:
    """Return the milliseconds per step of plan, contexts and logging, measured with empty steps."""
    loss = torch.zeros((), device=trainer.args.device)
    started = time.perf_counter()
    for step in range(steps):
        with trainer.feature_reuse.step(step, batch_size=options.batch_size) as plan:
            pass
        trainer._step_log.add(step, plan, trainer.step_costs.share(plan), loss)
    return (time.perf_counter() - started) / steps * 1000


def measure_discovery(model: nn.Module, image_size: int, repeats: int = 15) -> float:
    """Return the time to find the blocks, in forward passes of a batch of one; medians of alternating calls."""
    inputs = {"pixel_values": torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device)}
    forwards, searches = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        model(**inputs)
        forwards.append(time.perf_counter() - started)
        started = time.perf_counter()
        find_residual_blocks(model, inputs)
        searches.append(time.perf_counter() - started)
    return statistics.median(searches) / statistics.median(forwards)


def measure_memory(trainers: dict[str, FeatureReuseTrainer], options: argparse.Namespace) -> dict[str, float]:
    """Return the largest memory of a step in MiB, by row, over the first plans of each schedule."""
    memory: dict[str, float] = {}
    for name, trainer in trainers.items():
        model, reuse = trainer.model, trainer.feature_reuse
        size, device = options.image_size, next(model.parameters()).device
        batch = {
            "pixel_values": torch.randn(options.batch_size, 3, size, size, device=device),
            "labels": torch.zeros(options.batch_size, dtype=torch.long, device=device),
        }
        model.train()
        plain = FeatureReuseConfig(stochastic_depth_steps=0, masked_freeze_steps=0).schedule(0, 1, 0)
        memory["Trainer"] = step_memory(model, FeatureReuse(model, [], plain), 0, batch)
        for step in range(6):
            kind = reuse.plan(step, batch_size=options.batch_size).kind.value
            found = step_memory(model, reuse, step, batch)
            for row in (kind_row(kind, reuse.schedule.drop_granularity), name):
                memory[row] = max(memory.get(row, 0.0), found)
    return memory


@contextlib.contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Record the bytes of each storage that is saved for backward, except weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def step_memory(model, reuse: FeatureReuse, step: int, batch: dict[str, torch.Tensor]) -> float:
    """Return the memory of one step in MiB."""
    is_cuda = batch["labels"].is_cuda
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with reuse.step(step, batch_size=len(batch["labels"])), saved_for_backward(model) as saved:
        loss = model(**batch).loss
        peak = sum(saved.values())
        loss.backward()
    peak += sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    return (torch.cuda.max_memory_allocated() if is_cuda else peak) / MEBIBYTE
