"""Predict the cost of a step on many GPUs: arithmetic, bytes sent, memory and time, for plain training and both kinds.

    python benchmarks/scaling.py

prints tables, and writes a summary of them into docs/distributed.md. Parameters and arithmetic are those of real
configurations on the meta device, and what the blocks save for backward is counted with fake tensors; speeds of
hardware are assumptions (`HARDWARE`). tests/benchmarks/test_scaling_benchmark.py checks bytes, arithmetic and
activations against counts on small models.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch
from overhead import saved_for_backward
from reporting import write_between
from step_model import ENGINES, VANILLA, Hardware, Parts, ddp_step
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

from hf_featreuse import (
    BlockCost,
    FeatureReuseSchedule,
    ResidualBlock,
    StepCosts,
    StepKind,
    StepPlan,
    find_residual_blocks,
    measure_step_costs,
    skip_blocks,
    train_only,
)

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "distributed.md", Path(__file__).parent / "results" / "scaling.json"
BEGIN, END = "<!-- begin: benchmarks/scaling.py -->", "<!-- end -->"
# Ranks, images per rank, and the hardware. One node over NVLink; many nodes, each GPU with a 400 Gb/s network card.
HARDWARE = {(8, 128): Hardware(), (512, 8): Hardware(link=50e9)}


# Measuring a model


def measure_parts(make: Callable[[], nn.Module], *, train_trunk: str | bool = "all") -> Parts:
    """Return parameters, arithmetic and saved bytes of a model, without its weights and without running it."""
    with torch.device("meta"):
        model = make()
    blocks = find_residual_blocks(model)
    costs = measure_step_costs(model, blocks, train_trunk=train_trunk)
    sizes = tuple(sum(p.numel() for p in block.module.parameters()) for block in blocks)
    trunk = sum(p.numel() for p in model.parameters()) - sum(sizes)
    return Parts(sizes, trunk, costs, *_saved(model, blocks))


def saved_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Return the bytes that a forward saves for backward, except weights."""
    with saved_for_backward(model) as saved:
        model(pixel_values=images)
    return sum(saved.values())


def _saved(model: nn.Module, blocks: Sequence[ResidualBlock]) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Return the bytes that each block and the trunk save if they train, and if they are frozen."""
    size = model.config.image_size
    with FakeTensorMode():
        fake = model._apply(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype)).train()
        count = partial(saved_bytes, fake, torch.zeros(1, 3, size, size))
        whole = count()
        with skip_blocks(blocks):
            trunk = count()
        with train_only(fake, blocks):
            passing_trunk = trunk - (whole - count())
        known: dict[tuple, tuple[int, int]] = {}
        found = []
        for block in blocks:
            shapes = tuple(tuple(p.shape) for p in block.module.parameters())
            if shapes not in known:
                with skip_blocks([block]):
                    rest = count()
                with train_only(fake, [b for b in blocks if b is not block], train_trunk="all", all_blocks=blocks):
                    frozen = count()
                known[shapes] = whole - rest, frozen - rest
            found.append(known[shapes])
    return tuple(one for one, _ in found), tuple(other for _, other in found), trunk, passing_trunk


# The predictions


def vit_large() -> nn.Module:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=224, patch_size=16, num_labels=1000))


def convnext_large() -> nn.Module:
    config = ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536], image_size=224, num_labels=1000)
    return ConvNextForImageClassification(config)


MODELS = {"ViT-L/16": vit_large, "ConvNeXt-L": convnext_large}


@cache
def plans(num_blocks: int, rate: float, kind: StepKind | None, cycles: int = 200) -> list[StepPlan]:
    """Return the plans of many cycles at a uniform rate, of one kind of step or of all."""
    schedule = FeatureReuseSchedule(num_blocks, rate, "uniform", seed=0)
    every = [schedule.plan(step) for step in range(cycles * schedule.steps_per_cycle)]
    return [plan for plan in every if kind in (None, plan.kind)]


ROWS = {
    "vanilla": lambda count: [VANILLA],
    "stochastic depth, rate 0.5": partial(plans, rate=0.5, kind=StepKind.STOCHASTIC_DEPTH),
    "masked freeze, rate 0.5": partial(plans, rate=0.5, kind=StepKind.MASKED_FREEZE),
    "feature reuse, rate 0.5": partial(plans, rate=0.5, kind=None),
    "feature reuse, rate 0.2": partial(plans, rate=0.2, kind=None),
}


def predict(parts: Parts, ranks: int, images: int, hardware: Hardware) -> list[list[str]]:
    """Return the rows of a table; memory is that of the largest step, all other figures are means."""
    lines = []
    for engine, cost in ENGINES.items():
        plain = None
        for row, draw in ROWS.items():
            steps = [cost(parts, plan, ranks, images, hardware) for plan in draw(len(parts.blocks))]
            compute, wire, exposed = (
                statistics.fmean(getattr(step, name) for step in steps) for name in ("compute", "wire", "exposed")
            )
            plain = plain or compute + exposed
            numbers = [f"{1e3 * compute:.1f}", f"{wire / 1e6:.0f}", f"{1e3 * exposed:.1f}"]
            numbers += [f"{1e3 * (compute + exposed):.1f}", f"{(compute + exposed) / plain:.3f}"]
            lines.append([engine, row, *numbers, f"{max(step.memory for step in steps) / 1e9:.1f}"])
    return lines


def hidden_from(parts: Parts, row: str, ranks: int, hardware: Hardware) -> int:
    """Return the images per rank from which the mean backward of these steps hides the mean traffic of DDP."""
    draws = ROWS[row](len(parts.blocks))
    steps = [ddp_step(parts, plan, ranks, 1, hardware) for plan in draws]
    speed = hardware.peak * hardware.utilization
    backward = statistics.fmean(parts.arithmetic(plan)[1] for plan in draws) / speed
    return math.ceil(statistics.fmean(step.wire for step in steps) / hardware.link / backward)


def tables(found: dict[str, Parts]) -> str:
    """Return the predictions as Markdown."""
    columns = ("engine", "step", "compute ms", "sent MB", "not hidden ms", "step ms", "/ vanilla", "memory GB")
    out = []
    for name, parts in found.items():
        share = sum(parts.blocks) / parts.parameters
        out += [f"### {name}: {parts.parameters / 1e6:.0f} million parameters, {share:.1%} of them in blocks", ""]
        out += [f"{parts.costs.vanilla / 1e9:.0f} GFLOP an image, forward and backward.", ""]
        for (ranks, images), hardware in HARDWARE.items():
            out += [f"{ranks} GPUs, {images} images each, {hardware.link / 1e9:.0f} GB/s a GPU:", ""]
            rows = [columns, ["---"] * len(columns), *predict(parts, ranks, images, hardware)]
            out += [f"| {' | '.join(row)} |" for row in rows] + [""]
            images_needed = (f"{row}: {hidden_from(parts, row, ranks, hardware)}" for row in list(ROWS)[:3])
            out += [f"Images per GPU from which backward hides DDP's traffic: {'; '.join(images_needed)}.", ""]
    return "\n".join(out).rstrip()


def summary(found: dict[str, Parts]) -> str:
    """Return the summary for the page: step times relative to plain training, and memory per GPU."""
    columns = ("model", "GPUs x images", "engine", "plain step, ms", *list(ROWS)[1:], "memory, GB")
    lines = [list(columns), ["---"] * len(columns)]
    for name, parts in found.items():
        for (ranks, images), hardware in HARDWARE.items():
            rows = predict(parts, ranks, images, hardware)
            for engine in ENGINES:
                plain, *others = (row for row in rows if row[0] == engine)
                memory = {row[1]: row[-1] for row in others}["feature reuse, rate 0.5"]
                shares = [f"{float(row[6]):.2f}" for row in others]
                lines.append([name, f"{ranks} x {images}", engine, plain[5], *shares, f"{plain[-1]} to {memory}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load() -> dict[str, Parts]:
    """Return the measurements of each model."""
    found = {}
    for name, values in json.loads(RESULTS.read_text(encoding="utf-8")).items():
        costs = values.pop("costs")
        costs["blocks"] = tuple(BlockCost(**block) for block in costs["blocks"])
        found[name] = Parts(costs=StepCosts(**costs), **values)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="Measure nothing, write the page.")
    if not parser.parse_args().report:
        measured = {name: asdict(measure_parts(make)) for name, make in MODELS.items()}
        RESULTS.write_text(json.dumps(measured) + "\n", encoding="utf-8")
    found = load()
    print(tables(found))
    write_between(PAGE, BEGIN, END, f"{summary(found)}\n")


if __name__ == "__main__":
    main()
