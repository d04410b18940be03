"""Buffers of frozen modules of any kind do not change in a masked-freeze step."""

import pytest
import torch
from torch import nn
from torch.ao.quantization import MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, StepKind, StepPlan, find_residual_blocks, train_only

WIDTH, TOKENS = 8, 5


class Statistics(nn.Module):
    """A norm with a moving mean that it changes in one of the usual ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("first", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            new = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
            if self.way == "in place":
                self.mean.copy_(new)
            elif self.way == "data":
                self.mean.data.copy_(new)
            elif self.way == "replaced":
                self.mean = new
            elif self.way == "made at the first call" and self.first is None:
                self.first = new
        return x - self.mean.clone()


class OwnBatchNorm(nn.BatchNorm1d):
    """Ignores `track_running_stats`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1
        )


LAYERS = {
    "instance norm": lambda: nn.InstanceNorm1d(TOKENS, affine=True, track_running_stats=True),
    "spectral norm": lambda: spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral norm as a hook": lambda: old_spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "observer": MinMaxObserver,
    "moving observer": MovingAverageMinMaxObserver,
    "observer that changes its shape": lambda: PerChannelMinMaxObserver(ch_axis=2),
    "batch norm with its own forward": lambda: OwnBatchNorm(TOKENS),
    **{way: lambda way=way: Statistics(way) for way in ("in place", "data", "replaced", "made at the first call")},
}


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.linear = layer, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(self.layer(x)))


class Network(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Sequential(nn.Linear(3, WIDTH), make()), nn.Linear(WIDTH, 2)
        self.blocks = nn.ModuleList(Block(make()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Fixed(FeatureReuseSchedule):
    """Masked freeze of all blocks but the second, then stochastic depth that drops nothing."""

    def plan(self, global_step, **_):
        if global_step % 2:
            return StepPlan(StepKind.STOCHASTIC_DEPTH, (), survival=(1.0,) * 3)
        return StepPlan(StepKind.MASKED_FREEZE, (1,))


def batch(seed: int) -> torch.Tensor:
    return torch.randn(4, TOKENS, 3, generator=torch.Generator().manual_seed(seed))


def buffers(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {
        f"{path}.{name}": None if tensor is None else tensor.clone()
        for path, module in model.named_modules()
        for name, tensor in module._buffers.items()
    }


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in before if not same(before[name], after[name])}


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return (a is b is None) or (a is not None and b is not None and torch.equal(a, b))


def forward_and_backward(model: nn.Module, seed: int) -> torch.Tensor:
    output = model(batch(seed))
    output.square().sum().backward()
    model.zero_grad(set_to_none=True)
    return output.detach()


@pytest.fixture(params=LAYERS)
def model(request) -> Network:
    return Network(LAYERS[request.param]).train()


def twin(model: Network, layer: str) -> Network:
    """Another model in the same state; not every layer can be copied after a forward."""
    other = Network(LAYERS[layer]).train()
    for mine, its in zip(other.modules(), model.modules(), strict=True):
        mine.training = its.training
        mine._buffers.update({name: None if b is None else b.clone() for name, b in its._buffers.items()})
    return other


@pytest.mark.parametrize("train_trunk", ["all", "none"])
def test_only_buffers_of_what_trains_change_in_a_masked_freeze_step(model, train_trunk, request):
    blocks = find_residual_blocks(model, batch(0)[:1])
    reuse = FeatureReuse(model, blocks, Fixed(3), train_trunk=train_trunk)
    held = {name: id(tensor) for name, tensor in model.named_buffers()}
    for step in (0, 1, 2, 4):
        before, plain = buffers(model), twin(model, request.node.callspec.params["model"])
        with reuse.step(step) as plan:
            output = forward_and_backward(model, step)
        # Frozen or not, a layer computes the same as in plain training.
        assert torch.equal(output, forward_and_backward(plain, step))
        everywhere, found = moved(before, buffers(plain)), moved(before, buffers(model))
        frozen = ("blocks.0", "blocks.2", "stem") if train_trunk == "none" else ("blocks.0", "blocks.2")
        if plan.kind is StepKind.STOCHASTIC_DEPTH:
            frozen = ()
        assert found == {name for name in everywhere if not name.startswith(frozen)}
        assert step or any(name.startswith("blocks.0") for name in everywhere)
    assert {name for name, tensor in model.named_buffers() if id(tensor) != held.get(name)} <= {
        f"{part}.layer.{name}" for part in ("blocks.0", "blocks.1", "blocks.2") for name in ("mean", "first")
    } | {"stem.1.mean", "stem.1.first"}


def test_train_only_restores_them_too(model):
    blocks = find_residual_blocks(model, batch(0)[:1])
    before = buffers(model)
    with train_only(model, blocks[1:2]):
        forward_and_backward(model, 1)
    found = moved(before, buffers(model))
    assert found and all(name.startswith("blocks.1") for name in found)


def test_a_layer_that_the_user_keeps_in_eval_mode_computes_the_same_as_before(model, request):
    forward_and_backward(model, 0)
    for block in model.blocks:
        block.layer.eval()
    reuse = FeatureReuse(model, find_residual_blocks(model, batch(0)[:1]), Fixed(3))
    # Whatever that is: an observer observes in evaluation, too.
    plain = twin(model, request.node.callspec.params["model"])
    with reuse.step(0):
        assert torch.equal(forward_and_backward(model, 1), forward_and_backward(plain, 1))
    assert not any(block.layer.training for block in model.blocks)


def test_a_buffer_that_starts_to_change_later_is_restored(model):
    reuse = FeatureReuse(model, find_residual_blocks(model, batch(0)[:1]), Fixed(3))
    model.eval()
    with reuse.step(0):
        forward_and_backward(model, 1)
    model.train()
    before = buffers(model)
    with reuse.step(0):
        forward_and_backward(model, 2)
    assert all(name.startswith(("blocks.1", "stem")) for name in moved(before, buffers(model)))


def test_buffers_are_restored_after_an_error(model):
    reuse = FeatureReuse(model, find_residual_blocks(model, batch(0)[:1]), Fixed(3), train_trunk="none")
    before = buffers(model)
    with pytest.raises(KeyboardInterrupt), reuse.step(0):
        model(batch(1))
        raise KeyboardInterrupt
    assert all(name.startswith("blocks.1") for name in moved(before, buffers(model)))


def test_a_buffer_shared_with_a_block_that_trains_changes():
    model = Network(LAYERS["in place"]).train()
    model.blocks[0].layer.mean = model.blocks[1].layer.mean
    reuse = FeatureReuse(model, find_residual_blocks(model, batch(0)[:1]), Fixed(3))
    before = buffers(model)
    with reuse.step(0):
        forward_and_backward(model, 1)
    assert {"blocks.0.layer.mean", "blocks.1.layer.mean"} <= moved(before, buffers(model))


def test_a_step_copies_a_buffer_only_after_it_has_changed():
    model = Network(lambda: Statistics("never")).train()
    reuse = FeatureReuse(model, find_residual_blocks(model, batch(0)[:1]), Fixed(3))
    with reuse.step(0):
        forward_and_backward(model, 1)

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    with Count(), reuse.step(2):
        pass
    assert Count.calls == 0
