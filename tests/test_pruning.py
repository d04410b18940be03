"""Shallower models: the same logits as the model that skips, an ordinary checkpoint, and what is refused."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from tiny_architectures import ARCHITECTURES, WITH_BLOCKS, Architecture
from tiny_models import batch, build, snapshot
from transformers import AutoConfig, AutoModelForImageClassification, ViTForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_featreuse import (
    BlockError,
    CheckpointError,
    ConfigurationError,
    DataError,
    accuracy_on,
    find_residual_blocks,
    prune_blocks,
    rank_removals,
    skip_blocks,
)
from hf_featreuse.cli import main
from hf_featreuse.pruning import saving
from hf_featreuse.small_models import small_config, small_image_processor

DOCUMENT = Path(__file__).parents[1] / "docs" / "pruning.md"
# Indices of the blocks, removed alone, for which these tiny models have no configuration. All others go, each alone.
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
# Larger removals that the configuration expresses though none of their blocks, or not all, can go alone.
TOGETHER = {
    "donut-swin": ["0.blocks.0", "0.blocks.1"],
    "levit": ["stages.1.layers.0", "stages.1.layers.1"],
    "swiftformer": ["network.0.blocks.0", "network.0.blocks.1"],
    "swin": ["1.blocks.0", "1.blocks.1"],
    "swinv2": ["0.blocks.0", "0.blocks.1"],
}


def by_name(name: str) -> Architecture:
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


def assert_is_the_skipping_model(model, pruned, drop: list[str], inputs) -> None:
    blocks = [block for block in find_residual_blocks(model, inputs) if block.name in drop]
    assert len(blocks) == len(drop)
    model.eval()
    pruned.eval()
    with torch.no_grad(), skip_blocks(blocks, allow_inexact=True):
        expected = model(**inputs)[0]
    with torch.no_grad():
        assert torch.equal(pruned(**inputs)[0], expected)


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
            # A copy is aligned in memory; loaded weights are not, and on some machines they round otherwise.
            assert torch.equal(copy.deepcopy(again)(**inputs)[0], pruned.eval()(**inputs)[0])


def test_a_loaded_model_can_be_pruned_and_saved(tmp_path):
    """Its weights are not aligned in memory, and on some machines kernels for such weights round otherwise."""
    architecture = by_name("regnet-y")
    architecture.build().save_pretrained(tmp_path / "model")
    model = type(architecture.build()).from_pretrained(tmp_path / "model")
    pruned = prune_blocks(model, drop=[0])
    saving.save_whole(pruned, None, tmp_path / "pruned")
    assert len(find_residual_blocks(pruned, architecture.batch())) == len(architecture.blocks) - 1


@pytest.mark.parametrize("name", TOGETHER)
def test_blocks_that_can_only_go_together(name):
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


def test_swin_says_what_would_work():
    with pytest.raises(
        BlockError, match=r"blocks.1 would have shift_size 0 at its new place, not 2. It can without swi"
    ):
        prune_blocks(by_name("swin").build(), drop=["0.blocks.0"])


def test_a_layer_of_fixed_number_is_refused():
    with pytest.raises(BlockError, match=r"no option of it sets the length of mobilenet_v2\.layer"):
        prune_blocks(by_name("mobilenet_v2").build(), drop=[0])


def test_a_whole_stage_may_go():
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
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (all|some|none) \|", text, flags=re.MULTILINE))
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


# What the result is


def test_the_model_stays_as_it_is():
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
        ({"drop": []}, BlockError, "Nothing to drop"),
        ({"keep": [0, 1, 2, 3]}, BlockError, "Nothing to drop"),
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
    with pytest.raises(BlockError, match="no transformers model"):
        prune_blocks(torch.nn.Linear(1, 1), drop=[0])


def test_weights_that_the_configuration_does_not_know_are_refused():
    model = build("vit")
    model.vit.layers[0].register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(BlockError, match="extra"):
        prune_blocks(model, drop=[1])


def test_a_difference_that_the_configuration_hides_is_found():
    model = build("vit")
    model.vit.layers[2].mlp.activation_fn = torch.nn.ReLU()
    with pytest.raises(BlockError, match="does not give the logits"):
        prune_blocks(model, drop=[1])


# Choice by measurement


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
def test_a_branch_of_zero_goes_first(name, index):
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
    with pytest.raises(BlockError, match="Nothing to drop"):
        prune_blocks(model, budget=4, evaluate=closeness(model))


def test_swin_loses_blocks_that_its_configuration_can_miss():
    model = build("swin")
    removals = rank_removals(model, closeness(model), budget=1)
    assert removals[-1].blocks_left == 1
    gone = [name for removal in removals for name in removal.blocks]
    assert len(find_residual_blocks(prune_blocks(model, drop=gone))) == 1


def test_measuring_leaves_the_model_as_it_is():
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
    with pytest.raises(DataError, match="No batch"):
        accuracy_on([])(model)
    with pytest.raises(DataError, match="no `labels`"):
        accuracy_on([{"pixel_values": data["pixel_values"]}])(model)


# The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A ViT for the digits, untrained, with its image processor."""
    folder = tmp_path_factory.mktemp("model") / "vit"
    names = [f"digit {index}" for index in range(10)]
    overrides = "hidden_size=16,num_hidden_layers=4,num_attention_heads=2"
    torch.manual_seed(0)
    config = small_config("vit", 8, 10, names, overrides)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    small_image_processor(config, 8).save_pretrained(folder)
    return str(folder)


def test_command_saves_an_ordinary_checkpoint(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "shallow"
    assert main(["prune", checkpoint, "--drop", "1,layers.3", "--output_dir", str(out)]) == 0
    text, err = capsys.readouterr()
    assert "4 residual blocks" in text
    assert f"saved in {out}: 2 residual blocks" in text
    assert err == ""
    config = AutoConfig.from_pretrained(out)
    assert config.num_hidden_layers == 2
    assert config.id2label[3] == "digit 3"
    loaded, report = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert type(loaded) is ViTForImageClassification
    assert not any(report.values())
    original = AutoModelForImageClassification.from_pretrained(checkpoint)
    names = ["vit.layers.1", "vit.layers.3"]
    assert_is_the_skipping_model(original, loaded, names, {"pixel_values": torch.randn(2, 3, 8, 8)})
    processor = "preprocessor_config.json"
    assert json.loads((out / processor).read_text()) == json.loads((Path(checkpoint) / processor).read_text())
    assert sorted(path.name for path in out.parent.iterdir()) == ["shallow"]


def test_command_chooses_by_accuracy(checkpoint, tmp_path, capsys):
    options = ["--budget", "2", "--data", "digits", "--max_eval_samples", "40", "--json"]
    assert main(["prune", checkpoint, *options, "--output_dir", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["blocks"] == {"before": 4, "after": 2}
    assert [round["blocks_left"] for round in report["rounds"]] == [3, 2]
    assert AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 2
    assert main(["prune", checkpoint, "--budget", "0.6", *options[2:], "--output_dir", str(tmp_path / "b")]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"][-1]["forward_share"] < 0.6


@pytest.mark.parametrize(
    "options, message",
    [
        (["--drop", "7"], "`drop` holds 7"),
        (["--keep", "nothing.*"], "matches no residual block"),
        (["--budget", "2"], "needs `--data`"),
        (["--budget", "two", "--data", "digits"], "`--budget two` is no number"),
        (["--budget", "0", "--data", "digits"], "`budget=0`"),
        (["--budget", "2", "--data", "/nowhere"], "Cannot load data set '/nowhere'"),
    ],
)
def test_command_errors_are_one_line_and_leave_nothing(options, message, checkpoint, tmp_path, capsys):
    assert main(["prune", checkpoint, *options, "--output_dir", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("featreuse: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_a_folder_that_is_in_use(checkpoint, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    # Said before anything is loaded.
    assert main(["prune", "no/such-model", "--drop", "1", "--output_dir", str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="is not empty"):
        saving.save_whole(build("vit"), None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_command_refuses_a_checkpoint_that_is_no_classifier(checkpoint, tmp_path, capsys):
    ViTForImageClassification.from_pretrained(checkpoint).vit.save_pretrained(tmp_path / "headless")
    assert main(["prune", str(tmp_path / "headless"), "--drop", "1", "--output_dir", str(tmp_path / "out")]) == 1
    assert "lacks weights" in capsys.readouterr().err
    assert main(["prune", str(tmp_path / "none"), "--drop", "1", "--output_dir", str(tmp_path / "out")]) == 1
    assert "cannot be loaded as an image classifier" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_must_be_those_of_the_model(tmp_path, capsys):
    config = small_config("vit", 8, 3, None, "hidden_size=16,num_hidden_layers=2,num_attention_heads=2")
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "three")
    arguments = ["prune", str(tmp_path / "three"), "--budget", "1", "--data", "digits"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 1
    assert "no image processor" in capsys.readouterr().err
    small_image_processor(config, 8).save_pretrained(tmp_path / "three")
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 1
    assert "has 10 classes (0, 1, 2, ...) and the model 3" in capsys.readouterr().err


def test_a_failed_save_leaves_nothing(tmp_path):
    model = build("vit")
    pruned = prune_blocks(model, drop=[0])
    # Says one thing, holds another: what is written cannot load as this model.
    pruned.config.num_hidden_layers = 4
    with pytest.raises(CheckpointError, match="does not load as the same model"):
        saving.save_whole(pruned, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
