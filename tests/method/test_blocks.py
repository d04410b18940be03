"""Residual blocks are found by structure, in forward order."""

import pytest
import torch
from labeled_models import ADAPTED, MODELS, TRANSFORMER, InPlace, every_model, mobilenet_v1, names, resnet, vit
from peft import LoraConfig, get_peft_model
from tiny_models import build
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
)

from hf_featreuse import BlockError, FeatureReuseError, find_residual_blocks

# Finding


@every_model
def test_blocks_are_found_in_forward_order(kind):
    make, expected = MODELS[kind]
    model = make()
    blocks = find_residual_blocks(model)
    assert names(blocks) == expected
    modules = dict(model.named_modules())
    assert all(block.module is modules[block.name] for block in blocks)
    assert all(block.exact for block in blocks)


@every_model
def test_blocks_are_found_on_the_meta_device(kind):
    make, expected = MODELS[kind]
    with torch.device("meta"):
        model = make()
    assert names(find_residual_blocks(model)) == expected
    assert all(parameter.is_meta for parameter in model.parameters())


@every_model
def test_blocks_are_found_with_bf16_weights(kind):
    make, expected = MODELS[kind]
    assert names(find_residual_blocks(make().bfloat16())) == expected


@every_model
def test_blocks_are_found_under_autocast_and_without_gradients(kind):
    make, expected = MODELS[kind]
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert names(find_residual_blocks(model)) == expected
        assert torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        assert names(find_residual_blocks(model)) == expected
        assert not torch.is_grad_enabled()


@every_model
def test_blocks_are_found_with_everything_but_the_head_frozen(kind):
    make, expected = MODELS[kind]
    model = make().requires_grad_(False)
    model.classifier.requires_grad_(True)
    before = [parameter.requires_grad for parameter in model.parameters()]
    assert names(find_residual_blocks(model)) == expected
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_blocks_are_found_with_every_parameter_frozen():
    model = vit().requires_grad_(False)
    assert names(find_residual_blocks(model)) == MODELS["vit"][1]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ADAPTED)
def test_blocks_are_found_under_lora(kind):
    model = build(kind)
    expected = names(find_residual_blocks(model))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=ADAPTED[kind]))
    before = [parameter.requires_grad for parameter in adapted.parameters()]
    assert names(find_residual_blocks(adapted)) == [f"base_model.model.{name}" for name in expected]
    assert [parameter.requires_grad for parameter in adapted.parameters()] == before


@pytest.mark.parametrize("kind", ["vit", "swin", "resnet"])
def test_blocks_are_found_in_train_and_in_eval_mode_alike(kind):
    model = build(kind)
    assert names(find_residual_blocks(model.train())) == names(find_residual_blocks(model.eval()))


def test_dropout_and_drop_path_do_not_hide_blocks():
    config = {**TRANSFORMER, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = BeitForImageClassification(BeitConfig(drop_path_rate=0.9, **config)).train()
    assert names(find_residual_blocks(model)) == MODELS["beit"][1]


def test_gelu_after_the_addition_is_listed_as_inexact():
    blocks = find_residual_blocks(resnet(hidden_act="gelu"))
    assert names(blocks) == MODELS["resnet"][1]
    assert [block.exact for block in blocks] == [False] * 4
    assert {block.activation for block in blocks} == {"Gelu"}


@pytest.mark.parametrize("hidden_act", ["relu", "relu6"])
def test_relu_after_the_addition_is_exact(hidden_act):
    blocks = find_residual_blocks(resnet(hidden_act=hidden_act))
    assert [block.exact for block in blocks] == [True] * 4
    assert {block.activation for block in blocks} == {"Relu" if hidden_act == "relu" else "Hardtanh"}


@pytest.mark.parametrize(
    ("kind", "num_outputs"), [("vit", None), ("convnext", None), ("resnet", None), ("dinov2", None), ("swin", 2)]
)
def test_position_and_number_of_outputs(kind, num_outputs):
    for block in find_residual_blocks(MODELS[kind][0]()):
        assert (block.position, block.keyword, block.num_outputs) == (0, None, num_outputs)


class Branch(nn.Module):
    """A residual block whose stream is not its first argument, or comes by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, scale: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor]:
        return (stream + self.linear(stream) * scale,)


class Custom(nn.Module):
    """A residual network that is not a transformers model."""

    def __init__(self, by_keyword: bool = False) -> None:
        super().__init__()
        self.by_keyword = by_keyword
        self.stem = nn.Linear(4, 6)
        self.body = nn.ModuleList(Branch() for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        scale = torch.ones(())
        for block in self.body:
            (x,) = block(scale, stream=x) if self.by_keyword else block(scale, x)
        return self.head(x)


@pytest.mark.parametrize("form", ["tensor", "dict"])
@pytest.mark.parametrize(("by_keyword", "position", "keyword"), [(False, 1, None), (True, None, "stream")])
def test_custom_network_is_searched_with_inputs_given(form, by_keyword, position, keyword):
    x = torch.randn(2, 4)
    blocks = find_residual_blocks(Custom(by_keyword), x if form == "tensor" else {"x": x})
    assert names(blocks) == ["body.0", "body.1", "body.2"]
    assert {(block.position, block.keyword, block.num_outputs) for block in blocks} == {(position, keyword, 1)}


def test_labels_in_the_batch_are_left_out():
    class Checked(Custom):
        def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
            assert not kwargs, f"asked for a loss with {sorted(kwargs)}"
            return super().forward(x)

    data = {"x": torch.randn(2, 4), "labels": torch.zeros(2), "label": torch.zeros(2)}
    assert len(find_residual_blocks(Checked(), data)) == 3


@pytest.mark.parametrize("early", [False, True])
def test_additions_in_place_are_seen(early):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(InPlace(early), InPlace(early)))
    assert names(find_residual_blocks(model, torch.randn(2, 4))) == ["1.0", "1.1"]


class Projected(nn.Module):
    """The shortcut is a projection of the shape of the input, not an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.branch = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.branch(x)


class Scaled(nn.Module):
    """Half the input plus a branch: dropping the branch would not give the input."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x + self.branch(x)


class PassedOn(nn.Module):
    """The input itself, reshaped, with parameters used for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.side(x)
        return x.unsqueeze(0).squeeze(0)


@pytest.mark.parametrize(
    "other", [Projected, Scaled, PassedOn, lambda: nn.Linear(4, 4), nn.Identity, lambda: nn.LayerNorm(4)]
)
def test_modules_that_are_not_residual_blocks_are_not_found(other):
    model = nn.Sequential(nn.Linear(4, 4), other(), InPlace(False), other())
    assert names(find_residual_blocks(model, torch.randn(2, 4))) == ["2"]


def test_module_that_is_residual_in_only_some_calls_is_not_found():
    class Sometimes(InPlace):
        def forward(self, x: torch.Tensor, residual: bool = True) -> torch.Tensor:
            return super().forward(x) if residual else self.linear(x)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.body = nn.ModuleList([Sometimes(False), Sometimes(False)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body[0](self.body[0](self.stem(x)))
            return self.body[1](self.body[1](x, residual=True), residual=False)

    assert names(find_residual_blocks(Twice(), torch.randn(2, 4))) == ["body.0"]


def test_a_block_that_takes_the_input_itself_is_found():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.linear(x)

    model = nn.Sequential(Residual(), Residual(), nn.Linear(4, 2))
    batch = torch.zeros(2, 4)
    assert [block.name for block in find_residual_blocks(model, batch)] == ["0", "1"]
    assert not batch.requires_grad
    assert batch.grad is None


# Modules after a block


FOLLOWERS = {
    "vit": ["vit.layernorm", "classifier"],
    "convnext": ["convnext.layernorm", "classifier"],
    "resnet": ["classifier.1"],
    "swin": ["swin.layernorm", "classifier"],
}


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_modules_with_parameters_after_the_last_block(kind):
    model = build(kind)
    expected = [model.get_submodule(name) for name in FOLLOWERS[kind]]
    assert list(find_residual_blocks(model)[-1].followers) == expected


def test_later_blocks_follow_a_block_and_earlier_parts_do_not():
    model = build("resnet")
    blocks = find_residual_blocks(model)
    named = {module: name for name, module in model.named_modules()}
    # The last layer but one of the second stage: what follows is the last layer and the classifier.
    last = "resnet.encoder.stages.1.layers.2.layer"
    assert [named[module] for module in blocks[-2].followers] == [
        *(f"{last}.{index}.{part}" for index in (0, 1) for part in ("convolution", "normalization")),
        "classifier.1",
    ]


class Tied(nn.Module):
    """A head that is also called before the blocks, blocks that run twice, and a part whose call is not visible."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.between, self.out, self.unused = (nn.Linear(4, 4) for _ in range(4))
        self.blocks = nn.ModuleList(InPlace(False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(x)
        for block in self.blocks:
            x = block(x)
        x = self.between(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.head(x)) @ self.unused.weight


def test_what_is_called_before_the_last_call_of_a_block_does_not_follow_it():
    model = Tied()
    assert [block.followers for block in find_residual_blocks(model, torch.randn(2, 4))] == [(model.out,)] * 2


# Errors


def test_plain_network_has_no_residual_block():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    with pytest.raises(BlockError, match="Sequential has no residual block") as caught:
        find_residual_blocks(model, torch.zeros(1, 3, 8, 8))
    assert "stochastic_depth_steps=0" in str(caught.value)
    assert isinstance(caught.value, FeatureReuseError)
    assert isinstance(caught.value, ValueError)


def test_mobilenet_v1_has_no_residual_block():
    with pytest.raises(BlockError, match="MobileNetV1ForImageClassification has no residual block"):
        find_residual_blocks(mobilenet_v1())


def test_network_without_a_config_needs_inputs():
    with pytest.raises(BlockError, match=r"Custom is not a transformers model.*`inputs`"):
        find_residual_blocks(Custom())


@pytest.mark.parametrize("inputs", [[1, 2], "pixels", 3])
def test_inputs_of_another_type_are_refused(inputs):
    with pytest.raises(BlockError, match=type(inputs).__name__):
        find_residual_blocks(build("vit"), inputs)


def test_inputs_of_a_wrong_shape_are_an_error_with_its_cause():
    with pytest.raises(BlockError, match=r"ViTForImageClassification failed on the batch.*\(1, 3, 8, 8\)") as caught:
        find_residual_blocks(build("vit"), {"pixel_values": torch.zeros(1, 3, 8, 8)})
    assert isinstance(caught.value.__cause__, ValueError)
    assert not isinstance(caught.value.__cause__, BlockError)


def test_inputs_of_a_wrong_name_are_an_error():
    with pytest.raises(BlockError, match="failed on the batch") as caught:
        find_residual_blocks(build("vit"), {"images": torch.zeros(1, 3, 32, 32)})
    assert caught.value.__cause__ is not None
