"""Compiled blocks with a set for every sample: few graphs for all sizes, and the gradients of eager blocks."""

from pathlib import Path

import pytest
import torch
from compiled_graphs import graphs, nothing_compiled  # noqa: F401
from sample_checks import sample_schedule
from tiny_models import WITHOUT_BATCH_NORM, batch, build, examples, snapshot
from torch._dynamo.utils import counters
from training_runs import config, train
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_featreuse import (
    ConfigurationError,
    FeatureReuse,
    FeatureReuseTrainer,
    StepKind,
    compile_blocks,
    find_residual_blocks,
)

# Blocks that share a graph. In Swin every second block shifts.
SHAPES = {"vit": 1, "convnext": 2, "swin": 4}


def made(name: str, **options) -> FeatureReuse:
    model = build(name).train()
    blocks = find_residual_blocks(model)
    return FeatureReuse(model, blocks, sample_schedule(len(blocks)), **options)


def gradients_of(reuse: FeatureReuse, step: int, size: int) -> dict[str, torch.Tensor | None]:
    reuse.model.zero_grad(set_to_none=True)
    with reuse.step(step, batch_size=size):
        reuse.model(**batch(size, seed=step)).loss.backward()
    return {name: parameter.grad for name, parameter in reuse.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["all", "none"])
@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_gradients_are_those_of_eager_blocks(name, trunk):
    compiled, eager = made(name, train_trunk=trunk), made(name, train_trunk=trunk)
    before = snapshot(compiled.model)
    kinds = set()
    with compile_blocks(compiled.blocks, backend="aot_eager"):
        for step, size in enumerate((16, 16, 10, 3, 16, 8, 5, 12)):
            kinds.add(eager.plan(step, batch_size=size).kind)
            found, expected = gradients_of(compiled, step, size), gradients_of(eager, step, size)
            for key, gradient in expected.items():
                if gradient is None:
                    assert found[key] is None, key
                else:
                    torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)
    assert kinds == {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE}
    assert snapshot(compiled.model) == before


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["all", "none"])
@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_graphs_are_few_whatever_the_sizes(name, trunk):
    reuse = made(name, train_trunk=trunk)
    with compile_blocks(reuse.blocks, backend="eager"):
        for step in range(12):
            gradients_of(reuse, step, (16, 24, 28, 20)[step % 4])
        if name != "swin":
            # One of training, one of frozen blocks.
            assert graphs() == 2 * SHAPES[name]
        # For a convolution on a CPU, PyTorch chooses by whether there are 16 samples.
        for step in range(12):
            gradients_of(reuse, step, (32, 48, 64)[step % 3])
        assert graphs() <= (2 if name == "vit" else 4) * SHAPES[name]
        with torch.no_grad():
            reuse.model.eval()(**batch())
        reuse.model.train()
        # Two more for a group of one sample.
        for step in range(16):
            gradients_of(reuse, step, (16, 5, 3, 10, 2)[step % 5])
        made_of_all_sizes = graphs()
        assert made_of_all_sizes <= (5 if name == "vit" else 7) * SHAPES[name]
        for step in range(100, 120):
            gradients_of(reuse, step, 1 + 5 * step % 64)
        assert graphs() == made_of_all_sizes
    assert not counters["graph_break"] and not counters["unimplemented"]


@pytest.mark.slow
def test_checkpointed_blocks_that_are_compiled_give_the_gradients_of_plain_ones():
    compiled, eager = made("vit"), made("vit")
    compiled.model.gradient_checkpointing_enable({"use_reentrant": False})
    with compile_blocks(compiled.blocks, backend="aot_eager"):
        if "__call__" in vars(GradientCheckpointingLayer):  # As before transformers 5.23.
            for step in (0, 1):
                with pytest.raises(ConfigurationError, match=r"vit\.layers\.0 is compiled and checkpointed"):
                    gradients_of(compiled, step, 16)
            return
        for step, size in enumerate((16, 16, 10, 3)):
            found, expected = gradients_of(compiled, step, size), gradients_of(eager, step, size)
            for key, gradient in expected.items():
                torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_that_is_compiled_ends_with_the_weights_of_one_that_is_not(tmp_path: Path):
    runs = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        arguments = config(tmp_path / str(len(runs)), drop_granularity="sample", optim="sgd", max_steps=6, **options)
        runs.append(train(FeatureReuseTrainer(build("vit"), arguments, train_dataset=examples(14))))
    assert graphs() > 0
    for first, second in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    assert all("_compiled_call_impl" not in module.__dict__ for module in runs[1].model.modules())
