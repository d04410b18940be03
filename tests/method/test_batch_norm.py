"""Under activation checkpointing running statistics are updated once per batch, in every kind of step."""

import copy
import itertools
import pickle

import pytest
import torch
from tiny_models import snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, StepKind, find_residual_blocks
from hf_featreuse.method.batch_norm import count_batches_once

MOMENTA = [0.1, 1.0, None]


class Block(nn.Module):
    """Two layers of BatchNorm; the ReLU between them needs the first one's output again in backward."""

    def __init__(self, momentum: float | None, checkpointed: bool, inside: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4, momentum=momentum)
        self.last_norm = nn.BatchNorm1d(4, momentum=momentum)
        self.checkpointed, self.inside = checkpointed, inside

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x)).relu()
        return self.last_norm(self.second(hidden)).tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = self.checkpointed and self.inside and self.training
        return x + (checkpoint(self.branch, x, use_reentrant=False) if inside else self.branch(x))


class Network(nn.Module):
    """Residual blocks, checkpointed inside each block, around each stage, or both."""

    def __init__(self, momentum: float | None = 0.1, inside: bool = False, around: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.stem_norm = nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=momentum)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(momentum, inside, inside) for _ in range(2))) for _ in range(2)
        )
        self.around = around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem_norm(self.stem(x))
        for stage in self.stages:
            x = checkpoint(stage, x, use_reentrant=False) if self.around and self.training else stage(x)
        return x


WAYS = [{"inside": True}, {"around": True}, {"inside": True, "around": True}]


def batch(seed: int = 1) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def engine(model: nn.Module, **options) -> FeatureReuse:
    blocks = find_residual_blocks(model, batch())
    assert len(blocks) == 4
    return FeatureReuse(model, blocks, FeatureReuseSchedule(4, 0.5, "uniform", seed=0), **options)


def trained(model: nn.Module, **options) -> dict[str, torch.Tensor]:
    """Weights, statistics and gradients after six steps of all three kinds, two micro-batches each."""
    reuse, kinds, found = engine(model, **options), set(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in steps(reuse):
        for micro in range(2):
            with reuse.step(step) as plan:
                model.train()
                model(batch(10 * step + micro)).square().mean().backward()
        kinds.add(plan.kind)
        found |= {f"{step} {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert kinds == set(StepKind)
    return found | {name: value.clone() for name, value in model.state_dict().items()}


def steps(reuse: FeatureReuse) -> list[int]:
    """Two steps of each kind."""
    found = []
    for kind in StepKind:
        of_kind = (step for step in itertools.count() if reuse.plan(step).kind is kind)
        found += itertools.islice(of_kind, 2)
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("options", [{}, {"train_trunk": True}, {"frozen_batch_norm": "inference"}], ids=str)
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_training_is_the_same_with_checkpointing(way, momentum, options):
    assert_same(trained(Network(momentum, **way), **options), trained(Network(momentum), **options))


def test_without_the_context_statistics_are_updated_twice():
    """What is fixed: PyTorch counts a checkpointed batch twice, or three times if checkpoints are nested."""
    counts = {}
    for way in WAYS:
        model = Network(**way)
        model(batch()).square().mean().backward()
        counts[str(way)] = {norm.num_batches_tracked.item() for norm in model.stages.modules() if is_norm(norm)}
    assert counts == {str(WAYS[0]): {2}, str(WAYS[1]): {2}, str(WAYS[2]): {2, 3}}


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm2d(3), (4, 3, 5, 5)),
        (nn.BatchNorm2d(3, affine=False), (4, 3, 5, 5)),
        (nn.InstanceNorm1d(3, track_running_stats=True), (4, 3, 5)),
        (nn.LazyBatchNorm1d(), (4, 3)),
    ],
    ids=["2d", "without-weights", "instance", "lazy"],
)
def test_kinds_of_layers(norm, shape):
    x = torch.randn(shape, requires_grad=True)
    norm(x)
    plain, checkpointed = copy.deepcopy(norm), copy.deepcopy(norm)
    plain(x).square().sum().backward()
    expected, x.grad = x.grad, None
    with count_batches_once([checkpointed]):
        checkpoint(checkpointed, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, expected)
    assert_same(checkpointed.state_dict(), plain.state_dict())


def test_reentrant_checkpointing_of_plain_training_counts_once_too():
    norm, x = nn.BatchNorm1d(4), batch().requires_grad_()
    with count_batches_once([norm]):
        checkpoint(norm, x, use_reentrant=True).square().sum().backward()
    assert norm.num_batches_tracked == 1


def test_a_layer_with_its_own_forward_counts_once_too():
    # Like accelerate's hooks.
    norm, x = nn.BatchNorm1d(4), batch().requires_grad_()
    norm.forward = norm.forward
    with count_batches_once([norm]):
        checkpoint(norm, x, use_reentrant=False).square().sum().backward()
    assert norm.num_batches_tracked == 1


def test_infinite_activations_do_not_change_the_statistics_of_the_forward():
    norm, x = nn.BatchNorm1d(4), torch.full((8, 4), 1e30).requires_grad_()
    x.data[0] = -1e30
    plain = copy.deepcopy(norm)
    plain(x)
    with count_batches_once([norm]):
        checkpoint(norm, x, use_reentrant=False).sum().backward()
    assert not norm.running_var.isfinite().any()
    assert torch.equal(norm.running_var, plain.running_var)
    assert torch.equal(norm.running_mean, plain.running_mean)


@pytest.mark.parametrize("kind", StepKind)
def test_a_step_does_not_change_the_layers(kind):
    model = Network(inside=True, around=True)
    reuse, buffers = engine(model), [id(buffer) for buffer in model.buffers()]
    before = snapshot(model)
    step = next(step for step in itertools.count() if reuse.plan(step).kind is kind)
    with reuse.step(step):
        model(batch()).square().mean().backward()
    assert snapshot(model) == before
    assert [id(buffer) for buffer in model.buffers()] == buffers

    class Stop(Exception):
        pass

    def stop(_gradient: torch.Tensor) -> None:
        raise Stop

    model.stem.weight.grad = None
    model.zero_grad(set_to_none=True)
    with pytest.raises(Stop), reuse.step(step):
        output = model(batch())
        output.register_hook(stop)
        output.square().mean().backward()
    assert snapshot(model) == before
    assert [id(buffer) for buffer in model.buffers()] == buffers


def test_an_error_in_the_recomputation_restores_the_buffers():
    class Failing(nn.BatchNorm1d):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls > 1:
                raise OSError("in the recomputation")
            return super().forward(x)

    norm, x = Failing(4), batch().requires_grad_()
    buffers = [id(buffer) for buffer in norm.buffers()]
    with count_batches_once([norm]):
        output = checkpoint(norm, x, use_reentrant=False)
        with pytest.raises(OSError, match="in the recomputation"):
            output.sum().backward()
        assert [id(buffer) for buffer in norm.buffers()] == buffers
    assert type(norm) is Failing


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda norm: pickle.loads(pickle.dumps(norm))],
    ids=["deep", "shallow", "pickle"],
)
def test_copies_made_inside_are_plain(copied):
    norm = nn.BatchNorm1d(4)
    norm(batch())
    with count_batches_once([norm]):
        assert type(norm) is not nn.BatchNorm1d
        assert type(norm).__name__ == "BatchNorm1d"
        twin = copied(norm)
    assert type(twin) is type(norm) is nn.BatchNorm1d
    assert_same(twin.state_dict(), norm.state_dict())


def test_the_recomputation_of_a_replica_does_not_change_statistics_of_the_original():
    norm, x = nn.BatchNorm1d(4), batch().requires_grad_()
    with count_batches_once([norm]):
        replica = norm._replicate_for_data_parallel()
        replica._parameters = norm._parameters
        replica._buffers = {name: value.clone() for name, value in norm._buffers.items()}
        checkpoint(replica, x, use_reentrant=False).square().sum().backward()
    assert (replica.num_batches_tracked, norm.num_batches_tracked) == (1, 0)


def test_a_compiled_layer_stays_one_graph():
    norm, x = nn.BatchNorm1d(4), batch()
    compiled = torch.compile(lambda x: norm(x), backend="eager", fullgraph=True)
    with count_batches_once([norm]):
        found = compiled(x)
    assert norm.num_batches_tracked == 1
    assert torch.equal(found, nn.BatchNorm1d(4)(x))
