"""The branch that a stochastic-depth step scales: where it is found, and that the step is the formula written out."""

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from architecture_checks import each
from tiny_architectures import ARCHITECTURES, WITH_BLOCKS
from tiny_models import snapshot
from torch import nn
from torch.nn import functional
from transformers.models.bit.modeling_bit import BitBottleneckLayer

from hf_featreuse import ConfigurationError, FeatureReuse, FeatureReuseSchedule, find_residual_blocks, skip_blocks
from hf_featreuse.method.per_sample import skip_samples

WITH_ACTIVATION = tuple(case for case in ARCHITECTURES if case.activation)
EXACT = tuple(case for case in WITH_ACTIVATION if case.exact)


# Where it is


@each(WITH_BLOCKS)
def test_the_branch_is_the_part_labeled(case):
    for block in find_residual_blocks(case.build(), case.batch()):
        assert block.branch is (case.branch and block.module.get_submodule(case.branch)), block.name


def test_every_block_that_ends_in_an_activation_is_labeled():
    assert {case.model_type for case in WITH_ACTIVATION} == {"bit", "regnet", "resnet"}
    assert all(case.branch for case in WITH_ACTIVATION)


class Unit(nn.Module):
    """A block that ends in an activation, with what it computes given as a function of itself and its input."""

    def __init__(self, compute: Callable[["Unit", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.nothing, self.dropout = nn.Identity(), nn.Dropout(0.5)
        self.row = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self, x)


class Net(nn.Module):
    """Two such blocks between a stem and a head."""

    def __init__(self, compute: Callable[[Unit, torch.Tensor], torch.Tensor], times: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(Unit(compute) for _ in range(2))
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            for _ in range(self.times):
                x = block(x)
        return self.head(x)


def in_place(unit: Unit, x: torch.Tensor) -> torch.Tensor:
    branch = unit.linear(x)
    branch += x
    return functional.relu_(branch)


def through_other_parts(unit: Unit, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(unit.nothing(x) + unit.nothing(unit.linear(torch.tanh(unit.other(x)))))


FOUND: dict[str, tuple[str, Callable[[Unit, torch.Tensor], torch.Tensor]]] = {
    "a layer": ("linear", lambda unit, x: torch.relu(x + unit.linear(x))),
    "the second summand or the first": ("linear", lambda unit, x: torch.relu(unit.linear(x) + x)),
    "a row, not its last layer": ("row", lambda unit, x: torch.relu(x + unit.row(x))),
    "an identity behind it": ("dropout", lambda unit, x: torch.relu(x + unit.dropout(unit.linear(x)))),
    "in place": ("linear", in_place),
    "another activation": ("row", lambda unit, x: functional.gelu(x + unit.row(x))),
    "a cast shortcut": ("linear", lambda unit, x: torch.relu(x.view(-1, 4).float() + unit.linear(x))),
}


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("times", [1, 2])
def test_the_branch_of_a_block_written_by_hand(kind, times):
    name, compute = FOUND[kind]
    blocks = find_residual_blocks(Net(compute, times), torch.randn(2, 4))
    assert [block.num_calls for block in blocks] == [times, times]
    assert [block.branch for block in blocks] == [block.module.get_submodule(name) for block in blocks]


NOT_FOUND: dict[str, Callable[[Unit, torch.Tensor], torch.Tensor]] = {
    "inline": lambda unit, x: torch.relu(x + torch.tanh(unit.linear(x))),
    "scaled inline": lambda unit, x: torch.relu(x + 0.5 * unit.linear(x)),
    "alpha": lambda unit, x: torch.relu(torch.add(x, unit.linear(x), alpha=2)),
    "subtracted": lambda unit, x: torch.relu(x - unit.linear(x)),
    "added twice": lambda unit, x: (lambda branch: torch.relu(x + branch + branch))(unit.linear(x)),
    "two additions": lambda unit, x: torch.relu(x + unit.linear(x) + unit.other(x)),
    "called twice": lambda unit, x: torch.relu(x + unit.linear(unit.linear(x))),
    "one part behind both": through_other_parts,
}


@pytest.mark.parametrize("kind", NOT_FOUND)
def test_a_block_without_a_branch_is_refused_at_binding(kind):
    model, x = Net(NOT_FOUND[kind]), torch.randn(2, 4)
    blocks, before = find_residual_blocks(model, x), snapshot(model)
    assert [(block.activation, block.branch) for block in blocks] == [("Relu", None)] * 2
    schedule = FeatureReuseSchedule(2, 0.5, "uniform", seed=1)
    refused = pytest.raises(ConfigurationError, match=r"block blocks\.0 \(Unit\): Relu follows.*`scale_kept=False`")
    with refused:
        FeatureReuse(model, blocks, schedule)
    with refused, skip_blocks([], kept=blocks, survival=[0.5, 0.5]):
        pass
    with refused, skip_samples(blocks, np.zeros((2, 2), dtype=bool), torch.device("cpu"), survival=[0.5, 0.5]):
        pass
    assert snapshot(model) == before
    # What is kept for certain is not divided, and a model that is not scaled trains.
    plain = model(x)
    with skip_blocks([], kept=blocks, survival=[1.0, 1.0]):
        assert torch.equal(model(x), plain)
    with FeatureReuse(model, blocks, schedule, scale_kept=False).step(0) as plan:
        model(x).sum().backward()
    assert len(plan.dropped) < 2
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", FOUND)
def test_the_other_blocks_scale_their_branch(kind):
    name, compute = FOUND[kind]
    model, x = Net(compute).eval(), torch.randn(2, 4)
    blocks = find_residual_blocks(model, x)
    with skip_blocks([], kept=blocks, survival=[0.5, 0.25]):
        found = model(x)
    for block, factor in zip(blocks, (2, 4), strict=True):
        # Factors that are powers of two, in the weights themselves.
        branch = block.module.get_submodule(name)
        last = {"linear": branch, "row": block.module.row[-1], "dropout": block.module.linear}[name]
        last.weight.data *= factor
        last.bias.data *= factor
    torch.testing.assert_close(found, model(x), rtol=0, atol=1e-6)


# The formula written out


class ByHand(nn.Module):
    """A block of ResNet, RegNet or BiT that divides its branch by its survival probability."""

    def __init__(self, block: nn.Module, survival: float) -> None:
        super().__init__()
        self.block, self.survival = block, survival

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block = self.block
        if isinstance(block, BitBottleneckLayer):
            branch = block.norm1(block.conv1(x))
            branch = block.norm2(block.conv2(branch))
            branch = block.norm3(block.conv3(branch))
            return block.activation(block.drop_path(branch) / self.survival + x)
        branch = block.layer(x) / self.survival
        branch += x
        return block.activation(branch)


@each(EXACT)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("precision", ["double", "autocast"])
def test_scaling_equals_a_block_written_by_hand(case, training, precision):
    expected, model = case.build().train(training), case.build().train(training)
    inputs = case.labeled(4)
    autocast = contextlib.nullcontext()
    if precision == "double":
        expected, model = expected.double(), model.double()
        inputs["pixel_values"] = inputs["pixel_values"].double()
    else:
        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    blocks = find_residual_blocks(model)
    survival = [0.9, 0.35, 0.7, 0.21][: len(blocks)]
    for block, probability in zip(blocks, survival, strict=True):
        expected.set_submodule(block.name, ByHand(expected.get_submodule(block.name), probability))
    with autocast:
        first = expected(**inputs)
    first.loss.backward()
    with skip_blocks([], kept=blocks, survival=survival):
        with autocast:
            second = model(**inputs)
        second.loss.backward()
    assert second.logits.dtype == first.logits.dtype
    assert torch.equal(second.logits, first.logits)
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in pairs)
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), expected.buffers(), strict=True))


@pytest.mark.parametrize("case", [case for case in EXACT if case.model_type == "resnet"], ids=lambda case: case.name)
def test_the_division_comes_after_the_batch_norm_of_the_branch(case):
    """Statistics of a scaled block are those of the block as it is; later layers see its output and have others."""
    plain, scaled = case.build().train(), case.build().train()
    blocks = find_residual_blocks(scaled)
    plain(**case.batch(4))
    with skip_blocks([], kept=blocks[1:2], survival=[0.3]):
        scaled(**case.batch(4))
    inside, after = (
        {name for name, _ in scaled.get_submodule(blocks[index].name).named_buffers()} for index in (1, 2)
    )
    assert inside and after
    expected, found = dict(plain.named_buffers()), dict(scaled.named_buffers())
    assert all(torch.equal(found[f"{blocks[1].name}.{name}"], expected[f"{blocks[1].name}.{name}"]) for name in inside)
    assert any(not torch.equal(found[f"{blocks[2].name}.{n}"], expected[f"{blocks[2].name}.{n}"]) for n in after)
