"""Classes that are swapped for a step: no registry learns of them, and copies made meanwhile are plain."""

import contextlib
import copy
import functools
import io
import pickle
from typing import ClassVar

import numpy as np
import pytest
import torch
from tiny_models import batch, build, snapshot
from torch import nn

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    StepKind,
    StepPlan,
    compile_blocks,
    find_residual_blocks,
)

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Fixed(FeatureReuseSchedule):
    """Stochastic depth that drops the first block, then masked freeze that trains it; or the same per sample."""

    def plan(self, global_step, *, batch_size=None, position=0):
        kind = StepKind.MASKED_FREEZE if global_step % 2 else StepKind.STOCHASTIC_DEPTH
        survival = None if global_step % 2 else (0.5,) * self.num_blocks
        if self.drop_granularity == "batch":
            return StepPlan(kind, (0,), survival=survival)
        masks = np.zeros((batch_size, self.num_blocks), dtype=bool)
        masks[: batch_size // 2, 0] = True
        return StepPlan(kind, sample_masks=masks, survival=survival)


every_step = pytest.mark.parametrize("step", [0, 1], ids=["stochastic depth", "masked freeze"])
every_granularity = pytest.mark.parametrize("granularity", ["batch", "sample"])

# Class registries


class Registry(type):
    """A metaclass that knows every class made with it."""

    made: ClassVar[list[str]] = []

    def __new__(cls, name, bases, namespace, **keywords):
        cls.made.append(name)
        return super().__new__(cls, name, bases, namespace, **keywords)

    def __init__(cls, name, bases, namespace, **keywords):
        super().__init__(name, bases, namespace)
        cls.made.append(f"{name} again")


class Base(nn.Module):
    registry: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, tag: str, **keywords) -> None:
        super().__init_subclass__(**keywords)
        Base.registry[tag] = Base.registry[cls.__name__] = cls


class Norm(nn.BatchNorm1d, metaclass=Registry):
    pass


class Branch(Base, tag="branch"):
    def __init__(self, with_norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = Norm(8) if with_norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.tanh(self.linear(x)))


class MyBlock(Base, tag="block", metaclass=Registry):
    def __init__(self, with_norm: bool) -> None:
        super().__init__()
        self.branch = Branch(with_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.branch(x)).relu()


class Model(Base, tag="model", metaclass=Registry):
    def __init__(self, with_norm: bool) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(8, 8), nn.ModuleList(MyBlock(with_norm) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        return x


@every_step
@every_granularity
@pytest.mark.parametrize("policy", ["batch", "inference"])
def test_class_registries_keep_the_plain_classes(step, granularity, policy):
    model = Model(with_norm=granularity == "batch").train()
    made, registry, before = list(Registry.made), dict(Base.registry), snapshot(model)
    schedule = Fixed(3, drop_granularity=granularity)
    reuse = FeatureReuse(model, find_residual_blocks(model, X), schedule, frozen_batch_norm=policy)
    with reuse.step(step, batch_size=4):
        assert all(isinstance(block, MyBlock) for block in model.blocks)
        assert {type(block).__name__ for block in model.blocks} == {"MyBlock"}
        assert type(model).__name__ == "Model" and isinstance(model, Model)
        model(X).sum().backward()
    assert Registry.made == made
    assert Base.registry == registry
    assert all(type(block) is MyBlock for block in model.blocks)
    assert snapshot(model) == before


# Copies


def copies(model: nn.Module):
    yield copy.deepcopy(model)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(model, protocol))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    yield torch.load(stream, weights_only=False)


def without_flags(found: dict[str, object]) -> dict[str, object]:
    """`requires_grad` of a frozen parameter is an attribute of the tensor, and copied."""
    return {key: value for key, value in found.items() if key != "requires_grad"}


@every_step
@pytest.mark.parametrize("granularity, name", [("batch", "vit"), ("batch", "resnet"), ("sample", "vit")])
@pytest.mark.parametrize("policy", ["batch", "inference"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_copies_made_in_a_step_are_plain(step, granularity, name, policy, compiled):
    if compiled and granularity == "sample":
        return  # Refused.
    model = build(name).train()
    blocks, before = find_residual_blocks(model), snapshot(model)
    reuse = FeatureReuse(
        model, blocks, Fixed(len(blocks), drop_granularity=granularity), frozen_batch_norm=policy, train_trunk="none"
    )
    with compile_blocks(blocks, backend="eager") if compiled else contextlib.nullcontext():
        with reuse.step(step, batch_size=4):
            for other in copies(model):
                assert without_flags(snapshot(other)) == without_flags(before)
                assert all(module._compiled_call_impl is None for module in other.modules())
                # Nor does `train` change the original.
                other.eval()
                assert not any(module.training for module in other.modules())
                assert other(**batch()).logits.isfinite().all()
    assert snapshot(model) == before


class OwnState(nn.Linear):
    """A residual block that pickles its attributes directly."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)

    def __getstate__(self):
        return self.__dict__


class OwnReduce(OwnState):
    """A residual block that is pickled as a call."""

    def __reduce__(self):
        return type(self), (8, 8)


@every_step
@every_granularity
@pytest.mark.parametrize("kind", [OwnState, OwnReduce])
def test_a_class_s_own_way_of_pickling_is_used_and_the_copy_is_plain(kind, step, granularity):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(kind(8, 8), kind(8, 8)))
    before = snapshot(model)
    reuse = FeatureReuse(model, find_residual_blocks(model, X), Fixed(2, drop_granularity=granularity))
    with reuse.step(step, batch_size=4):
        for other in copies(model):
            assert without_flags(snapshot(other)) == without_flags(before)
    assert snapshot(model) == before


# A forward that is set on the instance, as accelerate does


@every_step
@every_granularity
def test_a_patched_forward_is_used_restored_and_copied(step, granularity):
    model = build("vit").train()
    blocks, calls = find_residual_blocks(model), []

    def patched(forward, *args, **kwargs):
        calls.append(forward)
        return forward(*args, **kwargs)

    for block in blocks:
        block.module.forward = functools.partial(patched, block.module.forward)
    before, forwards = snapshot(model), [block.module.__dict__["forward"] for block in blocks]
    reuse = FeatureReuse(model, blocks, Fixed(4, drop_granularity=granularity))
    with reuse.step(step, batch_size=4):
        model(**batch(4)).loss.backward()
        assert len(calls) >= 3
        twin = copy.deepcopy(model)
        assert snapshot(twin)["attributes"] == before["attributes"]
    assert snapshot(model) == before
    assert [block.module.__dict__["forward"] for block in blocks] == forwards
    with pytest.raises(ZeroDivisionError), reuse.step(step, batch_size=4):
        raise ZeroDivisionError
    assert [block.module.__dict__["forward"] for block in blocks] == forwards
