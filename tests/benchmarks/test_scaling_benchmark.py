"""The cost model of docs/distributed.md against counts on small models: bytes, arithmetic, activations, calls."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import build

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, StepKind, StepPlan, find_residual_blocks
from hf_featreuse.method.cost import flop_counter

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import scaling  # noqa: E402
import step_model  # noqa: E402
import traffic  # noqa: E402
from memory import fixed_schedule  # noqa: E402

DEPTH = StepPlan(StepKind.STOCHASTIC_DEPTH, (1, 3))
FREEZE = StepPlan(StepKind.MASKED_FREEZE, (1, 3))
ALL_PLANS = [step_model.VANILLA, DEPTH, FREEZE]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one, at which DDP's calls are counted as among many."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("freeze_trunk", [False, True])
@pytest.mark.parametrize("name", traffic.MODELS)
def test_bytes_of_ddp_are_those_counted_at_the_process_group(name: str, freeze_trunk: bool) -> None:
    options = argparse.Namespace(
        drop_rate=0.5, drop_rate_schedule="uniform", seed=0, steps=4, freeze_trunk=freeze_trunk
    )
    counted = traffic.count(traffic.MODELS[name], options, reused=True)
    parts = scaling.measure_parts(traffic.MODELS[name], train_trunk="none" if freeze_trunk else "all")
    schedule = FeatureReuseSchedule(len(parts.blocks), 0.5, "uniform", seed=0)
    assert {kind for kind, _ in counted} == {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE}
    for step, (kind, size) in enumerate(counted):
        expected = step_model.ddp_bytes(parts, schedule.plan(step))
        print(f"{name}, {kind.value}: model {expected}, counted {size}")
        assert size == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("train_trunk", ["all", "none"])
@pytest.mark.parametrize("architecture", ["vit", "convnext"])
def test_arithmetic_and_activations_are_those_of_a_real_step(architecture: str, train_trunk: str) -> None:
    parts = scaling.measure_parts(lambda: build(architecture), train_trunk=train_trunk)
    model = build(architecture).train()
    blocks = find_residual_blocks(model)
    images = torch.zeros(1, 3, model.config.image_size, model.config.image_size)
    for plan in ALL_PLANS:
        with FeatureReuse(
            model, blocks, fixed_schedule(len(blocks), plan.kind, plan.dropped), train_trunk=train_trunk
        ).step(0):
            saved = scaling.saved_bytes(model, images)
            if architecture == "vit":  # torch counts no fused attention of the CPU.
                model.set_attn_implementation("eager")
            with flop_counter() as counter:
                output = model(pixel_values=images).logits.sum()
                forward = counter.get_total_flops()
                output.backward()
            if architecture == "vit":
                model.set_attn_implementation("sdpa")
        model.zero_grad(set_to_none=True)
        print(f"{architecture}, {plan.kind.value}: saved {saved}, model {parts.activations(plan)}")
        assert parts.activations(plan) == pytest.approx(saved, rel=0.02)
        assert parts.arithmetic(plan) == pytest.approx((forward, counter.get_total_flops() - forward), rel=0.02)


def test_collectives_of_fsdp2_by_hand() -> None:
    parts = scaling.measure_parts(lambda: build("vit"))
    block, trunk = parts.blocks[0], parts.trunk
    # Bytes: a weight is gathered in 2, a gradient reduced in 4.
    vanilla, depth, freeze = (step_model.fsdp_collectives(parts, plan) for plan in ALL_PLANS)
    assert vanilla == step_model.Collectives(5, 4, 5, 2 * (4 * block + trunk), 2 * 4 * block, 4 * (4 * block + trunk))
    assert depth == step_model.Collectives(3, 2, 3, 2 * (2 * block + trunk), 2 * 2 * block, 4 * (2 * block + trunk))
    assert freeze == step_model.Collectives(5, 4, 3, 2 * (4 * block + trunk), 2 * 4 * block, 4 * (2 * block + trunk))
    frozen_trunk = scaling.measure_parts(lambda: build("vit"), train_trunk="none")
    # Blocks 1 to 3 are in backward, 1 and 3 train.
    assert step_model.fsdp_collectives(frozen_trunk, FREEZE) == step_model.Collectives(
        5, 3, 2, 2 * (4 * block + trunk), 2 * 3 * block, 4 * 2 * block
    )


def test_a_trunk_that_trains_in_part_is_refused() -> None:
    with pytest.raises(ValueError, match='Pass "all" or "none"'):
        scaling.measure_parts(lambda: build("vit"), train_trunk="head")


def test_what_does_not_hide_is_added() -> None:
    parts = scaling.measure_parts(lambda: build("vit"))
    fast, slow = step_model.Hardware(link=1e18), step_model.Hardware(link=1e6)
    for engine in step_model.ENGINES.values():
        assert engine(parts, step_model.VANILLA, 8, 4, fast).exposed == 0
        step = engine(parts, step_model.VANILLA, 8, 4, slow)
        assert step.exposed == pytest.approx(step.wire / slow.link, rel=1e-3)
        # One rank sends nothing.
        assert engine(parts, step_model.VANILLA, 1, 4, slow).wire == 0
    assert step_model.fsdp_step(parts, DEPTH, 8, 4, fast).memory < step_model.ddp_step(parts, DEPTH, 8, 4, fast).memory


@pytest.mark.slow
def test_the_page_shows_what_was_computed() -> None:
    found = scaling.load()
    assert set(found) == set(scaling.MODELS)
    assert scaling.summary(found) in scaling.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", scaling.MODELS)
def test_the_models_of_the_page_have_these_parameters(name: str) -> None:
    with torch.device("meta"):
        model = scaling.MODELS[name]()
    assert scaling.load()[name].parameters == sum(parameter.numel() for parameter in model.parameters())
