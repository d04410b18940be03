"""The times of blocks, which predict the time of a step. No test compares two times."""

import pytest
import torch
from tiny_models import build

from hf_featreuse import StepKind, StepPlan, find_residual_blocks
from hf_featreuse.method.step_times import measure_step_times

PIXELS = torch.randn(4, 3, 32, 32)
LABELS = torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize("with_labels", [True, False])
def test_every_state_of_every_block_is_timed(with_labels):
    model = build("vit")
    blocks = find_residual_blocks(model)
    batch = {"pixel_values": PIXELS, **({"labels": LABELS} if with_labels else {})}
    times = measure_step_times(model, blocks, batch, repeats=1)
    assert len(times.blocks) == len(blocks) == len(times.trunk) - 1
    assert times.vanilla > 0
    for block in times.blocks:
        assert min(block.trained, block.lowest, block.frozen, block.resting) > 0
    assert times.share(StepPlan(StepKind.VANILLA)) == 1.0
    share = times.share(StepPlan(StepKind.STOCHASTIC_DEPTH, (0,)))
    assert isinstance(share, float), "and no more: times on a busy machine are noise"


def test_the_model_trains_meanwhile_and_is_left_as_it_was():
    model = build("resnet").eval()
    blocks = find_residual_blocks(model)
    modes, weight = [], next(model.parameters())
    weight.grad = torch.ones_like(weight)
    handle = blocks[0].module.register_forward_hook(lambda module, *_: modes.append(module.training))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    measure_step_times(model, blocks, {"pixel_values": PIXELS, "labels": LABELS}, repeats=1)
    handle.remove()
    # Operations are counted in eval mode, and times taken in training mode.
    assert any(modes) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_autocast_reaches_the_blocks():
    model = build("vit")
    blocks = find_residual_blocks(model)
    seen = set()
    linear = next(m for m in blocks[0].module.modules() if isinstance(m, torch.nn.Linear))
    handle = linear.register_forward_hook(lambda *args: seen.add(args[2].dtype))
    measure_step_times(model, blocks, {"pixel_values": PIXELS}, autocast=torch.bfloat16, repeats=1)
    handle.remove()
    assert torch.bfloat16 in seen


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_blocks_and_trunk_add_up_to_the_plain_step(architecture):
    model = build(architecture)
    blocks = find_residual_blocks(model)
    times = measure_step_times(model, blocks, {"pixel_values": PIXELS}, repeats=1)
    assert times.sum_of_parts == pytest.approx(times.vanilla, rel=1e-3)
    without = times.share(StepPlan(StepKind.STOCHASTIC_DEPTH, tuple(range(len(blocks)))))
    assert 0 < without <= 0.901, "the trunk, which was timed with all blocks skipped"


def test_times_of_single_blocks_are_scaled(monkeypatch):
    measured = iter([100, 40])

    def time(self, function):
        return next(measured) if function.__name__ == "step" else 90

    monkeypatch.setattr("hf_featreuse.method.step_times._Stopwatch.time", time)
    model = build("vit")
    blocks = find_residual_blocks(model)
    times = measure_step_times(model, blocks, {"pixel_values": PIXELS}, repeats=1)
    assert [block.trained for block in times.blocks] == [round(60 / len(blocks))] * len(blocks)
    share = times.share(StepPlan(StepKind.STOCHASTIC_DEPTH, (0,)))
    assert share == pytest.approx(1 - 0.6 / len(blocks), abs=0.02)


def test_without_a_trunk_that_trains_its_forward_is_timed():
    model = build("vit")
    blocks = find_residual_blocks(model)
    inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in inside)
    times = measure_step_times(model, blocks, {"pixel_values": PIXELS, "labels": LABELS}, repeats=1)
    assert times.sum_of_parts == pytest.approx(times.vanilla, rel=1e-3)
