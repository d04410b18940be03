"""What a step costs on many GPUs: arithmetic, bytes on the wire, memory and time, for plain training and both kinds.

    python benchmarks/scaling.py

prints the tables of docs/scaling.md and writes them into it. Parameters and arithmetic are those of real
configurations on the meta device, and what the blocks save for backward is counted with fake tensors; speeds of
hardware are assumptions (`HARDWARE`). tests/test_scaling_benchmark.py checks bytes, arithmetic and activations
against counts on small models.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
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
PAGE, RESULTS = ROOT / "docs" / "scaling.md", Path(__file__).parent / "results" / "scaling.json"
BEGIN, END = "<!-- begin: benchmarks/scaling.py -->", "<!-- end -->"
VANILLA = StepPlan(StepKind.VANILLA)
# Sizes of a number: a weight and its gradient in fp32; a weight as FSDP2 gathers it in bf16.
FULL, HALF = 4, 2


@dataclass(frozen=True)
class Hardware:
    """What one GPU is assumed to do, and its link to the others.

    Args:
        peak (`float`): operations a second.
        utilisation (`float`): share of them that training reaches.
        link (`float`): bytes a second that a GPU sends, and at the same time receives.
    """

    peak: float = 989e12
    utilisation: float = 0.4
    link: float = 450e9


# Ranks, images a rank, and the hardware. One node over NVLink; many nodes, each GPU with a 400 Gb/s network card.
HARDWARE = {(8, 128): Hardware(), (512, 8): Hardware(link=50e9)}


@dataclass(frozen=True)
class Parts:
    """A model as the cost model sees it.

    Args:
        blocks (`tuple[int, ...]`): parameters of each residual block.
        trunk (`int`): parameters of the rest.
        costs (`StepCosts`): arithmetic, of one image.
        saved (`tuple[int, ...]`): bytes of an image that a block saves for backward where it trains.
        passing (`tuple[int, ...]`): the same where it is frozen and the gradient goes on below it.
        saved_trunk (`int`): bytes of an image that the trunk saves where it trains.
        passing_trunk (`int`): the same where it is frozen between blocks that train.
        train_trunk (`bool`, defaults to `True`): whether the trunk trains in masked-freeze steps.
    """

    blocks: tuple[int, ...]
    trunk: int
    costs: StepCosts
    saved: tuple[int, ...]
    passing: tuple[int, ...]
    saved_trunk: int
    passing_trunk: int
    train_trunk: bool = True

    @property
    def parameters(self) -> int:
        return sum(self.blocks) + self.trunk

    def computed(self, plan: StepPlan) -> set[int]:
        """Blocks that run."""
        every = set(range(len(self.blocks)))
        return every - set(plan.dropped) if plan.kind is StepKind.STOCHASTIC_DEPTH else every

    def trained(self, plan: StepPlan) -> set[int]:
        """Blocks that get gradients."""
        return set(plan.dropped) if plan.kind is StepKind.MASKED_FREEZE else self.computed(plan)

    def trunk_trains(self, plan: StepPlan) -> bool:
        return self.train_trunk or plan.kind is not StepKind.MASKED_FREEZE

    def in_backward(self, plan: StepPlan) -> set[int]:
        """Blocks that backward passes through: with a stem that trains all that run, else those from the lowest on."""
        if self.trunk_trains(plan):
            return self.computed(plan)
        return {block for block in self.computed(plan) if block >= min(self.trained(plan))}

    def active(self, plan: StepPlan) -> int:
        """Parameters that get gradients."""
        return sum(self.blocks[block] for block in self.trained(plan)) + self.trunk * self.trunk_trains(plan)

    def activations(self, plan: StepPlan) -> int:
        """Bytes of an image that are saved for backward."""
        passing = self.in_backward(plan) - self.trained(plan)
        blocks = sum(self.saved[block] for block in self.trained(plan)) + sum(self.passing[block] for block in passing)
        return blocks + (self.saved_trunk if self.trunk_trains(plan) else self.passing_trunk)

    def arithmetic(self, plan: StepPlan) -> tuple[float, float]:
        """Operations of an image, in forward and in backward."""
        forward = sum(self.costs.trunk) + sum(self.costs.blocks[block].resting for block in self.computed(plan))
        return forward, self.costs.share(plan) * self.costs.vanilla - forward


def ddp_bytes(parts: Parts, plan: StepPlan) -> int:
    """Bytes of gradients that a rank hands to the all-reduce of DDP."""
    return FULL * parts.active(plan)


@dataclass(frozen=True)
class Collectives:
    """What a rank asks of FSDP2's process group in a step: calls, and bytes of the whole tensors.

    Blocks are sharded one by one, the rest is the root, which stays gathered from forward to backward.
    """

    forward_gathers: int
    backward_gathers: int
    reductions: int
    forward_bytes: int
    backward_bytes: int
    reduced_bytes: int


def fsdp_collectives(parts: Parts, plan: StepPlan, gathered: int = HALF, reduced: int = FULL) -> Collectives:
    """Count the collectives of FSDP2 with full shards that are freed after forward.

    Args:
        parts (`Parts`): the model.
        plan (`StepPlan`): of the step.
        gathered (`int`, defaults to 2): bytes of a weight as it is gathered.
        reduced (`int`, defaults to 4): bytes of a gradient as it is reduced.
    """
    forward, backward, trained = parts.computed(plan), parts.in_backward(plan), parts.trained(plan)
    trunk = parts.trunk_trains(plan)

    def size(blocks: set[int]) -> int:
        return sum(parts.blocks[block] for block in blocks)

    return Collectives(
        forward_gathers=len(forward) + 1,
        backward_gathers=len(backward),
        reductions=len(trained) + trunk,
        forward_bytes=gathered * (size(forward) + parts.trunk),
        backward_bytes=gathered * size(backward),
        reduced_bytes=reduced * (size(trained) + parts.trunk * trunk),
    )


@dataclass(frozen=True)
class Step:
    """Cost of one step on one rank: seconds, bytes that it sends, bytes that it holds."""

    compute: float
    wire: float
    exposed: float
    memory: float


def ddp_step(parts: Parts, plan: StepPlan, ranks: int, images: int, hardware: Hardware) -> Step:
    """A ring all-reduce sends 2 (N - 1) / N of the bytes; it hides behind backward."""
    forward, backward = (work * images / (hardware.peak * hardware.utilisation) for work in parts.arithmetic(plan))
    wire = 2 * (ranks - 1) / ranks * ddp_bytes(parts, plan)
    exposed = max(0.0, wire / hardware.link - backward)
    # Weights, two moments and DDP's buckets, of which gradients are no views by default; autocast's bf16 weights.
    cast = parts.trunk + sum(parts.blocks[block] for block in parts.computed(plan))
    state = 4 * FULL * parts.parameters + FULL * parts.active(plan) + HALF * cast
    memory = state + images * parts.activations(plan) / 2
    return Step(forward + backward, wire, exposed, memory)


def fsdp_step(parts: Parts, plan: StepPlan, ranks: int, images: int, hardware: Hardware) -> Step:
    """A gather and a reduce-scatter send (N - 1) / N of the bytes each, behind forward and behind backward."""
    forward, backward = (work * images / (hardware.peak * hardware.utilisation) for work in parts.arithmetic(plan))
    found, share = fsdp_collectives(parts, plan), (ranks - 1) / ranks
    before, after = share * found.forward_bytes, share * (found.backward_bytes + found.reduced_bytes)
    exposed = max(0.0, before / hardware.link - forward) + max(0.0, after / hardware.link - backward)
    shards = 3 * FULL * parts.parameters + FULL * parts.active(plan)
    # Two blocks are whole at a time, the one that runs and the next one, and the root.
    whole = HALF * (2 * max(parts.blocks) + parts.trunk)
    memory = shards / ranks + whole + images * parts.activations(plan) / 2
    return Step(forward + backward, before + after, exposed, memory)


ENGINES = {"DDP": ddp_step, "FSDP2": fsdp_step}


# Measuring a model


def measure_parts(make: Callable[[], nn.Module], *, train_trunk: bool = True) -> Parts:
    """Parameters, arithmetic and saved bytes of a model, without its weights and without running it."""
    with torch.device("meta"):
        model = make()
    blocks = find_residual_blocks(model)
    costs = measure_step_costs(model, blocks, train_trunk=train_trunk)
    sizes = tuple(sum(p.numel() for p in block.module.parameters()) for block in blocks)
    trunk = sum(p.numel() for p in model.parameters()) - sum(sizes)
    return Parts(sizes, trunk, costs, *_saved(model, blocks), train_trunk)


def saved_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes that a forward saves for backward, weights aside."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(pixel_values=images).logits.sum()
    return sum(storage.nbytes() for storage in saved.values())


def _saved(model: nn.Module, blocks: Sequence[ResidualBlock]) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Of each block what it saves where it trains and where it is frozen, and the same of the trunk."""
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
                with train_only(fake, [b for b in blocks if b is not block], train_trunk=True, all_blocks=blocks):
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
    """The plans of many cycles at a uniform rate, of one kind of step or of all."""
    schedule = FeatureReuseSchedule(num_blocks, rate, "uniform", seed=0)
    every = [schedule.plan(step) for step in range(2 * cycles)]
    return [plan for plan in every if kind in (None, plan.kind)]


ROWS = {
    "vanilla": lambda count: [VANILLA],
    "stochastic depth, rate 0.5": partial(plans, rate=0.5, kind=StepKind.STOCHASTIC_DEPTH),
    "masked freeze, rate 0.5": partial(plans, rate=0.5, kind=StepKind.MASKED_FREEZE),
    "feature reuse, rate 0.5": partial(plans, rate=0.5, kind=None),
    "feature reuse, rate 0.2": partial(plans, rate=0.2, kind=None),
}


def predict(parts: Parts, ranks: int, images: int, hardware: Hardware) -> list[list[str]]:
    """Rows of a table; memory is that of the largest step, all else the mean."""
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
    """Images a rank from which the mean backward of these steps hides the mean traffic of DDP."""
    draws = ROWS[row](len(parts.blocks))
    steps = [ddp_step(parts, plan, ranks, 1, hardware) for plan in draws]
    speed = hardware.peak * hardware.utilisation
    backward = statistics.fmean(parts.arithmetic(plan)[1] for plan in draws) / speed
    return math.ceil(statistics.fmean(step.wire for step in steps) / hardware.link / backward)


def tables(found: dict[str, Parts]) -> str:
    """The predictions as Markdown."""
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
            out += [f"Images a GPU from which backward hides DDP's traffic: {'; '.join(images_needed)}.", ""]
    return "\n".join(out).rstrip()


def load() -> dict[str, Parts]:
    """What was measured of each model."""
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
    text = tables(load())
    print(text)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
