"""The benchmark of memory: fake tensors count what real ones take, and gradients live no longer than they must."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, examples
from torch import nn
from training_runs import RecordingTrainer, config

from hf_featreuse import StepKind

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import memory  # noqa: E402

BATCH = 4
DROPPED = (1, 3)


def small(architecture: str) -> nn.Module:
    model = build(architecture)
    model.config.image_size = 32
    return model


def bench(architecture: str, device: str) -> memory.Bench:
    made = memory.Bench(lambda: small(architecture), device, BATCH)
    made.measure(made.fixed(StepKind.VANILLA))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["vit", "convnext"])
def test_fake_tensors_take_the_bytes_of_real_ones(architecture: str) -> None:
    fake, real = (bench(architecture, device) for device in ("fake", "cpu"))
    for kind in StepKind:
        dropped = () if kind is StepKind.VANILLA else DROPPED
        for options in ({}, {"train_trunk": "none"}, {"train_trunk": "head"}, {"in_backward": True}):
            expected = real.measure(real.fixed(kind, dropped), **options)
            # Real divisors of scaling, of 8 bytes each, are shared between steps; fake ones are not.
            assert fake.measure(fake.fixed(kind, dropped), **options) == pytest.approx(expected, abs=64)
    for step in range(2):
        expected = real.measure(real.schedule(0.5, "sample"), step)
        assert fake.measure(fake.schedule(0.5, "sample"), step) == pytest.approx(expected, abs=64)


def test_each_kind_takes_what_its_blocks_take() -> None:
    made = bench("vit", "cpu")
    depth, freeze, vanilla = (
        made.measure(made.fixed(kind, dropped))
        for kind, dropped in (
            (StepKind.STOCHASTIC_DEPTH, DROPPED),
            (StepKind.MASKED_FREEZE, DROPPED),
            (StepKind.VANILLA, ()),
        )
    )
    parameters = sum(parameter.nbytes for parameter in made.model.parameters())
    blocks = sum(p.nbytes for index in DROPPED for p in made.blocks[index].module.parameters())
    assert vanilla["gradients"] == parameters
    assert depth["gradients"] == parameters - blocks
    assert freeze["gradients"] == parameters - blocks  # The other half of the blocks, as large, and the trunk.
    assert depth["activations"] < freeze["activations"] < vanilla["activations"]
    assert depth["peak"] < freeze["peak"] < vanilla["peak"]
    # What is there at the peak at least: weights, moments, what was saved.
    assert vanilla["peak"] > parameters + vanilla["moments"] + 0.9 * vanilla["activations"]


def test_moments_come_with_the_first_gradient_and_stay() -> None:
    made = memory.Bench(lambda: small("vit"), "cpu", BATCH)
    first = made.measure(made.fixed(StepKind.STOCHASTIC_DEPTH, DROPPED))
    second = made.measure(made.fixed(StepKind.MASKED_FREEZE, DROPPED))
    again = made.measure(made.fixed(StepKind.STOCHASTIC_DEPTH, DROPPED))
    parameters = list(made.model.parameters())
    # Two moments of each, and a step count of four bytes.
    assert second["moments"] == again["moments"] == sum(2 * p.nbytes + 4 for p in parameters)
    blocks = [p for index in DROPPED for p in made.blocks[index].module.parameters()]
    assert second["moments"] - first["moments"] == sum(2 * p.nbytes + 4 for p in blocks)


def test_an_optimizer_in_backward_holds_no_gradient_at_its_end_and_moves_the_same_weights() -> None:
    results = {}
    for in_backward in (False, True):
        made = bench("vit", "cpu")
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in made.model.parameters():
                parameter.normal_(std=0.1)
        made.batch["pixel_values"].copy_(torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
        found = made.measure(made.fixed(StepKind.MASKED_FREEZE, DROPPED), train_trunk="none", in_backward=in_backward)
        assert (found["gradients"] == 0) is in_backward
        results[in_backward] = [parameter.detach().clone() for parameter in made.model.parameters()]
    assert all(map(torch.equal, results[False], results[True]))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_gradient_is_alive_when_a_step_of_the_trainer_begins(accumulation: int, tmp_path: Path) -> None:
    alive: list[int] = []

    class Looking(RecordingTrainer):
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, *args, **kwargs)
            active = {id(p) for p in self.feature_reuse.active_parameters(self.plans[-1][1])}
            held = [p for p in model.parameters() if p.grad is not None]
            assert all(id(p) in active for p in held)
            alive.append(len(held))
            return loss

    arguments = config(tmp_path, gradient_accumulation_steps=accumulation, max_steps=4)
    Looking(build("vit"), arguments, train_dataset=examples()).train()
    assert alive[::accumulation] == [0] * 4
    assert accumulation == 1 or min(alive[1::2]) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_peak_is_what_was_allocated() -> None:
    made = bench("vit", "cuda")
    vanilla = made.measure(made.fixed(StepKind.VANILLA))
    depth = made.measure(made.fixed(StepKind.STOCHASTIC_DEPTH, DROPPED))
    assert depth["peak"] < vanilla["peak"]
    assert vanilla["peak"] > vanilla["activations"]


def test_the_page_shows_what_was_measured() -> None:
    found = memory.json.loads(memory.RESULTS.read_text(encoding="utf-8"))
    assert set(found["models"]) == set(memory.MODELS)
    assert memory.page(found) in memory.PAGE.read_text(encoding="utf-8")
