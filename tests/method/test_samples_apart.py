"""Whatever mixes the samples of a batch is refused where every sample has its own set of blocks."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from sample_checks import sample_schedule
from test_frozen_buffers import LAYERS
from tiny_models import batch, build, snapshot
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from hf_featreuse import BlockError, ConfigurationError, FeatureReuse, StepKind, StepPlan, find_residual_blocks
from hf_featreuse.method.per_sample import skip_samples, train_samples

CPU = torch.device("cpu")
WIDTH, TOKENS = 8, 5


class MyBatchNorm(nn.Module):
    """By its name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)) / (x.std(0, correction=0) + 1)


class Tracking(nn.Module):
    """By its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.running_var


class FrozenBatchNorm2d(nn.Module):
    """An affine layer with fixed statistics, as detection models have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.register_buffer("running_var", torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.running_mean) / self.running_var


class Centering(nn.Module):
    """Only by what it does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Scaling(nn.Module):
    """Only by what it does in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean((0, 1)) + 1).sqrt() if self.training else x


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.linear, self.dropout = layer, nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(torch.tanh(self.linear(self.layer(x))))


class Network(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks = nn.Linear(3, WIDTH), nn.ModuleList(Block(make()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(4, TOKENS, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", [MyBatchNorm, Tracking])
def test_norms_over_the_batch_of_other_classes_are_refused(layer):
    model = Network(layer)
    blocks, before = find_residual_blocks(model, X[:1]), snapshot(model)
    with pytest.raises(BlockError, match=rf"cannot train Network: `blocks\.0\.layer` is a {layer.__name__}"):
        FeatureReuse(model, blocks, sample_schedule(3))
    masks = np.zeros((4, 3), dtype=bool)
    for context in (skip_samples, train_samples):
        with pytest.raises(BlockError, match="normalizes over the batch"), context(blocks, masks, CPU):
            pass
    assert snapshot(model) == before


@pytest.mark.parametrize("layer", [Centering, Scaling])
@pytest.mark.parametrize("step", [0, 1])
def test_a_block_that_mixes_samples_is_refused_in_the_first_step(layer, step):
    model = Network(layer).train()
    reuse, before = FeatureReuse(model, find_residual_blocks(model, X[:1]), sample_schedule(3)), snapshot(model)
    with pytest.raises(BlockError, match=r"cannot train block blocks\.\d.*mixes its samples"):
        with reuse.step(step, batch_size=4):
            model(X)
    assert snapshot(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("layer", [FrozenBatchNorm2d, nn.Identity, lambda: nn.LayerNorm(WIDTH)])
@pytest.mark.parametrize("step", [0, 1])
def test_other_norms_are_not_and_looking_changes_no_random_state(layer, step):
    model = Network(layer).train()
    reuse, states = FeatureReuse(model, find_residual_blocks(model, X[:1]), sample_schedule(3)), []
    twin = copy.deepcopy(model)
    second = FeatureReuse(twin, find_residual_blocks(twin, X[:1]), sample_schedule(3))
    for _ in range(2):  # Blocks are looked at in the first of the two.
        torch.manual_seed(3)
        with reuse.step(step, batch_size=4):
            model(X).sum().backward()
        model.zero_grad(set_to_none=True)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.manual_seed(3)
    with second.step(step, batch_size=4):
        twin(X).sum().backward()
    assert torch.equal(torch.get_rng_state(), states[0])


class Fixed(type(sample_schedule(3))):
    """Each block trains on half of the samples; the first on none, the last on all of a masked-freeze step."""

    def plan(self, global_step, *, batch_size=None, position=0):
        masks = np.zeros((4, 3), dtype=bool)
        masks[:2, 1] = masks[:, 2] = True
        return StepPlan(StepKind.MASKED_FREEZE, sample_masks=masks)


@pytest.mark.parametrize("trunk", ["all", "none"])
@pytest.mark.parametrize(
    "make",
    [LAYERS["in place"], LAYERS["data"], lambda: spectral_norm(nn.Linear(WIDTH, WIDTH))],
    ids=["in place", "data", "spectral norm"],
)
def test_buffers_change_only_where_a_block_trains(make, trunk):
    model = Network(make).train()
    blocks = find_residual_blocks(model, X[:1])
    reuse = FeatureReuse(model, blocks, Fixed(3, drop_granularity="sample"), train_trunk=trunk)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    held = {name: id(buffer) for name, buffer in model.named_buffers()}
    with reuse.step(0, batch_size=4):
        model(X).sum().backward()
    moved = {name.split(".")[1] for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {"1", "2"}
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == held


def test_masks_must_fit_the_blocks():
    blocks = find_residual_blocks(build("vit"))
    for context in (skip_samples, train_samples):
        for shape in ((4, 3), (4,)):
            with pytest.raises(ConfigurationError, match=r"`masks` has the shape .* for 4 blocks"):
                with context(blocks, np.zeros(shape, dtype=bool), CPU):
                    pass


def test_skipping_samples_makes_the_checks_of_the_engine():
    """Blocks that cannot be skipped, or whose samples cannot be taken apart."""
    model = build("vit")
    blocks = find_residual_blocks(model)
    masks = np.zeros((4, 4), dtype=bool)
    inexact = [dataclasses.replace(blocks[0], exact=False), *blocks[1:]]
    with pytest.raises(BlockError, match="cannot be skipped exactly"), skip_samples(inexact, masks, CPU):
        pass
    with skip_samples(inexact, masks, CPU, survival=[0.5] * 4, allow_inexact=True):
        model(**batch(4))
    sequence = [dataclasses.replace(blocks[0], unbatched=frozenset({"0"})), *blocks[1:]]
    for context in (skip_samples, train_samples):
        with pytest.raises(BlockError, match="cannot separate the samples"), context(sequence, masks, CPU):
            pass
