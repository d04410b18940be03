"""A backward after the exit of the step, when blocks are no longer skipped or frozen, is a clear error."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from engine_checks import ALWAYS, engine
from tiny_models import WITHOUT_BATCH_NORM, batch, build, snapshot
from torch import nn

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, StepError, StepKind, compile_blocks, find_residual_blocks

DEPTH, FREEZE, VANILLA = StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE, StepKind.VANILLA
STEPS = {DEPTH: 0, FREEZE: 1}
LEFT = r"Backward ran after `step\((0|1)\)` was left.*Call `loss.backward\(\)` inside the `with` block"
every_kind = pytest.mark.parametrize("kind", [DEPTH, FREEZE])


@every_kind
@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("architecture", WITHOUT_BATCH_NORM)
@pytest.mark.parametrize("loss_of", [lambda output: output.loss, lambda output: output.logits.square().sum()])
def test_backward_after_the_step_is_an_error(kind, granularity, architecture, loss_of):
    model = build(architecture).train()
    reuse = engine(model, drop_granularity=granularity)
    before = snapshot(model)
    with reuse.step(STEPS[kind], batch_size=4) as plan:
        loss = loss_of(model(**batch(4)))
    assert plan.kind is kind
    with pytest.raises(StepError, match=LEFT):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert snapshot(model) == before


@every_kind
def test_backward_inside_may_run_twice_and_after_a_hook_of_the_user(kind):
    model, seen = build("vit").train(), []
    reuse = engine(model)
    model.register_forward_hook(lambda _module, _args, output: seen.append(output))
    with reuse.step(STEPS[kind]):
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, seen[0].logits)
    assert gradient.abs().sum() > 0
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_in_a_plain_step_backward_may_follow():
    model = build("vit").train()
    reuse = engine(model, stochastic_depth_steps=0, masked_freeze_steps=0)
    with reuse.step(0) as plan:
        loss = model(**batch()).loss
    loss.backward()
    assert plan.kind is VANILLA


def test_the_losses_of_all_micro_batches_at_once_are_too_late():
    model = build("vit").train()
    reuse, losses = engine(model), []
    for seed in range(2):
        with reuse.step(1):
            losses.append(model(**batch(seed=seed)).loss)
    with pytest.raises(StepError, match=LEFT):
        sum(losses).backward()


@every_kind
def test_compiled_blocks_too(kind):
    model = build("vit").train()
    reuse = engine(model)
    with compile_blocks(reuse.blocks, backend="aot_eager"):
        with reuse.step(STEPS[kind]):
            model(**batch()).loss.backward()
        model.zero_grad(set_to_none=True)
        with reuse.step(STEPS[kind]):
            loss = model(**batch()).loss
        with pytest.raises(StepError, match=LEFT):
            loss.backward()


@dataclass
class Output:
    logits: torch.Tensor
    count: int = 0


FORMS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, None, 3),
    "dictionary": lambda x: OrderedDict(logits=x, count=1),
    "dataclass": Output,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Network(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.stem, self.blocks, self.form = nn.Linear(4, 4), nn.Sequential(Block(), Block()), FORMS[form]

    def forward(self, x: torch.Tensor):
        return self.form(self.blocks(self.stem(x)))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_output_is_watched(form):
    model, x = Network(form), torch.ones(1, 4)
    blocks = find_residual_blocks(model, x)
    reuse = FeatureReuse(model, blocks, FeatureReuseSchedule(2, **ALWAYS))
    with reuse.step(1):
        output = model(x)
    tensor = output if form == "tensor" else output[0] if form == "tuple" else vars(output).get("logits")
    tensor = output["logits"] if form == "dictionary" else tensor
    with pytest.raises(StepError, match=LEFT):
        tensor.sum().backward()


def test_a_parameter_that_the_model_returns_keeps_no_hook():
    class WithScale(Network):
        def __init__(self) -> None:
            super().__init__("tensor")
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor):
            return super().forward(x), self.scale

    model, x = WithScale(), torch.ones(1, 4)
    reuse = FeatureReuse(model, find_residual_blocks(model, x), FeatureReuseSchedule(2, **ALWAYS))
    with reuse.step(1):
        output, scale = model(x)
        (output.sum() * scale).backward()
    (model.scale * 2).backward()
    assert not model.scale._backward_hooks
