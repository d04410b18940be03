"""The share of a vanilla step's arithmetic, against the counter around whole steps."""

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch
import torch.utils.flop_counter
from tiny_models import ARCHITECTURES, build, snapshot
from torch import nn

from hf_featreuse import (
    BlockCost,
    BlockError,
    FeatureReuse,
    FeatureReuseSchedule,
    StepCosts,
    StepKind,
    StepPlan,
    find_residual_blocks,
    measure_step_costs,
    skip_blocks,
    train_only,
    trainable_blocks,
)
from hf_featreuse.method import cost
from hf_featreuse.method.cost import flop_counter

VANILLA, DEPTH, FREEZE = StepKind.VANILLA, StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
IMAGE = torch.zeros(1, 3, 32, 32)
STEMS = {
    "vit": "vit.embeddings",
    "convnext": "convnext.embeddings",
    "resnet": "resnet.embedder",
    "swin": "swin.embeddings",
}


def counted(model: nn.Module, context: contextlib.AbstractContextManager) -> int:
    """Operations of a whole forward and backward inside a context."""
    model.zero_grad(set_to_none=True)
    with context, flop_counter() as counter:
        model(IMAGE).logits.sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


_CASES = list(itertools.product(ARCHITECTURES, ("none", "head", "all"), (False, True)))


@pytest.mark.parametrize(("architecture", "train_trunk", "stem_and_first_block_frozen"), _CASES)
def test_share_is_that_of_the_flop_counter(architecture, train_trunk, stem_and_first_block_frozen):
    model = build(architecture).eval()
    found = find_residual_blocks(model, {"pixel_values": IMAGE})
    if stem_and_first_block_frozen:
        model.get_submodule(STEMS[architecture]).requires_grad_(False)
        found[0].module.requires_grad_(False)
    blocks = trainable_blocks(model, found)
    assert len(blocks) == len(found) - stem_and_first_block_frozen
    costs = measure_step_costs(model, blocks, {"pixel_values": IMAGE}, train_trunk=train_trunk)
    vanilla = counted(model, contextlib.nullcontext())
    assert costs.vanilla == vanilla
    schedule = FeatureReuseSchedule(
        len(blocks), drop_rate=0.5, drop_rate_schedule="uniform", seed=0, stochastic_depth_steps=1
    )
    reuse = FeatureReuse(model, blocks, schedule, train_trunk=train_trunk)
    plans = {schedule.plan(step): step for step in range(20)}
    assert {plan.kind for plan in plans} >= {DEPTH, FREEZE}
    assert len(plans) > 8
    assert costs.train_trunk == train_trunk
    # ResNet's projection blocks belong to the trunk; where one is the lowest part that trains, which of its layers
    # need an input gradient is not told apart.
    rel = 0.05 if architecture == "resnet" and stem_and_first_block_frozen else 1e-3
    for plan, step in plans.items():
        assert costs.share(plan) == pytest.approx(counted(model, reuse.step(step)) / vanilla, rel=rel), plan


@every_architecture
@pytest.mark.slow
def test_every_set_of_blocks_is_within_two_percent(architecture):
    model = build(architecture).eval()
    blocks = find_residual_blocks(model, {"pixel_values": IMAGE})
    costs = measure_step_costs(model, blocks, {"pixel_values": IMAGE})
    # Some cycle of so many draws each set.
    schedule = FeatureReuseSchedule(
        len(blocks), drop_rate=0.5, drop_rate_schedule="uniform", seed=1, stochastic_depth_steps=1
    )
    reuse = FeatureReuse(model, blocks, schedule)
    steps = {schedule.plan(step): step for step in reversed(range(400))}
    # The empty set too, in masked freeze as a vanilla step.
    assert len(steps) == 2 * 2 ** len(blocks)
    for plan, step in steps.items():
        assert costs.share(plan) == pytest.approx(counted(model, reuse.step(step)) / costs.vanilla, rel=0.02), plan


@every_architecture
def test_shares_are_ordered_as_the_method_says(architecture):
    model = build(architecture)
    blocks = find_residual_blocks(model)
    costs, with_head, with_trunk = (
        measure_step_costs(model, blocks, train_trunk=trunk) for trunk in ("none", "head", "all")
    )
    last, all_of_them = len(blocks) - 1, tuple(range(len(blocks)))
    assert costs.share(StepPlan(VANILLA)) == 1.0
    assert 0 < costs.share(StepPlan(DEPTH, all_of_them)) < costs.share(StepPlan(DEPTH, (0,))) < 1
    # The deeper the lowest block that trains, the shorter the backward.
    assert costs.share(StepPlan(FREEZE, (last,))) < costs.share(StepPlan(FREEZE, (0,))) < 1
    assert costs.share(StepPlan(FREEZE, (last,))) > 1 / 3 - 0.05
    for dropped in ((0,), (last,), all_of_them):
        plan = StepPlan(FREEZE, dropped)
        assert costs.share(plan) < with_head.share(plan) < with_trunk.share(plan)
    assert with_trunk.share(StepPlan(FREEZE, all_of_them)) == pytest.approx(1.0, abs=1e-9)
    for other in (with_head, with_trunk):
        assert other.share(StepPlan(DEPTH, (0,))) == costs.share(StepPlan(DEPTH, (0,)))


def test_words_and_booleans_cost_the_same():
    model = build("vit")
    blocks, plan = find_residual_blocks(model), StepPlan(FREEZE, (2,))
    for word, boolean in (("all", True), ("none", False)):
        given, same = (measure_step_costs(model, blocks, train_trunk=value) for value in (word, boolean))
        assert given.share(plan) == same.share(plan)
        assert same.train_trunk == word


@every_architecture
def test_costs_on_the_meta_device_are_the_same(architecture):
    model = build(architecture)
    if architecture in ("vit", "swin"):
        model.set_attn_implementation("eager")  # FlopCounterMode does not count the fused attention of the CPU.
    expected = measure_step_costs(model, find_residual_blocks(model))
    meta = model.to("meta")
    costs = measure_step_costs(meta, find_residual_blocks(meta))
    plans = [StepPlan(kind, dropped) for kind in (DEPTH, FREEZE) for dropped in ((0,), (1, 2), (3,))]
    for plan in plans:
        assert costs.share(plan) == pytest.approx(expected.share(plan), rel=0.02), plan


@every_architecture
@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(architecture, training):
    model = build(architecture).train(training)
    blocks = find_residual_blocks(model)
    before, state = snapshot(model), torch.get_rng_state()
    values = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    measure_step_costs(model, blocks)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is values[name][0]
        assert torch.equal(value, values[name][1])


def test_gradients_that_are_there_stay():
    model = build("vit")
    model(IMAGE).logits.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in gradients]
    measure_step_costs(model, find_residual_blocks(model))
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(gradient, value) for gradient, value in zip(gradients, values, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_share_does_not_depend_on_the_size_of_the_batch(batch_size):
    model = build("vit")
    blocks = find_residual_blocks(model)
    costs = measure_step_costs(model, blocks, torch.zeros(batch_size, 3, 32, 32))
    default = measure_step_costs(model, blocks)
    assert costs.vanilla == batch_size * default.vanilla
    for plan in (StepPlan(DEPTH, (1, 3)), StepPlan(FREEZE, (1, 3))):
        assert costs.share(plan) == pytest.approx(default.share(plan), rel=1e-9)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * x


def test_model_without_counted_arithmetic_costs_as_much_in_every_step():
    """Nothing to divide by: no share is claimed to be saved."""
    model = nn.Sequential(nn.LayerNorm(4), nn.Sequential(Block(), Block()))
    x = torch.ones(1, 4)
    costs = measure_step_costs(model, find_residual_blocks(model, x), x)
    assert costs.vanilla == 0
    assert [costs.share(StepPlan(kind, (0,))) for kind in (DEPTH, FREEZE)] == [1.0, 1.0]


def test_model_with_nothing_that_trains_is_an_error():
    model = build("vit")
    blocks = find_residual_blocks(model)
    model.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(BlockError, match="no tensor with gradients"):
        measure_step_costs(model, blocks)
    assert snapshot(model) == before


def test_model_without_a_config_needs_inputs():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block(), Block()))
    blocks = find_residual_blocks(model, torch.ones(1, 4))
    with pytest.raises(BlockError, match="`inputs`"):
        measure_step_costs(model, blocks)


# Look-alikes: one class and the same shapes of parameters, but other operations


class Windowed(nn.Module):
    """Attention within windows of so many tokens, or, with 0, among all."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.qkv, self.window = nn.Linear(8, 24), window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (part.reshape(-1, self.window or tokens, width) for part in self.qkv(x).chunk(3, -1))
        return x + ((q @ k.transpose(1, 2)).softmax(-1) @ v).reshape(batch, tokens, width)


class Repeated(nn.Module):
    """A layer that runs several times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.linear, self.times = nn.Linear(8, 8), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = x
        for _ in range(self.times):
            branch = torch.tanh(self.linear(branch))
        return x + branch


class Pooled(nn.Module):
    """A convolution over every so many places."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv, self.stride = nn.Conv1d(16, 16, 3, padding=1), stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.interpolate(self.conv(x[..., :: self.stride]), x.shape[-1])


class Detached(nn.Module):
    """The same forward, without a gradient to the input through the branch or to the weights."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.second, self.what = nn.Linear(8, 8), nn.Linear(8, 8), what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.first(x.detach() if self.what == "input" else x)
        return x + self.second(branch.detach() if self.what == "between" else branch)


LOOK_ALIKES = {
    "windows": [Windowed(4), Windowed(4), Windowed(0), Windowed(8)],
    "repeats": [Repeated(1), Repeated(3), Repeated(1), Repeated(2)],
    "resolutions": [Pooled(1), Pooled(4), Pooled(2), Pooled(1)],
    "backward alone": [Detached(""), Detached("input"), Detached("between"), Detached("")],
}


class Stack(nn.Module):
    def __init__(self, stem: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(copy.deepcopy(blocks)), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def check_shares(model: nn.Module, x: torch.Tensor, train_trunk: str) -> None:
    """Every set of blocks, in both kinds of step, costs what the counter counts."""
    blocks = find_residual_blocks(model, x)
    costs = measure_step_costs(model, blocks, x, train_trunk=train_trunk)
    for kind, size in itertools.product((DEPTH, FREEZE), (1, 2, len(blocks))):
        for dropped in itertools.combinations(range(len(blocks)), size):
            chosen = [blocks[index] for index in dropped]
            if kind is DEPTH:
                context = skip_blocks(chosen)
            else:
                context = train_only(model, chosen, train_trunk=train_trunk, all_blocks=blocks)
            model.zero_grad(set_to_none=True)
            with context, flop_counter() as counter:
                model(x).sum().backward()
            expected = counter.get_total_flops() / costs.vanilla
            assert costs.share(StepPlan(kind, dropped)) == pytest.approx(expected, rel=1e-9), (kind, dropped)


@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_blocks_that_look_alike_and_compute_other_things_have_their_own_cost(kind):
    check_shares(Stack(nn.Linear(3, 8), LOOK_ALIKES[kind]), torch.randn(1, 16, 3), "all")


def test_blocks_that_count_alike_are_run_once(monkeypatch):
    runs = []
    monkeypatch.setattr(cost, "replay", lambda block, *_: lambda: runs.append(block.name))
    model = Stack(nn.Linear(3, 8), [Windowed(4), Windowed(4), Windowed(0), Windowed(4), Windowed(0)])
    measure_step_costs(model, find_residual_blocks(model, torch.randn(1, 16, 3)), torch.randn(1, 16, 3))
    assert sorted(set(runs)) == ["blocks.0", "blocks.2"]


@pytest.mark.parametrize("train_trunk", ["all", "head", "none"])
def test_a_stem_of_several_layers_is_counted_only_if_it_trains(train_trunk):
    stem = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    check_shares(Stack(stem, [Repeated(1), Repeated(1)]), torch.randn(1, 16, 3), train_trunk)


@pytest.mark.parametrize("train_trunk", ["all", "head", "none"])
@pytest.mark.parametrize("kind", [StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE])
def test_one_set_costs_what_a_single_sample_with_this_set_costs(kind, train_trunk):
    blocks = tuple(BlockCost(trained=300 + i, lowest=200 + i, frozen=190 + i, resting=100 + i) for i in range(5))
    costs = StepCosts(4000, blocks, (10, 1, 2, 3, 4, 50), (True, False, False, False, False, True), train_trunk)
    for size in range(6):
        for dropped in itertools.combinations(range(5), size):
            masks = np.zeros((1, 5), dtype=bool)
            masks[0, list(dropped)] = True
            assert costs.share(StepPlan(kind, dropped)) == costs.share(StepPlan(kind, sample_masks=masks)), dropped


# The counter


class SplitConvolution(nn.Module):
    """A grouped convolution as so many dense ones, side by side."""

    def __init__(self, grouped: nn.Conv2d) -> None:
        super().__init__()
        groups, options = grouped.groups, {"stride": grouped.stride, "padding": grouped.padding}
        widths = (grouped.in_channels // groups, grouped.out_channels // groups)
        self.parts = nn.ModuleList(
            nn.Conv2d(*widths, grouped.kernel_size, bias=grouped.bias is not None, **options) for _ in range(groups)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = x.chunk(len(self.parts), 1)
        return torch.cat([part(piece) for part, piece in zip(self.parts, pieces, strict=True)], 1)


@pytest.mark.parametrize("wanted", ["both", "input", "weight"])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"bias": False}])
def test_grouped_convolutions_count_as_the_dense_ones_they_are(groups: int, options: dict, wanted: str):
    grouped = nn.Conv2d(8, 16, 3, groups=groups, **options)
    counts = []
    for layer, counter in (
        (grouped, flop_counter()),
        (SplitConvolution(grouped), torch.utils.flop_counter.FlopCounterMode(display=False)),
    ):
        layer.requires_grad_(wanted != "input")
        x = torch.randn(2, 8, 9, 9, requires_grad=wanted != "weight")
        with counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("architecture", ["vit", "swin", "resnet"])
def test_without_grouped_convolutions_the_counter_is_that_of_torch(architecture: str):
    model = build(architecture).eval()
    raw = torch.utils.flop_counter.FlopCounterMode(display=False)
    with raw:
        copy.deepcopy(model)(IMAGE).logits.sum().backward()
    assert measure_step_costs(model, find_residual_blocks(model), {"pixel_values": IMAGE}).vanilla == (
        raw.get_total_flops()
    )
