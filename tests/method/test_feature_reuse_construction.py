"""What `FeatureReuse` refuses at construction, before anything is changed."""

import dataclasses

import pytest
import torch
from engine_checks import engine, every_architecture, moved
from tiny_models import NUM_LABELS, build, snapshot
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_featreuse import (
    BlockError,
    ConfigurationError,
    FeatureReuse,
    FeatureReuseSchedule,
    StepKind,
    find_residual_blocks,
    trainable_blocks,
)


def test_number_of_blocks_must_be_that_of_the_schedule():
    model = build("vit")
    blocks = find_residual_blocks(model)
    with pytest.raises(BlockError, match=r"for 5 blocks, but 4 were passed.*FeatureReuseSchedule\(4"):
        FeatureReuse(model, blocks, FeatureReuseSchedule(5))


def test_no_blocks_is_an_error_whose_advice_works():
    model = build("vit")
    with pytest.raises(BlockError, match="`blocks` is empty") as caught:
        FeatureReuse(model, [], FeatureReuseSchedule(4))
    assert "`FeatureReuseSchedule(0, drop_rate=0)`" in str(caught.value)
    assert "`trainable_blocks(model, find_residual_blocks(model))`" in str(caught.value)
    with FeatureReuse(model, [], FeatureReuseSchedule(0, drop_rate=0)).step(0) as plan:
        assert plan.kind is StepKind.VANILLA
    blocks = trainable_blocks(model, find_residual_blocks(model))
    FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks)))


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"first_step": 10, "last_step": 10}, True),
        ({"first_step": 10, "last_step": 3}, True),
        ({"first_step": 10, "last_step": 12}, True),
        ({"first_step": 10, "last_step": 13}, False),
        ({"vanilla_steps": 3, "last_step": 3}, True),
        ({"masked_freeze_steps": 0, "last_step": 0}, False),
        ({"last_step": 0, "drop_rate": 0}, False),
        ({"first_step": 10}, False),
    ],
    ids=str,
)
def test_a_window_without_a_cycle_logs_a_warning(options, warns, caplog):
    model = build("vit")
    blocks = find_residual_blocks(model)
    with caplog.at_level("WARNING", "hf_featreuse"):
        FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks), **options))
    assert ("holds no cycle of" in caplog.text) == warns


def test_block_of_another_model_is_an_error():
    model, other = build("vit"), build("vit")
    blocks = find_residual_blocks(other)
    with pytest.raises(BlockError, match=r"vit\.layers\.0 is not a part of this ViTForImageClassification"):
        FeatureReuse(model, blocks, FeatureReuseSchedule(4))
    mixed = [*find_residual_blocks(model)[:3], blocks[3]]
    with pytest.raises(BlockError, match=r"vit\.layers\.3 is not a part"):
        FeatureReuse(model, mixed, FeatureReuseSchedule(4))


def test_block_that_was_replaced_since_is_an_error():
    model = build("vit")
    blocks = find_residual_blocks(model)
    model.vit.layers[2] = build("vit", seed=1).vit.layers[2]
    with pytest.raises(BlockError, match=r"vit\.layers\.2 is not a part"):
        FeatureReuse(model, blocks, FeatureReuseSchedule(4))


def test_block_passed_twice_is_an_error():
    model = build("vit")
    blocks = find_residual_blocks(model)
    with pytest.raises(BlockError, match=r"Blocks vit\.layers\.0 and vit\.layers\.0 share modules"):
        FeatureReuse(model, [blocks[0], blocks[0]], FeatureReuseSchedule(2))


@pytest.mark.parametrize("outer_first", [False, True])
def test_block_inside_another_is_an_error(outer_first):
    model = build("convnext")
    inner = find_residual_blocks(model)[0]
    stage = dataclasses.replace(
        inner, name="convnext.encoder.stages.0", module=model.get_submodule("convnext.encoder.stages.0")
    )
    pair = [stage, inner] if outer_first else [inner, stage]
    with pytest.raises(BlockError, match="share modules"):
        FeatureReuse(model, pair, FeatureReuseSchedule(2))


def gelu_resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[2], layer_type="basic", hidden_act="gelu", num_labels=NUM_LABELS
    )
    return ResNetForImageClassification(config)


def test_inexact_blocks_are_an_error_unless_nothing_is_skipped_or_frozen():
    model = gelu_resnet()
    blocks = find_residual_blocks(model)
    with pytest.raises(BlockError, match="cannot be skipped exactly"):
        FeatureReuse(model, blocks, FeatureReuseSchedule(2))
    FeatureReuse(model, blocks, FeatureReuseSchedule(2, stochastic_depth_steps=0, masked_freeze_steps=0))


def test_block_with_nothing_to_train_is_an_error():
    model = build("vit")
    blocks = find_residual_blocks(model)
    blocks[1].module.requires_grad_(False)
    with pytest.raises(BlockError, match=r"vit\.layers\.1 holds no parameter.*trainable_blocks\(model, blocks\)"):
        FeatureReuse(model, blocks, FeatureReuseSchedule(4))


def test_blocks_that_cannot_be_scaled_are_an_error_unless_scaling_is_off():
    model = build("resnet")
    blocks, before = find_residual_blocks(model), snapshot(model)
    # As if no module inside it returned exactly what is added before the activation.
    blocks[2] = dataclasses.replace(blocks[2], branch=None)
    with pytest.raises(ConfigurationError, match=rf"`scale_kept=True` cannot scale block {blocks[2].name}") as caught:
        FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks)))
    assert "`scale_kept=False`" in str(caught.value)
    assert snapshot(model) == before
    FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks)), scale_kept=False)
    FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks), drop_rate=0))


@pytest.mark.parametrize("value", ["body", "", 1, None])
def test_an_unknown_train_trunk_is_an_error(value):
    model = build("vit")
    blocks = find_residual_blocks(model)
    with pytest.raises(ConfigurationError, match=rf"`train_trunk={value!r}` is unknown.*'all', 'head', 'none'"):
        FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks)), train_trunk=value)


def test_scaling_and_the_whole_trunk_are_the_defaults():
    model = build("resnet")
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks)))
    assert (reuse.scale_kept, reuse.train_trunk) == (True, "all")


@every_architecture
def test_construction_changes_nothing(architecture):
    model = build(architecture)
    before, weights = snapshot(model), {name: value.clone() for name, value in model.state_dict().items()}
    engine(model)
    assert snapshot(model) == before
    assert not moved(weights, model.state_dict())


def test_inexact_blocks_are_accepted_on_request():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[3], layer_type="basic", hidden_act="gelu")
    model = ResNetForImageClassification(config)
    blocks = find_residual_blocks(model)
    schedule = FeatureReuseSchedule(len(blocks), drop_rate=0.9, drop_rate_schedule="uniform")
    reuse = FeatureReuse(model, blocks, schedule, allow_inexact_skip=True)
    with reuse.step(0) as plan:
        model(torch.zeros(1, 3, 32, 32)).logits.sum().backward()
    assert plan.kind is StepKind.STOCHASTIC_DEPTH
    assert all(p.grad is None for index in plan.dropped for p in blocks[index].module.parameters())


def test_reentrant_activation_checkpointing_is_refused_with_the_setting_to_use():
    model = build("vit")
    blocks = find_residual_blocks(model)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigurationError, match=r'activation_checkpointing_kwargs=\{"use_reentrant": False\}'):
        FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks)))
    FeatureReuse(model, [], FeatureReuseSchedule(0, stochastic_depth_steps=0, masked_freeze_steps=0))
