"""Cost model of a step on N ranks: arithmetic, bytes sent, memory; see docs/distributed.md."""

from __future__ import annotations

from dataclasses import dataclass

from hf_featreuse import StepCosts, StepKind, StepPlan

VANILLA = StepPlan(StepKind.VANILLA)
# Bytes of a number: a weight and its gradient in fp32; a weight as FSDP2 gathers it in bf16.
FULL, HALF = 4, 2


@dataclass(frozen=True)
class Hardware:
    """The assumed speed of one GPU, and of its link to the others.

    Args:
        peak (`float`): operations per second.
        utilization (`float`): share of them that training reaches.
        link (`float`): bytes per second that a GPU sends, and at the same time receives.
    """

    peak: float = 989e12
    utilization: float = 0.4
    link: float = 450e9


@dataclass(frozen=True)
class Parts:
    """A model as the cost model sees it.

    Args:
        blocks (`tuple[int, ...]`): parameters of each residual block.
        trunk (`int`): parameters of the rest.
        costs (`StepCosts`): arithmetic, of one image.
        saved (`tuple[int, ...]`): bytes per image that a block saves for backward if it trains.
        passing (`tuple[int, ...]`): the same if it is frozen and the gradient continues below it.
        saved_trunk (`int`): bytes per image that the trunk saves if it trains.
        passing_trunk (`int`): the same if it is frozen between blocks that train.

    Raises:
        ValueError: `train_trunk="head"`, which is not supported.
    """

    blocks: tuple[int, ...]
    trunk: int
    costs: StepCosts
    saved: tuple[int, ...]
    passing: tuple[int, ...]
    saved_trunk: int
    passing_trunk: int

    def __post_init__(self) -> None:
        if self.costs.train_trunk not in ("all", "none"):
            raise ValueError(f'`train_trunk={self.costs.train_trunk!r}` is not supported. Pass "all" or "none".')

    @property
    def parameters(self) -> int:
        return sum(self.blocks) + self.trunk

    def computed(self, plan: StepPlan) -> set[int]:
        """Return the blocks that run."""
        every = set(range(len(self.blocks)))
        return every - set(plan.dropped) if plan.kind is StepKind.STOCHASTIC_DEPTH else every

    def trained(self, plan: StepPlan) -> set[int]:
        """Return the blocks that get gradients."""
        return set(plan.dropped) if plan.kind is StepKind.MASKED_FREEZE else self.computed(plan)

    def trunk_trains(self, plan: StepPlan) -> bool:
        return self.costs.train_trunk == "all" or plan.kind is not StepKind.MASKED_FREEZE

    def in_backward(self, plan: StepPlan) -> set[int]:
        """Return the blocks that backward passes through: all that run if the stem trains, else from the lowest on."""
        if self.trunk_trains(plan):
            return self.computed(plan)
        return {block for block in self.computed(plan) if block >= min(self.trained(plan))}

    def active(self, plan: StepPlan) -> int:
        """Return the parameters that get gradients."""
        return sum(self.blocks[block] for block in self.trained(plan)) + self.trunk * self.trunk_trains(plan)

    def activations(self, plan: StepPlan) -> int:
        """Return the bytes per image that are saved for backward."""
        passing = self.in_backward(plan) - self.trained(plan)
        blocks = sum(self.saved[block] for block in self.trained(plan)) + sum(self.passing[block] for block in passing)
        return blocks + (self.saved_trunk if self.trunk_trains(plan) else self.passing_trunk)

    def arithmetic(self, plan: StepPlan) -> tuple[float, float]:
        """Return the operations per image, in forward and in backward."""
        forward = sum(self.costs.trunk) + sum(self.costs.blocks[block].resting for block in self.computed(plan))
        return forward, self.costs.share(plan) * self.costs.vanilla - forward


def ddp_bytes(parts: Parts, plan: StepPlan) -> int:
    """Return the bytes of gradients that a rank passes to the all-reduce of DDP."""
    return FULL * parts.active(plan)


@dataclass(frozen=True)
class Collectives:
    """The calls of FSDP2's process group by a rank in a step, and the bytes of the whole tensors.

    Blocks are sharded one by one; the rest is the root, which stays gathered from forward to backward.
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
    """Return the cost with DDP: a ring all-reduce sends 2 (N - 1) / N of the bytes, hidden behind backward."""
    forward, backward = (work * images / (hardware.peak * hardware.utilization) for work in parts.arithmetic(plan))
    wire = 2 * (ranks - 1) / ranks * ddp_bytes(parts, plan)
    exposed = max(0.0, wire / hardware.link - backward)
    # Weights, two moments, DDP's buckets (by default gradients are not views of them), and autocast's bf16 weights.
    cast = parts.trunk + sum(parts.blocks[block] for block in parts.computed(plan))
    state = 4 * FULL * parts.parameters + FULL * parts.active(plan) + HALF * cast
    memory = state + images * parts.activations(plan) / 2
    return Step(forward + backward, wire, exposed, memory)


def fsdp_step(parts: Parts, plan: StepPlan, ranks: int, images: int, hardware: Hardware) -> Step:
    """Return the cost with FSDP2: a gather and a reduce-scatter each send (N - 1) / N of the bytes.

    Gathers for the forward are hidden behind it, all else behind backward.
    """
    forward, backward = (work * images / (hardware.peak * hardware.utilization) for work in parts.arithmetic(plan))
    found, share = fsdp_collectives(parts, plan), (ranks - 1) / ranks
    before, after = share * found.forward_bytes, share * (found.backward_bytes + found.reduced_bytes)
    exposed = max(0.0, before / hardware.link - forward) + max(0.0, after / hardware.link - backward)
    shards = 3 * FULL * parts.parameters + FULL * parts.active(plan)
    # Two blocks are whole at a time, the one that runs and the next one, and the root.
    whole = HALF * (2 * max(parts.blocks) + parts.trunk)
    memory = shards / ranks + whole + images * parts.activations(plan) / 2
    return Step(forward + backward, before + after, exposed, memory)


ENGINES = {"DDP": ddp_step, "FSDP2": fsdp_step}
