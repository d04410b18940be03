"""The report of blocks, costs and modules that are not blocks, compared with known answers and brute force."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from PIL import Image
from tiny_models import ARCHITECTURES, batch, build, snapshot
from torch import nn
from transformers import BertConfig, ImageGPTConfig, ResNetConfig, ResNetForImageClassification, ViTConfig

from hf_featreuse import (
    BlockError,
    ConfigurationError,
    inspect_model,
)

# Known answers


def test_equal_layers_have_equal_shares():
    report = inspect_model("vit")
    assert report.architecture == "ViTForImageClassification"
    assert [block.name for block in report.blocks] == [f"vit.layers.{index}" for index in range(12)]
    assert [block.index for block in report.blocks] == list(range(12))
    assert {block.class_name for block in report.blocks} == {"ViTLayer"}
    # 4 * 768**2 and 2 * 768 * 3072 weights, their biases, and two LayerNorms.
    assert {block.parameters for block in report.blocks} == {12 * 768**2 + 13 * 768}
    assert len({block.share_of_arithmetic for block in report.blocks}) == 1
    assert 0.08 < report.blocks[0].share_of_arithmetic < 1 / 12
    assert report.not_skippable == []
    assert report.notes == []


def test_survival_follows_the_schedule():
    linear = inspect_model("vit", drop_rate=0.3)
    assert [block.survival_probability for block in linear.blocks] == pytest.approx(
        [1 - 0.3 * (index + 1) / 12 for index in range(12)]
    )
    uniform = inspect_model("vit", drop_rate=0.3, drop_rate_schedule="uniform")
    assert {block.survival_probability for block in uniform.blocks} == {0.7}


def test_expected_cost_of_equal_layers():
    report = inspect_model("vit", drop_rate=0.4, drop_rate_schedule="uniform")
    share, none = report.blocks[0].share_of_arithmetic, 0.6**12
    # Also in a cycle that drops nothing, whose masked-freeze step is vanilla.
    assert report.costs["stochastic_depth"] == pytest.approx(1 - share * 12 * 0.4)
    assert report.step_shares["vanilla"] == pytest.approx(none / 4)
    assert report.step_shares["stochastic_depth"] == pytest.approx(3 / 4)
    assert sum(report.step_shares.values()) == pytest.approx(1)
    assert report.costs["vanilla"] == 1


@pytest.mark.parametrize(
    "vanilla_steps, depth_steps, freeze_steps", [(0, 1, 0), (0, 0, 1), (0, 2, 1), (0, 0, 0), (3, 0, 0), (2, 1, 1)]
)
def test_steps_of_a_cycle_weigh_the_mean(vanilla_steps, depth_steps, freeze_steps):
    steps = {"stochastic_depth_steps": depth_steps, "masked_freeze_steps": freeze_steps}
    report = inspect_model(build("vit"), vanilla_steps=vanilla_steps, **steps)
    costs, shares = report.costs, report.step_shares
    assert costs["mean"] == pytest.approx(sum(shares[kind] * costs[kind] for kind in shares))
    assert sum(shares.values()) == pytest.approx(1)
    if not depth_steps and not freeze_steps:
        assert costs["mean"] == shares["vanilla"] == 1
    else:
        total, none = vanilla_steps + depth_steps + freeze_steps, 7 / 8 * 6 / 8 * 5 / 8 * 4 / 8
        assert shares["stochastic_depth"] == pytest.approx(depth_steps / total)
        assert shares["masked_freeze"] == pytest.approx(freeze_steps / total * (1 - none))


def test_a_rate_of_zero_costs_as_much_as_plain_training():
    report = inspect_model(build("vit"), drop_rate=0)
    assert report.step_shares == {"vanilla": 1.0, "stochastic_depth": 0.0, "masked_freeze": 0.0}
    assert report.costs["mean"] == 1
    assert {block.survival_probability for block in report.blocks} == {1.0}


def test_the_summary_names_plain_steps_and_the_part_of_the_trunk_that_trains():
    def summary(**options):
        # Lines may break after a hyphen.
        return " ".join(str(inspect_model(build("vit"), **options)).split()).replace("- ", "-")

    assert "cycles of 2 vanilla steps, 3 stochastic-depth steps and 1 masked-freeze step" in summary(vanilla_steps=2)
    assert "cycles of 3 stochastic-depth steps and 1 masked-freeze step" in summary()
    assert "cycles of 1 stochastic-depth step and 0 masked-freeze steps" in summary(masked_freeze_steps=0)
    for word, text in (("all", "in which the whole trunk trains too."), ("head", "in which the head trains too.")):
        assert text in summary(train_trunk=word)
    assert "trains too" not in summary(train_trunk="none")


def test_tiny_rates_divide_by_no_zero():
    report = inspect_model(build("vit"), drop_rate=1e-17)
    assert report.costs["mean"] == pytest.approx(1)
    assert all(math.isfinite(cost) for cost in report.costs.values())


# Modules that are not blocks


def test_downsampling_blocks_are_named_with_the_reason():
    report = inspect_model("resnet")
    assert [other.name for other in report.not_skippable] == [f"resnet.encoder.stages.{s}.layers.0" for s in range(4)]
    assert all("another shape" in other.reason for other in report.not_skippable)
    assert {other.class_name for other in report.not_skippable} == {"ResNetBottleNeckLayer"}


def test_modules_of_a_blocks_class_elsewhere_are_named_too():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", num_labels=3)
    report = inspect_model(ResNetForImageClassification(config))
    assert [other.name for other in report.not_skippable] == ["resnet.encoder.stages.1.layers.0"]


def test_each_reason():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.linear(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.layers = nn.ModuleList([Branch(), nn.GELU(), nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 4)])

        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers[:4]:
                x = layer(x)
            return x

    report = inspect_model(Model(), inputs=torch.ones(2, 4))
    assert {other.name: other.reason for other in report.not_skippable} == {
        "layers.1": "no parameters",
        "layers.2": "output is not the input plus something",
        "layers.3": "output has another shape than the input (downsampling or projection)",
        "layers.4": "not called in the forward",
    }
    assert report.model == report.architecture == "Model"


def test_blocks_that_do_not_take_part_are_named():
    model = build("vit")
    model.vit.layers[0].requires_grad_(False)
    report = inspect_model(model, target_blocks=["layers.0", "layers.1", "layers.3"])
    assert [block.name for block in report.blocks] == ["vit.layers.1", "vit.layers.3"]
    assert {other.name: other.reason for other in report.not_skippable} == {
        "vit.layers.0": "no parameter that requires gradients",
        "vit.layers.2": "left out by target_blocks",
    }


def test_inexact_blocks_are_marked():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[3], layer_type="basic", hidden_act="gelu")
    report = inspect_model(ResNetForImageClassification(config))
    assert not any(block.exact for block in report.blocks)
    assert "allow_inexact_skip" in report.notes[0]
    assert " no\n" in str(report)


# Where the model comes from


def test_local_checkpoint_needs_no_weights(tmp_path):
    config = ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    config.save_pretrained(tmp_path)
    report = inspect_model(tmp_path)
    assert report == inspect_model(str(tmp_path))
    assert [block.name for block in report.blocks] == ["vit.layers.0", "vit.layers.1", "vit.layers.2"]
    assert report.model == str(tmp_path)


def test_a_folder_takes_precedence_over_a_model_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet").mkdir()
    assert len(inspect_model("resnet").blocks) == 12
    ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2).save_pretrained(tmp_path / "resnet")
    assert len(inspect_model("resnet").blocks) == 3


def test_type_with_several_classes():
    assert inspect_model("deit").architecture == "DeiTForImageClassification"


def test_forward_that_fails_on_meta_runs_on_the_cpu(tmp_path):
    config = ImageGPTConfig(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=9)
    config.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    report = inspect_model(tmp_path)
    assert [block.name for block in report.blocks] == ["transformer.h.0", "transformer.h.1"]
    assert "CPU" in report.notes[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_blocks_are_reported_if_arithmetic_cannot_be_counted(monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("no formula. Details follow.")

    monkeypatch.setattr("hf_featreuse.inspection.inspecting.measure_step_costs", fail)
    report = inspect_model(build("vit"))
    assert report.notes == ["The arithmetic could not be counted: RuntimeError: no formula."]
    assert report.costs == {}
    assert {block.share_of_arithmetic for block in report.blocks} == {None}
    assert "?" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["blocks"][0]["share_of_arithmetic"] is None


@pytest.mark.parametrize("inputs", [None, batch(2), batch(2)["pixel_values"]], ids=["config", "batch", "tensor"])
def test_batch_changes_no_share(inputs):
    report = inspect_model(build("vit"), inputs=inputs)
    default = inspect_model(build("vit"))
    for block, expected in zip(report.blocks, default.blocks, strict=True):
        assert block.share_of_arithmetic == pytest.approx(expected.share_of_arithmetic)


def test_tensor_for_a_named_model():
    assert len(inspect_model("vit", inputs=torch.zeros(2, 3, 224, 224)).blocks) == 12


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_module_does_not_change(name):
    model = build(name).train()
    model(**batch()).loss.backward()
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    inspect_model(model)
    assert snapshot(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


# The report


def test_report_is_frozen_and_goes_into_json():
    report = inspect_model("resnet")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.parameters = 0
    data = json.loads(json.dumps(report.to_dict()))
    assert data == report.to_dict()
    assert [block["name"] for block in data["blocks"]] == [block.name for block in report.blocks]
    assert data["options"]["drop_rate"] == 0.5


@pytest.mark.parametrize("name", ["vit", "resnet", "swin", "convnext", "mobilenet_v2"])
def test_table_is_aligned_and_fits(name):
    report = inspect_model(name)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert not any(line != line.rstrip() for line in lines)
    heading = next(index for index, line in enumerate(lines) if "survival" in line)
    rows = lines[heading : heading + 1 + len(report.blocks)]
    assert len({len(row) for row in rows}) == 1
    assert all(block.name in row for block, row in zip(report.blocks, rows[1:], strict=True))
    assert f"mean {report.costs['mean']:.3f}." in " ".join(lines[heading + len(rows) :])


def test_long_names_lose_their_common_prefix():
    text = str(inspect_model("mobilevit"))
    assert "block of mobilevit.encoder.layer " in text
    assert "  2.transformer.layer.0 " in text
    assert "MobileViTTransformerLayer" in text


# Errors


@pytest.mark.parametrize(
    "options",
    [
        {"drop_rate": 1.0},
        {"drop_rate_schedule": "cubic"},
        {"masked_freeze_steps": -1},
        {"vanilla_steps": 0.5},
        {"train_trunk": "no"},
    ],
)
def test_options_are_checked_before_the_model_is_opened(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        inspect_model("no/such-model", **options)


def test_the_error_for_an_unknown_name_lists_what_was_tried():
    tried = r"(?s)neither a local folder nor a model type.*mean convnext.*Hub returned no"
    with pytest.raises(ConfigurationError, match=tried):
        inspect_model("convnexxt")


def test_folder_without_configuration(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        inspect_model(tmp_path)


def test_unreadable_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="cannot read"):
        inspect_model(tmp_path)


def test_other_tasks_are_named(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="`bert` model, for which transformers has no image classifier"):
        inspect_model(tmp_path)


def test_missing_library_is_named(monkeypatch):
    def refuse(_config):
        raise ImportError("\nX requires the natten library\nbut it was not found")

    monkeypatch.setattr("transformers.AutoModelForImageClassification.from_config", refuse)
    with pytest.raises(ConfigurationError, match=r"cannot build `vit` .*requires the natten library but it was not"):
        inspect_model("vit")


def test_model_without_blocks():
    with pytest.raises(BlockError, match="no residual block"):
        inspect_model("mobilenet_v1")


def test_target_that_matches_nothing():
    with pytest.raises(BlockError, match=r"target_blocks='layers'.*Candidates: vit\.layers\.0"):
        inspect_model("vit", target_blocks="layers")


# The picture


def test_picture_has_a_panel_for_each_known_figure(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra `examples`")
    from hf_featreuse.inspection import plot_inspection

    report = inspect_model(build("resnet"))
    unknown = [dataclasses.replace(block, share_of_arithmetic=None) for block in report.blocks]
    both = colors(plot_inspection(report, tmp_path / "new" / "both.png"))
    one = colors(plot_inspection(dataclasses.replace(report, blocks=unknown, costs={}), tmp_path / "one.png"))
    blue, orange = (0, 114, 178), (213, 94, 0)
    # Three blocks with survival 5/6, 4/6 and 1/2, and with equal shares.
    assert both[blue] / both[orange] == pytest.approx(2 / 3 * max_share(report), rel=0.1)
    assert orange not in one
    assert one[blue] > 10_000


def colors(path) -> dict[tuple[int, int, int], int]:
    with Image.open(path) as image:
        return {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}


def max_share(report) -> float:
    """The height of the second panel in bars of the mean share, with matplotlib's margin of 5 %."""
    shares = [block.share_of_arithmetic for block in report.blocks]
    return 1.05 * max(shares) / (sum(shares) / len(shares))
