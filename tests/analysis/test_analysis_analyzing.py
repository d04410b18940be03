"""Analyses with known answers: zeroed branches, whole models, one batch or several, and models that are refused."""

import gc
import json
import math

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, NUM_LABELS, batch, build, snapshot
from torch import nn
from training_runs import plain_net, same_bits, state_of
from transformers import MobileViTConfig, MobileViTForImageClassification, ResNetConfig, ResNetForImageClassification

from hf_featreuse import find_residual_blocks, skip_blocks
from hf_featreuse.analysis import ModelAnalysis, analyze_model, linear_cka
from hf_featreuse.errors import BlockError, ConfigurationError, DataError


def analyze(model, batches=None, **options) -> ModelAnalysis:
    options = {"random_draws": 2, "disable_tqdm": True, **options}
    return analyze_model(model, [batch(16)] if batches is None else batches, **options)


def halves(data: dict[str, torch.Tensor], *sizes: int) -> list[dict[str, torch.Tensor]]:
    parts = {key: value.split(sizes) for key, value in data.items()}
    return [{key: value[i] for key, value in parts.items()} for i in range(len(sizes))]


def zeroed(name: str, index: int):
    """A model in which one residual branch is zero."""
    model = build(name)
    block = find_residual_blocks(model)[index]
    with torch.no_grad():
        for parameter in block.module.parameters():
            parameter.zero_()
    return model, block


def features_of(model, data) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every block, gathered by plain hooks."""
    found = []
    handles = [
        block.module.register_forward_hook(
            lambda _, args, out: found.append((args[0].clone(), (out if torch.is_tensor(out) else out[0]).clone()))
        )
        for block in find_residual_blocks(model)
    ]
    with torch.no_grad():
        model.eval()(pixel_values=data["pixel_values"])
    for handle in handles:
        handle.remove()
    return [(before.flatten(1), after.flatten(1)) for before, after in found]


# Known answers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zeroed_branch_has_ratio_zero_and_costs_nothing(name):
    model, block = zeroed(name, 1)
    data = batch(16)
    with torch.no_grad():
        whole = model.eval()(**data).logits
        with skip_blocks([block]):
            assert torch.equal(model(**data).logits, whole)
    analysis = analyze(model, [data])
    ratios = [found.residual_ratio for found in analysis.blocks]
    assert ratios[1] == 0
    assert all(ratio > 0 for index, ratio in enumerate(ratios) if index != 1)
    assert analysis.blocks[1].cosine_similarity == pytest.approx(1, abs=1e-6)
    assert analysis.blocks[1].accuracy_without == analysis.accuracy


def test_identical_layers_have_cka_one():
    model, _ = zeroed("vit", 2)
    values = np.array(analyze(model).cka)
    assert np.diagonal(values) == pytest.approx(1, abs=1e-12)
    assert values[1, 2] == pytest.approx(1, abs=1e-6)
    assert np.allclose(values[1], values[2], atol=1e-6)
    assert values[0, 3] < 0.999


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_figures_of_one_batch_against_plain_hooks(name):
    model, data = build(name), batch(16)
    analysis = analyze(model, [data])
    features = features_of(model, data)
    assert len(features) == len(analysis.blocks)
    for block, (before, after) in zip(analysis.blocks, features, strict=True):
        ratio = ((after - before).norm(dim=1) / before.norm(dim=1)).mean().item()
        cosine = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
        assert block.residual_ratio == pytest.approx(ratio, rel=1e-5)
        assert block.cosine_similarity == pytest.approx(cosine.mean().item(), rel=1e-5)
    for i, (_, first) in enumerate(features):
        for j, (_, second) in enumerate(features):
            assert analysis.cka[i][j] == pytest.approx(linear_cka(first, second), abs=1e-6)


def test_accuracies_against_skipping_by_hand():
    model, data = build("vit"), batch(32)
    blocks = find_residual_blocks(model)
    analysis = analyze(model, [data])

    def accuracy(*dropped: int) -> float:
        with skip_blocks([blocks[index] for index in dropped]), torch.no_grad():
            return (model.eval()(**data).logits.argmax(-1) == data["labels"]).double().mean().item()

    assert analysis.accuracy.value == accuracy()
    assert [block.accuracy_without.value for block in analysis.blocks] == [accuracy(i) for i in range(4)]
    assert [a.value for a in analysis.early_exit] == [accuracy(*range(depth, 4)) for depth in range(5)]
    assert [a.value for a in analysis.drop_last] == [accuracy(*range(4 - count, 4)) for count in range(5)]
    for drop in analysis.random_drops:
        assert drop.accuracies == [accuracy(*dropped) for dropped in drop.sets]
        assert drop.mean == pytest.approx(sum(drop.accuracies) / len(drop.accuracies))
        assert drop.low <= drop.mean <= drop.high
    assert len({a.value for a in analysis.early_exit}) > 1


def test_last_exit_is_the_model():
    analysis = analyze(build("convnext"))
    assert analysis.early_exit[-1] == analysis.drop_last[0] == analysis.accuracy
    assert analysis.early_exit[-2] == analysis.blocks[-1].accuracy_without


class InPlace(nn.Module):
    """A network whose blocks add to their input in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(AddsInPlace(12, 12) for _ in range(2))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = pixel_values[:, :, 0, :4].flatten(1)
        for block in self.blocks:
            x = block(x)
        return x


class AddsInPlace(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.add_(super().forward(input))


def test_blocks_that_add_in_place_are_measured():
    model, data = InPlace(), batch(8)
    block = analyze(model, [data]).blocks[0]
    before = data["pixel_values"][:, :, 0, :4].flatten(1)
    added = nn.functional.linear(before, model.blocks[0].weight, model.blocks[0].bias)
    expected = (added.norm(dim=1) / before.norm(dim=1)).mean().item()
    assert expected > 0.1
    assert block.residual_ratio == pytest.approx(expected, rel=1e-4)


# Streaming


@pytest.mark.parametrize("sizes", [(16, 16), (20, 12), (30, 2)])
def test_batches_give_what_one_batch_gives(sizes):
    model, data = build("vit"), batch(32)
    whole, parts = analyze(model, [data]), analyze(model, iter(halves(data, *sizes)))
    assert parts.accuracy == whole.accuracy
    assert parts.early_exit == whole.early_exit
    assert parts.random_drops == whole.random_drops
    for one, other in zip(whole.blocks, parts.blocks, strict=True):
        assert other.accuracy_without == one.accuracy_without
        assert other.residual_ratio == pytest.approx(one.residual_ratio, rel=1e-5)
        assert other.cosine_similarity == pytest.approx(one.cosine_similarity, rel=1e-5)


def test_cka_of_equal_batches_is_that_of_one():
    model, data = build("vit"), batch(16)
    assert np.allclose(analyze(model, [data] * 3).cka, analyze(model, [data]).cka, rtol=1e-9)


def test_cka_of_many_small_batches_nears_that_of_one():
    model, data = build("resnet"), batch(256)
    whole = np.array(analyze(model, [data], random_draws=0).cka)
    parts = np.array(analyze(model, halves(data, *[16] * 16), random_draws=0).cka)
    assert whole[0, -1] < 0.9
    assert np.abs(whole - parts).max() < 0.05


def test_memory_does_not_grow_with_the_batches():
    """Between batches, all living tensors together hold as many elements as after the one before."""
    model, data = build("vit").requires_grad_(False), batch(16)
    living = []

    def batches():
        for _ in range(5):
            yield data
            # No name may keep these tensors alive until the next batch.
            living.append(sum(thing.numel() for thing in gc.get_objects() if type(thing) is torch.Tensor))

    analyze(model, batches())
    assert len(set(living[1:])) == 1, living


def test_batch_too_small_for_cka_is_left_out_of_it():
    model, data = build("vit"), batch(19)
    big, small = halves(data, 16, 3)
    assert analyze(model, [big, small]).cka == analyze(model, [big]).cka
    alone = analyze(model, [small])
    assert alone.cka == [[None] * 4] * 4
    assert "at least 4 images" in alone.notes[-1]
    json.dumps(alone.to_dict(), allow_nan=False)


# The model is as before


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_model_and_random_state_are_as_before(name):
    model = build(name).train()
    model.get_submodule(find_residual_blocks(model)[0].name).eval()
    before, state = snapshot(model), state_of(model)
    random_state = torch.get_rng_state()
    analyze(model)
    assert snapshot(model) == before
    assert same_bits(state_of(model), state)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()


def test_model_is_as_before_after_an_error():
    model = build("vit").train()
    before = snapshot(model)
    bad = {**batch(4), "labels": torch.tensor([0, 1, 2, NUM_LABELS])}
    with pytest.raises(DataError, match="range from 0 to 3, but the model has 3 classes"):
        analyze(model, [batch(4), bad])
    assert snapshot(model) == before


def test_evaluation_mode_is_used():
    model = build("resnet").train()
    assert analyze(model).accuracy == analyze(model.eval()).accuracy
    statistics = [buffer.clone() for buffer in model.buffers()]
    analyze(model.train())
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))


# Blocks that cannot be dropped or measured


def gelu_resnet():
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[3], layer_type="basic", hidden_act="gelu", num_labels=NUM_LABELS
    )
    return ResNetForImageClassification(config)


def test_inexact_blocks_are_measured_but_not_dropped():
    analysis = analyze(gelu_resnet())
    assert [block.exact for block in analysis.blocks] == [False] * 3
    assert all(block.residual_ratio > 0 and block.accuracy_without is None for block in analysis.blocks)
    assert all(value is not None for row in analysis.cka for value in row)
    assert analysis.early_exit == [None, None, None, analysis.accuracy]
    assert analysis.random_drops == []
    assert any("3 of 3 blocks" in note and "were not dropped" in note for note in analysis.notes)
    allowed = analyze(gelu_resnet(), allow_inexact_skip=True)
    assert all(block.accuracy_without is not None for block in allowed.blocks)
    assert any("dropped nevertheless" in note for note in allowed.notes)
    assert "  -\n" not in str(allowed) and "  -\n" in str(analysis)


def test_activation_after_the_addition_is_noted():
    assert any("Relu follows the addition" in note for note in analyze(build("resnet")).notes)
    assert analyze(build("vit")).notes == []


def test_features_that_are_not_ordered_by_sample_are_left_out():
    torch.manual_seed(0)
    config = MobileViTConfig(
        image_size=32,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 16],
        num_attention_heads=2,
        num_labels=NUM_LABELS,
    )
    analysis = analyze(MobileViTForImageClassification(config), [batch(8)])
    unordered = [block for block in analysis.blocks if block.residual_ratio is None]
    assert 0 < len(unordered) < len(analysis.blocks)
    index = unordered[0].index
    assert set(analysis.cka[index]) == {None}
    assert all(block.accuracy_without is not None for block in analysis.blocks)
    assert any("not ordered by sample" in note for note in analysis.notes)


# Depths, options, refusals


def test_chosen_blocks_and_name():
    model = build("vit")
    analysis = analyze(model, blocks=find_residual_blocks(model, target_blocks=["layers.1", "layers.2"]), name="mine")
    assert [block.name for block in analysis.blocks] == ["vit.layers.1", "vit.layers.2"]
    assert len(analysis.early_exit) == 3
    assert str(analysis).startswith("mine: ViTForImageClassification")


def test_model_without_residual_block_is_refused():
    with pytest.raises(BlockError, match="no residual block"):
        analyze(plain_net())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "`batches` is empty"),
        ([{"pixel_values": torch.zeros(2, 3, 32, 32)}], r"of \['pixel_values'\], without a tensor `labels`"),
        ([torch.zeros(2, 3)], "is a Tensor"),
        ([{**batch(2), "labels": torch.zeros(2)}], r"torch.float32 of shape \(2,\)"),
        ([{**batch(2), "labels": torch.tensor([-100, -100])}], "No sample has a label"),
        ([{**batch(2), "labels": torch.tensor([-1, 0])}], "range from -1 to 0"),
    ],
)
def test_unusable_batches_are_refused(batches, message):
    with pytest.raises(DataError, match=message):
        analyze(build("vit"), batches)


@pytest.mark.parametrize("option", [{"random_draws": -1}, {"random_draws": 1.5}, {"seed": -1}, {"seed": True}])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ConfigurationError, match=f"`{next(iter(option))}="):
        analyze(build("vit"), **option)


def test_empty_list_of_blocks_is_refused():
    with pytest.raises(BlockError, match="`blocks` is empty"):
        analyze(build("vit"), blocks=[])


def test_progress_bar_follows_the_option(capsys):
    analyze(build("vit"), disable_tqdm=True)
    assert capsys.readouterr().err == ""
    analyze(build("vit"), disable_tqdm=None)  # The tests run with transformers' log level at errors.
    assert capsys.readouterr().err == ""
    analyze(build("vit"), disable_tqdm=False, name="bar")
    err = capsys.readouterr().err
    assert "Analyzing bar: 100%" in err


def test_dictionary_is_plain_json():
    analysis = analyze(build("swin"))
    again = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    assert again["drop_last"] == again["early_exit"][::-1]
    assert again["accuracy"]["total"] == again["num_samples"] == 16
    assert [block["name"] for block in again["blocks"]] == [block.name for block in analysis.blocks]
    assert math.isclose(again["cka"][0][0], 1)
