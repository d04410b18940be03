"""Arguments and outputs of a block other than its stream, if the samples of a batch are separated."""

import dataclasses
from collections import OrderedDict, defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sample_checks import assert_same_gradients, gradients, sample_schedule
from scaling_reference import drop_path_around
from test_per_sample import CPU, random_masks
from tiny_models import build, snapshot
from torch import nn
from transformers import BatchFeature
from transformers.utils import ModelOutput

from hf_featreuse import BlockError, FeatureReuse, find_residual_blocks
from hf_featreuse.method.per_sample import skip_samples


class Branch(nn.Module):
    """A residual block that takes, in addition to the stream, arguments of samples and arguments that they share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, shift=None, *, extra=(), shared=None):
        # `shared` is of the sizes of the batch, yet belongs to no sample.
        y = self.linear(x) * shared.sum() + extra[0]["scale"][:, None] * extra[1][0].mean()
        return x + (y if shift is None else y + shift), shift


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Branch(4) for _ in range(3))

    def forward(self, x, shared):
        extra = ({"scale": x.sum(1)}, [shared])
        for block in self.blocks:
            x, _ = block(x, x * 0.1, extra=extra, shared=shared)
        return x


def test_arguments_of_samples_are_taken_apart_and_shared_ones_are_not():
    torch.manual_seed(0)
    model, generator = Network(), torch.Generator().manual_seed(1)
    shared = torch.randn(4, 2, generator=generator)
    blocks = find_residual_blocks(model, {"x": torch.randn(2, 4), "shared": shared})
    assert {block.unbatched for block in blocks} == {frozenset({"extra.1.0", "shared"})}
    # As many samples as `shared` has rows.
    x, masks = torch.randn(4, 4, generator=generator), random_masks(4, 3)
    with drop_path_around(blocks, masks, [1.0] * 3):
        expected = model(x, shared)
        expected.square().sum().backward()
    wanted = gradients(model)
    # Which of two summed inputs is the stream is not certain; here it is the first.
    with skip_samples(blocks, masks, CPU, allow_inexact=True):
        output = model(x, shared)
        output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    assert_same_gradients(gradients(model), wanted)


class Pair(NamedTuple):
    scale: torch.Tensor
    shared: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    scale: torch.Tensor
    shared: torch.Tensor
    name: str = "frozen"


@dataclasses.dataclass
class Output(ModelOutput):
    scale: torch.Tensor | None = None
    shared: torch.Tensor | None = None


CONTAINERS = {
    "named tuple": Pair,
    "ordered dictionary": lambda scale, shared: OrderedDict(scale=scale, shared=shared),
    "default dictionary": lambda scale, shared: defaultdict(int, scale=scale, shared=shared),
    "dataclass": Frozen,
    "dataclass of fields made later": lambda scale, shared: Late(scale, shared),
    "model output": lambda scale, shared: Output(scale=scale, shared=shared),
    "batch of a processor": lambda scale, shared: BatchFeature({"scale": scale, "shared": shared}),
    "nested": lambda scale, shared: [Pair(scale, shared), {"more": (Frozen(scale, shared),)}],
}


@dataclasses.dataclass
class Late:
    scale: torch.Tensor
    shared: torch.Tensor
    ratio: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.ratio = self.scale * 2


def read(container) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shared tensor of any of the containers."""
    if isinstance(container, list):
        (scale, shared), (inner,) = container[0], container[1]["more"]
        assert torch.equal(scale, inner.scale)
        return scale, shared
    if isinstance(container, Late):
        return container.ratio / 2, container.shared
    if isinstance(container, (dict, BatchFeature)):
        return container["scale"], container["shared"]
    return container.scale, container.shared


class Modulated(nn.Module):
    """A residual block that takes what belongs to samples, and what they share, in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, conditions):
        scale, shared = read(conditions)
        return x + self.linear(x) * scale[:, None] + shared.mean(0)


class Container(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.blocks = CONTAINERS[form], nn.ModuleList(Modulated() for _ in range(3))
        # As many rows as the batch has samples.
        self.shared = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        given = self.form(x.sum(1), self.shared)
        for block in self.blocks:
            x = block(x, given)
        return x


@pytest.mark.parametrize("form", CONTAINERS)
@pytest.mark.parametrize("probed", [1, 2, 4])
def test_tensors_in_containers_are_taken_apart(form, probed):
    model, x = Container(form), torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    blocks, masks = find_residual_blocks(model, x[:probed]), random_masks(4, 3)
    with drop_path_around(blocks, masks, [1.0] * 3):
        expected = model(x)
        expected.square().sum().backward()
    wanted = gradients(model)
    with skip_samples(blocks, masks, CPU):
        output = model(x)
        output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    assert_same_gradients(gradients(model), wanted)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_a_probed_batch_may_have_as_many_samples_as_a_shared_input_has_rows(size):
    """A forward with one more sample tells them apart."""
    torch.manual_seed(0)
    model, generator = Network(), torch.Generator().manual_seed(1)
    shared, x = torch.randn(4, 2, generator=generator), torch.randn(size, 4, generator=generator)
    before, state = snapshot(model), torch.get_rng_state()
    blocks = find_residual_blocks(model, {"x": x, "shared": shared})
    assert {block.unbatched for block in blocks} == {frozenset({"extra.1.0", "shared"})}
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_that_belong_to_samples_grow_together():
    class TwoInputs(Network):
        def forward(self, x, shift, shared):
            return super().forward(x + shift, shared)

    inputs = {"x": torch.randn(4, 4), "shift": torch.randn(4, 4), "shared": torch.randn(3, 2)}
    blocks = find_residual_blocks(TwoInputs(), inputs)
    assert {block.unbatched for block in blocks} == {frozenset({"extra.1.0", "shared"})}


def test_attentions_of_samples_that_dropped_a_block_are_zero():
    model = build("swin").eval()
    model.set_attn_implementation("eager")
    blocks = find_residual_blocks(model)
    masks = np.zeros((4, len(blocks)), dtype=bool)
    masks[1, -1] = True
    with torch.no_grad(), skip_samples(blocks, masks, CPU):
        output = blocks[-1].module(torch.randn(4, 16, 16), (4, 4), output_attentions=True)
    assert output[1].shape[0] == 4
    assert not output[1][1].any()
    assert all(output[1][sample].any() for sample in (0, 2, 3))


@pytest.mark.parametrize("samples", [2, 3], ids=["as many samples as steps", "other numbers"][::-1])
def test_streams_that_are_not_batch_first_are_refused(samples):
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 8, norm_first=True) for _ in range(2))

        def forward(self, pixel_values):
            stream = pixel_values.transpose(0, 1)
            for block in self.blocks:
                stream = block(stream)
            return stream

    model = SequenceFirst()
    blocks = find_residual_blocks(model, torch.randn(samples, 3, 4))
    with pytest.raises(BlockError, match=r"cannot separate the samples in block blocks\.0.*is not the batch"):
        FeatureReuse(model, blocks, sample_schedule(2))
