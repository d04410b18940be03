"""Scaled steps with compiled blocks: the numbers of eager, one more graph per shape, and no stale probabilities."""

import contextlib
import dataclasses

import pytest
import torch
from compiled_graphs import graphs, nothing_compiled  # noqa: F401
from sample_checks import gradients
from tiny_models import batch, build
from torch import nn
from torch._dynamo.utils import counters

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    StepKind,
    StepPlan,
    compile_blocks,
    find_residual_blocks,
    skip_blocks,
)

# Number of shapes of blocks, and of those whose branch is scaled inside the graph. In Swin every second block shifts.
SHAPES = {"vit": (1, 0), "convnext": (2, 0), "swin": (4, 0), "resnet": (2, 2)}


class Given(FeatureReuseSchedule):
    """Plans of a schedule with other survival probabilities in each step."""

    def plan(self, global_step: int, **samples: int) -> StepPlan:
        plan = super().plan(global_step, **samples)
        if plan.kind is not StepKind.STOCHASTIC_DEPTH:
            return plan
        survival = tuple(1 / (1.5 + (7 * global_step + 3 * index) % 11) for index in range(self.num_blocks))
        return dataclasses.replace(plan, survival=survival)


def engine(model: nn.Module, kind: type[FeatureReuseSchedule] = Given, **options: bool) -> FeatureReuse:
    blocks = find_residual_blocks(model.train())
    return FeatureReuse(model, blocks, kind(len(blocks), 0.4, "uniform", seed=3), **options)


def graphs_of(architecture: str, kind: type[FeatureReuseSchedule], **options: bool) -> int:
    """Graphs of 20 steps of both kinds, some with a part of a batch, and of an evaluation."""
    torch._dynamo.reset()
    counters.clear()
    model = build(architecture)
    reuse = engine(model, kind, **options)
    seen: set[float] = set()
    with compile_blocks(reuse.blocks, backend="eager"):
        for step in range(20):
            model.zero_grad(set_to_none=True)
            with reuse.step(step) as plan:
                model(**batch(4 if step % 3 else 3, seed=step)).loss.backward()
            seen |= set(plan.survival or ())
        with torch.no_grad():
            model.eval()(**batch())
    assert len(seen) == (1 if kind is FeatureReuseSchedule else 11)
    assert not counters["graph_break"] and not counters["unimplemented"]
    return graphs()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHAPES)
def test_scaling_takes_at_most_one_more_graph_per_shape_for_all_probabilities(architecture):
    shapes, inside = SHAPES[architecture]
    plain = graphs_of(architecture, Given, scale_kept=False)
    assert 0 < plain <= 3 * shapes
    for kind in (FeatureReuseSchedule, Given):
        assert graphs_of(architecture, kind) == plain + inside


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_a_new_probability_takes_effect_in_a_block_that_is_compiled_already(architecture):
    model, eager = build(architecture).eval(), build(architecture).eval()
    blocks, eager_blocks = find_residual_blocks(model), find_residual_blocks(eager)
    made = []
    with compile_blocks(blocks, backend="aot_eager"), torch.no_grad():
        plain = model(**batch()).logits
        logits = [plain]
        for first, second in ((0.5, 0.25), (0.25, 0.5), (0.9, 0.1), (1 / 3, 0.7)):
            survival = [first, second, first, second][: len(blocks)]
            with skip_blocks([], kept=blocks, survival=survival):
                found = model(**batch()).logits
            with skip_blocks([], kept=eager_blocks, survival=survival):
                torch.testing.assert_close(found, eager(**batch()).logits, rtol=1e-4, atol=1e-5)
            assert not any(torch.allclose(found, other, rtol=1e-2) for other in logits)
            logits.append(found)
            made.append(graphs())
        # And none is left over.
        assert torch.equal(model(**batch()).logits, plain)
    assert made[1:] == made[:1] * 3


PRECISIONS = {"float32": (1e-4, 1e-5), "bf16 autocast": (0.1, 0.05)}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", SHAPES)
def test_scaled_steps_are_those_of_eager(architecture, precision):
    rtol, atol = PRECISIONS[precision]
    reuses = [engine(build(architecture)) for _ in range(2)]
    survivals, kinds = set(), set()
    with compile_blocks(reuses[1].blocks, backend="aot_eager"):
        for step in range(8):
            losses, found = [], []
            for reuse in reuses:
                autocast = precision != "float32"
                with reuse.step(step) as plan:
                    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                        loss = reuse.model(**batch(4 if step % 3 else 3, seed=step)).loss
                    loss.backward()
                losses.append(loss.detach().float())
                found.append({name: grad for name, grad in gradients(reuse.model).items() if grad is not None})
            torch.testing.assert_close(*losses, rtol=rtol, atol=atol)
            assert found[0].keys() == found[1].keys()
            scale = max(float(gradient.abs().max()) for gradient in found[0].values())
            for name, gradient in found[0].items():
                torch.testing.assert_close(found[1][name], gradient, rtol=rtol, atol=atol * scale)
            kinds.add(plan.kind)
            survivals.add(plan.survival)
    assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= kinds
    assert len(survivals) == 7  # Those of six steps, and none in masked freeze.
    buffers = zip(reuses[1].model.buffers(), reuses[0].model.buffers(), strict=True)
    for ours, theirs in buffers:
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_checkpointed_blocks_that_are_compiled_give_the_gradients_of_plain_ones(architecture):
    plain, model = build(architecture), build(architecture)
    model.activation_checkpointing_enable({"use_reentrant": False})
    reuses = [engine(each) for each in (plain, model)]
    with compile_blocks(reuses[1].blocks, backend="aot_eager"):
        for step in range(4):
            found = []
            for reuse in reuses:
                with reuse.step(step):
                    reuse.model(**batch(seed=step)).loss.backward()
                found.append({name: grad for name, grad in gradients(reuse.model).items() if grad is not None})
            assert found[0].keys() == found[1].keys()
            torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_graphs_of_inductor_scale_the_branch():
    """The probability is a double on the CPU and not an input of the block; the block stays in single precision."""
    model, eager = build("resnet"), build("resnet")
    reuses = [engine(each) for each in (model, eager)]
    with compile_blocks(reuses[0].blocks):
        for step in (0, 2, 4):
            logits, found = [], []
            for reuse in reuses:
                with reuse.step(step) as plan:
                    output = reuse.model(**batch())
                    output.loss.backward()
                assert plan.kind is StepKind.STOCHASTIC_DEPTH and len(plan.dropped) < 4
                logits.append(output.logits)
                found.append({name: grad for name, grad in gradients(reuse.model).items() if grad is not None})
            assert logits[0].dtype == torch.float32
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    assert graphs() == 2
