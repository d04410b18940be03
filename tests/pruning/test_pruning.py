"""Removing blocks: what the configuration of each family can express, and the result."""

import copy
import re
from pathlib import Path

import pytest
import torch
from pruning_checks import assert_is_the_skipping_model
from tiny_architectures import ARCHITECTURES, WITH_BLOCKS, Architecture
from tiny_models import batch, build, snapshot
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_featreuse import (
    BlockError,
    ConfigurationError,
    find_residual_blocks,
    prune_blocks,
)
from hf_featreuse.pruning import saving

DOCUMENT = Path(__file__).parents[2] / "docs" / "pruning.md"
# Indices of the blocks that cannot be removed singly, as these tiny models have no such configuration. All others can.
CANNOT_GO_ALONE = {
    "cvt": {1, 2, 3, 4, 5},
    "donut-swin": {0, 2, 3},
    "efficientnet": {0, 1, 2},
    "levit": set(range(10)),
    "levit-teacher": set(range(10)),
    "mobilenet_v2": set(range(10)),
    "mobilevit": set(range(11)),
    "mobilevit-equal-neck": set(range(12)),
    "mobilevitv2": {0, 1},
    "shieldgemma2": {2, 3},
    "swiftformer": {1, 4},
    "swin": {0, 2, 3},
    "swinv2": {0},
}
# Larger removals that the configuration expresses, although not all of their blocks can be removed singly.
TOGETHER = {
    "donut-swin": ["0.blocks.0", "0.blocks.1"],
    "levit": ["stages.1.layers.0", "stages.1.layers.1"],
    "swiftformer": ["network.0.blocks.0", "network.0.blocks.1"],
    "swin": ["1.blocks.0", "1.blocks.1"],
    "swinv2": ["0.blocks.0", "0.blocks.1"],
}


def by_name(name: str) -> Architecture:
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


# Families


@pytest.mark.slow
@pytest.mark.parametrize("architecture", WITH_BLOCKS, ids=lambda architecture: architecture.name)
def test_what_each_family_can_express(architecture, tmp_path):
    model, inputs = architecture.build(), architecture.batch(seed=5)
    refused = set()
    for index, name in enumerate(architecture.blocks):
        try:
            pruned = prune_blocks(model, drop=[index], inputs=architecture.batch(1, seed=6))
        except BlockError as error:
            assert f"{architecture.model_class} cannot express the model without {name}: " in str(error)
            refused.add(index)
        else:
            assert len(find_residual_blocks(pruned, inputs)) == len(architecture.blocks) - 1
            assert_is_the_skipping_model(model, pruned, [name], inputs)
    assert refused == CANNOT_GO_ALONE.get(architecture.name, set())
    if len(refused) < len(architecture.blocks):
        pruned.save_pretrained(tmp_path)
        attention = pruned.config._attn_implementation
        again, report = type(model).from_pretrained(tmp_path, output_loading_info=True, attn_implementation=attention)
        assert not any(report.values())
        with torch.no_grad():
            # A copy is aligned in memory; loaded weights are not, and on some machines they round differently.
            assert torch.equal(copy.deepcopy(again)(**inputs)[0], pruned.eval()(**inputs)[0])


def test_a_loaded_model_can_be_pruned_and_saved(tmp_path):
    """Its weights are not aligned in memory, and on some machines kernels for such weights round differently."""
    architecture = by_name("regnet-y")
    architecture.build().save_pretrained(tmp_path / "model")
    model = type(architecture.build()).from_pretrained(tmp_path / "model")
    pruned = prune_blocks(model, drop=[0])
    saving.save_whole(pruned, None, tmp_path / "pruned")
    assert len(find_residual_blocks(pruned, architecture.batch())) == len(architecture.blocks) - 1


@pytest.mark.parametrize("name", TOGETHER)
def test_blocks_that_can_only_be_removed_together(name):
    architecture = by_name(name)
    model, inputs = architecture.build(), architecture.batch()
    drop = [block for block in architecture.blocks if block.endswith(tuple(TOGETHER[name]))]
    assert_is_the_skipping_model(model, prune_blocks(model, drop=drop), drop, inputs)


@pytest.mark.parametrize("name", ["beit-relative", "clip", "convnext", "dinov2", "resnet-bottleneck", "siglip", "vit"])
def test_several_blocks(name):
    architecture = by_name(name)
    model, inputs = architecture.build(), architecture.batch()
    for drop in ([0, 1], [0, 2], [1, 2]):
        names = [architecture.blocks[index] for index in drop]
        assert_is_the_skipping_model(model, prune_blocks(model, drop=drop), names, inputs)


def test_the_error_for_swin_names_what_would_work():
    with pytest.raises(BlockError, match=r"blocks.1 would have shift_size 0 at its new place, not 2. It can if swi"):
        prune_blocks(by_name("swin").build(), drop=["0.blocks.0"])


def test_a_layer_of_fixed_number_is_refused():
    with pytest.raises(BlockError, match=r"none of its options sets the length of mobilenet_v2\.layer"):
        prune_blocks(by_name("mobilenet_v2").build(), drop=[0])


def test_a_whole_stage_can_be_removed():
    model = build("convnext")
    pruned = prune_blocks(model, drop=r".*stages\.1.*")
    assert pruned.config.depths == [2, 0]
    names = ["convnext.encoder.stages.1.layers.0", "convnext.encoder.stages.1.layers.1"]
    assert_is_the_skipping_model(model, pruned, names, {"pixel_values": batch()["pixel_values"]})


def test_options_derived_from_the_depth_follow():
    config = prune_blocks(by_name("dinov2").build(), drop=[1]).config
    assert config.num_hidden_layers == 2
    assert config.stage_names == ["stem", "stage1", "stage2"]
    assert config.out_indices == [2]


def test_the_document_lists_every_family():
    text = DOCUMENT.read_text(encoding="utf-8")
    every = re.search(r"^Any block can be removed from (.*?)\.", text, flags=re.MULTILINE | re.DOTALL)
    assert every is not None
    rows = dict.fromkeys(re.findall(r"`([\w-]+)`", every[1]), "all")
    for families, possible in re.findall(r"^\| (`[^|]+`) \| (some|none) \|", text, flags=re.MULTILINE):
        rows |= dict.fromkeys(re.findall(r"`([\w-]+)`", families), possible)
    expected = {}
    for architecture in WITH_BLOCKS:
        refused = len(CANNOT_GO_ALONE.get(architecture.name, ()))
        possible = "all" if not refused else "some" if refused < len(architecture.blocks) else "none"
        together = architecture.name in TOGETHER and possible == "none"
        expected.setdefault(architecture.model_type, set()).add("some" if together else possible)
    # A family is as good as its worst variant that has a way at all.
    assert rows == {
        family: min(found - {"none"} or {"none"}, key="some all none".find) for family, found in expected.items()
    }
    assert set(rows) <= set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


# The result


def test_the_model_does_not_change():
    model = build("resnet").train()
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    depths, state = list(model.config.depths), torch.random.get_rng_state()
    pruned = prune_blocks(model, drop=[0])
    assert snapshot(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert model.config.depths == depths
    assert torch.equal(torch.random.get_rng_state(), state)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in pruned.parameters()}
    assert not shared


def test_dtype_mode_and_frozen_parameters_are_kept():
    model = build("vit").to(torch.bfloat16).train()
    model.vit.layers[3].requires_grad_(False)
    pruned = prune_blocks(model, drop=[0])
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    assert pruned.training
    frozen = [name for name, parameter in pruned.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all(name.startswith("vit.layers.2.") for name in frozen)


@pytest.mark.parametrize(
    "choice, left",
    [
        ({"drop": [1, 2]}, [0, 3]),
        ({"drop": ["layers.1", 3]}, [0, 2]),
        ({"drop": r"vit\.layers\.[02]"}, [1, 3]),
        ({"keep": [3, 0]}, [0, 3]),
        ({"keep": r".*[12]"}, [1, 2]),
    ],
)
def test_ways_to_name_blocks(choice, left):
    model = build("vit")
    pruned = prune_blocks(model, **choice)
    norms = [layer.layernorm_before.weight for layer in pruned.vit.layers]
    assert len(norms) == len(left)
    state = pruned.state_dict()
    for new, old in enumerate(left):
        key = "layers.{}.mlp.fc1.weight"
        assert torch.equal(state[f"vit.{key.format(new)}"], model.state_dict()[f"vit.{key.format(old)}"])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"drop": [4]}, BlockError, "`drop` holds 4, but ViTForImageClassification has 4 blocks"),
        ({"keep": [-1]}, BlockError, "`keep` holds -1"),
        ({"drop": [0.5]}, BlockError, "neither an index nor a name"),
        ({"drop": ["layers.9"]}, BlockError, "matches no residual block"),
        ({"drop": []}, BlockError, "There is nothing to drop"),
        ({"keep": [0, 1, 2, 3]}, BlockError, "There is nothing to drop"),
        ({"drop": [0, 1, 2, 3]}, BlockError, "All 4 residual blocks"),
        ({"keep": []}, BlockError, "All 4 residual blocks"),
        ({}, ConfigurationError, "None of `drop`, `keep` and `budget` was passed"),
        ({"drop": [0], "keep": [1]}, ConfigurationError, "exactly one"),
        ({"budget": 2}, ConfigurationError, "without `evaluate`"),
        ({"budget": 0, "evaluate": len}, ConfigurationError, "`budget=0`"),
        ({"budget": 1.0, "evaluate": len}, ConfigurationError, "`budget=1.0`"),
        ({"budget": True, "evaluate": len}, ConfigurationError, "`budget=True`"),
        ({"budget": 0.01, "evaluate": lambda model: 1.0}, BlockError, "cannot be met"),
        ({"budget": 2, "evaluate": lambda model: float("nan")}, ConfigurationError, "returned nan"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        prune_blocks(build("vit"), **options)


def test_a_model_without_a_configuration_is_refused():
    with pytest.raises(BlockError, match="is not a transformers model"):
        prune_blocks(torch.nn.Linear(1, 1), drop=[0])


def test_weights_that_the_configuration_does_not_know_are_refused():
    model = build("vit")
    model.vit.layers[0].register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(BlockError, match="extra"):
        prune_blocks(model, drop=[1])


def test_a_difference_that_the_configuration_hides_is_found():
    model = build("vit")
    model.vit.layers[2].mlp.activation_fn = torch.nn.ReLU()
    with pytest.raises(BlockError, match=r"differ by .* from those of the model that skips"):
        prune_blocks(model, drop=[1])
