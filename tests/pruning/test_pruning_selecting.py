"""The blocks to remove are chosen by the loss in quality without them."""

import pytest
import torch
from pruning_checks import assert_is_the_skipping_model
from tiny_models import batch, build, snapshot

from hf_featreuse import (
    BlockError,
    DataError,
    accuracy_on,
    find_residual_blocks,
    prune_blocks,
    rank_removals,
    skip_blocks,
)


def zeroed(name: str, index: int):
    """A tiny model one of whose branches adds nothing."""
    model = build(name)
    block = find_residual_blocks(model)[index].module
    for part, parameter in block.named_parameters():
        if part.endswith(("o_proj.weight", "o_proj.bias", "fc2.weight", "fc2.bias", "layer_scale_parameter")):
            parameter.data.zero_()
    return model


def closeness(model):
    """Minus the distance from the logits of the model as it is now."""
    inputs = {"pixel_values": batch()["pixel_values"]}
    with torch.no_grad():
        whole = model.eval()(**inputs).logits
        return lambda changed: -(changed(**inputs).logits - whole).abs().sum().item()


@pytest.mark.parametrize("name, index", [("vit", 1), ("vit", 3), ("convnext", 2)])
def test_a_branch_of_zero_is_removed_first(name, index):
    model = zeroed(name, index)
    blocks = [block.name for block in find_residual_blocks(model)]
    first, second = rank_removals(model, closeness(model), budget=2)
    assert first.blocks == (blocks[index],)
    assert (first.score, first.blocks_left) == (0.0, 3)
    assert second.score < 0
    pruned = prune_blocks(model, budget=3, evaluate=closeness(model))
    assert_is_the_skipping_model(model, pruned, [blocks[index]], {"pixel_values": batch()["pixel_values"]})


def test_a_round_takes_the_best_of_all_single_removals():
    model = build("vit")
    evaluate, blocks = closeness(model), find_residual_blocks(model)
    scores = []
    for block in blocks:
        with skip_blocks([block]):
            scores.append(evaluate(model))
    (removal,) = rank_removals(model, evaluate, budget=3)
    assert removal.score == max(scores)
    assert removal.blocks == (blocks[scores.index(max(scores))].name,)


def test_a_share_of_the_arithmetic_is_met_and_not_overshot():
    model = build("vit")
    removals = rank_removals(model, closeness(model), budget=0.6)
    assert removals[-1].forward_share <= 0.6 < removals[-2].forward_share
    # Equal blocks: each saves the same.
    saved = 1 - removals[0].forward_share
    assert removals[-1].forward_share == pytest.approx(1 - len(removals) * saved)
    assert 0.1 < saved < 0.25


def test_a_budget_that_is_met_already_removes_nothing():
    model = build("vit")
    assert rank_removals(model, closeness(model), budget=4) == []
    with pytest.raises(BlockError, match="There is nothing to drop"):
        prune_blocks(model, budget=4, evaluate=closeness(model))


def test_only_blocks_that_the_configuration_of_swin_can_omit_are_removed():
    model = build("swin")
    removals = rank_removals(model, closeness(model), budget=1)
    assert removals[-1].blocks_left == 1
    gone = [name for removal in removals for name in removal.blocks]
    assert len(find_residual_blocks(prune_blocks(model, drop=gone))) == 1


def test_measuring_does_not_change_the_model():
    model = build("resnet").train()
    before = snapshot(model)
    modes = []
    rank_removals(model, lambda model: modes.append(model.training) or 0.0, budget=2)
    assert set(modes) == {False}
    assert snapshot(model) == before


def test_accuracy_is_the_share_of_right_answers():
    model, data = build("vit").eval(), batch(6)
    with torch.no_grad():
        right = model(data["pixel_values"]).logits.argmax(-1)
    wrong = (right + 1) % 3
    labels = torch.cat([right[:4], wrong[4:]])
    batches = [
        {"pixel_values": data["pixel_values"][part], "labels": labels[part]} for part in (slice(0, 1), slice(1, 6))
    ]
    assert accuracy_on(batches)(model) == pytest.approx(4 / 6)
    with pytest.raises(DataError, match="no batch"):
        accuracy_on([])(model)
    with pytest.raises(DataError, match="no `labels`"):
        accuracy_on([{"pixel_values": data["pixel_values"]}])(model)
