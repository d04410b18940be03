"""The average of the weights: known answers, frozen weights, buffers, exact loading and errors."""

import pytest
import torch
from tiny_models import batch, build
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training_runs import same_bits, state_of

from hf_featreuse import (
    CheckpointError,
    ConfigurationError,
    FeatureReuse,
    FeatureReuseSchedule,
    StepKind,
    WeightAverage,
    find_residual_blocks,
)


def test_it_is_bit_identical_to_the_averaged_model_of_torch():
    model = build("resnet")
    ours = WeightAverage(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    theirs.update_parameters(model)  # its first update copies
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        model(**batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.update()
        theirs.update_parameters(model)
    expected = theirs.module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    assert any("running_var" in name for name in ours.state_dict())


def test_the_decay_warms_up_with_the_steps_taken():
    model = torch.nn.Linear(1, 1, bias=False)
    average, expected = WeightAverage(model, 0.5), model.weight.detach().clone()
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (7, 8 / 17), (8, 0.5), (100, 0.5)):
        torch.nn.init.normal_(model.weight)
        average.update(step)
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(average.state_dict()["weight"], expected)


@pytest.mark.parametrize("kind", [StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE])
@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_weights_that_rest_do_not_move_while_their_average_moves_toward_them(architecture, kind):
    model = build(architecture).train()
    blocks = find_residual_blocks(model)
    schedule = FeatureReuseSchedule(len(blocks), drop_rate_schedule="uniform", seed=5)
    reuse = FeatureReuse(model, blocks, schedule, train_trunk=False)
    step = next(
        step for step in range(99) if schedule.plan(step).kind is kind and 0 < len(schedule.plan(step).dropped)
    )
    average = WeightAverage(model, 0.5)
    # The average is behind everywhere: every weight is moved once without it.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter, memory_format=torch.contiguous_format))
    before, behind = state_of(model), {name: tensor.clone() for name, tensor in average.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with reuse.step(step) as plan:
        model(**batch()).loss.backward()
    optimizer.step()
    average.update()
    dropped = tuple(f"{blocks[index].name}." for index in plan.dropped)
    resting = [
        name for name, _ in model.named_parameters() if name.startswith(dropped) == (kind is StepKind.STOCHASTIC_DEPTH)
    ]
    assert resting
    for name in resting:
        assert torch.equal(model.get_parameter(name), before[name]), name
        torch.testing.assert_close(average.state_dict()[name], (behind[name] + before[name]) / 2)
    # Buffers of frozen modules, too: the statistics stay, and their average equals them from the start.
    for name, buffer in model.named_buffers():
        if kind is StepKind.MASKED_FREEZE and buffer.is_floating_point() and not name.startswith(dropped):
            assert torch.equal(buffer, before[name])
            assert torch.equal(average.state_dict()[name], before[name])


def test_the_model_has_the_average_inside_the_context_alone_also_after_an_error():
    model = build("resnet")
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    average.update()
    own, pointers = state_of(model), [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(KeyError), average.applied():
        for name, tensor in average.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)
        raise KeyError
    assert same_bits(state_of(model), own)
    # An optimizer holds these very tensors.
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]


def test_a_loaded_average_is_bit_identical(tmp_path):
    model = build("resnet")
    average = WeightAverage(model, 0.9)
    torch.nn.init.normal_(model.classifier[1].weight)
    average.update()
    average.save(tmp_path)
    other = WeightAverage(build("resnet", seed=1), 0.9)
    assert other.load(tmp_path)
    assert same_bits(other.state_dict(), average.state_dict())
    assert not other.load(tmp_path / "nothing")


def test_an_average_of_another_model_is_refused_and_nothing_changes(tmp_path):
    average = WeightAverage(build("resnet"), 0.9)
    before = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    WeightAverage(build("vit"), 0.9).save(tmp_path)
    with pytest.raises(CheckpointError, match="of another model"):
        average.load(tmp_path)
    assert same_bits(average.state_dict(), before)


def test_frozen_parameters_are_left_out():
    model = build("vit")
    model.vit.requires_grad_(False)
    assert set(WeightAverage(model, 0.9).state_dict()) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("decay", [0, 1, 1.5, True, "0.9", float("nan")])
def test_a_bad_decay_is_named(decay):
    with pytest.raises(ConfigurationError, match="`ema_decay="):
        WeightAverage(torch.nn.Linear(1, 1), decay)
