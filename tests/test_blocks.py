"""Residual blocks are found by structure, in forward order, and nothing is disturbed by looking."""

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import ARCHITECTURES, NUM_LABELS, batch, build, snapshot
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_featreuse import BlockError, FeatureReuseError, ResidualBlock, find_residual_blocks, trainable_blocks

_TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": NUM_LABELS,
}
_CONVNEXT = {"num_stages": 3, "hidden_sizes": [8, 8, 16], "depths": [1, 2, 1], "num_labels": NUM_LABELS}


def _vit() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(**_TRANSFORMER))


def _deit() -> PreTrainedModel:
    return DeiTForImageClassification(DeiTConfig(**_TRANSFORMER))


def _beit() -> PreTrainedModel:
    return BeitForImageClassification(BeitConfig(**_TRANSFORMER))


def _dinov2() -> PreTrainedModel:
    config = {key: value for key, value in _TRANSFORMER.items() if key != "intermediate_size"}
    return Dinov2ForImageClassification(Dinov2Config(mlp_ratio=2, **config))


def _convnext() -> PreTrainedModel:
    return build("convnext")


def _convnextv2() -> PreTrainedModel:
    return ConvNextV2ForImageClassification(ConvNextV2Config(**_CONVNEXT))


def _resnet(layer_type: str = "basic", hidden_act: str = "relu") -> PreTrainedModel:
    sizes = [8, 16] if layer_type == "basic" else [16, 32]
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=sizes,
        depths=[2, 3],
        layer_type=layer_type,
        hidden_act=hidden_act,
        num_labels=NUM_LABELS,
    )
    return ResNetForImageClassification(config)


def _bottleneck() -> PreTrainedModel:
    return _resnet("bottleneck")


def _swin(image_size: int = 32, window_size: int = 4) -> PreTrainedModel:
    config = SwinConfig(
        image_size=image_size,
        patch_size=4,
        embed_dim=8,
        depths=[1, 2],
        num_heads=[1, 2],
        window_size=window_size,
        num_labels=NUM_LABELS,
    )
    return SwinForImageClassification(config)


def _mobilenet_v2() -> PreTrainedModel:
    config = MobileNetV2Config(
        image_size=32, depth_multiplier=0.25, depth_divisible_by=4, min_depth=4, num_labels=NUM_LABELS
    )
    return MobileNetV2ForImageClassification(config)


def _mobilenet_v1() -> PreTrainedModel:
    return MobileNetV1ForImageClassification(
        MobileNetV1Config(image_size=32, depth_multiplier=0.25, num_labels=NUM_LABELS)
    )


MODELS = {
    "vit": (_vit, [f"vit.layers.{i}" for i in range(3)]),
    "deit": (_deit, [f"deit.layers.{i}" for i in range(3)]),
    "dinov2": (_dinov2, [f"dinov2.encoder.layer.{i}" for i in range(3)]),
    "beit": (_beit, [f"beit.layers.{i}" for i in range(3)]),
    "convnext": (
        _convnext,
        [f"convnext.encoder.stages.{s}.layers.{i}" for s, i in ((0, 0), (0, 1), (1, 0), (1, 1))],
    ),
    # Stages of one block each: no sibling to compare with.
    "convnextv2": (
        _convnextv2,
        [f"convnextv2.encoder.stages.{s}.layers.{i}" for s, i in ((0, 0), (1, 0), (1, 1), (2, 0))],
    ),
    # The first block of a stage that changes size has a projection as its shortcut and is left out.
    "resnet": (_resnet, [f"resnet.encoder.stages.{s}.layers.{i}" for s, i in ((0, 0), (0, 1), (1, 1), (1, 2))]),
    "bottleneck": (_bottleneck, [f"resnet.encoder.stages.{s}.layers.{i}" for s, i in ((0, 1), (1, 1), (1, 2))]),
    "swin": (_swin, [f"swin.encoder.layers.{s}.blocks.{i}" for s, i in ((0, 0), (1, 0), (1, 1))]),
    "mobilenet_v2": (_mobilenet_v2, [f"mobilenet_v2.layer.{i}" for i in (1, 3, 4, 6, 7, 8, 10, 11, 13, 14)]),
}
every_model = pytest.mark.parametrize("kind", MODELS)
ADAPTED = {
    "vit": ["q_proj", "v_proj"],
    "convnext": ["pwconv1"],
    "swin": ["q_proj", "v_proj"],
    "resnet": ["convolution"],
}


def names(blocks: list[ResidualBlock]) -> list[str]:
    return [block.name for block in blocks]


# What is found


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
    model = _vit().requires_grad_(False)
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
    config = {**_TRANSFORMER, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = BeitForImageClassification(BeitConfig(drop_path_rate=0.9, **config)).train()
    assert names(find_residual_blocks(model)) == MODELS["beit"][1]


def test_gelu_after_the_addition_is_listed_as_inexact():
    blocks = find_residual_blocks(_resnet(hidden_act="gelu"))
    assert names(blocks) == MODELS["resnet"][1]
    assert [block.exact for block in blocks] == [False] * 4
    assert {block.activation for block in blocks} == {"Gelu"}


@pytest.mark.parametrize("hidden_act", ["relu", "relu6"])
def test_relu_after_the_addition_is_exact(hidden_act):
    blocks = find_residual_blocks(_resnet(hidden_act=hidden_act))
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
    """A residual network that is no transformers model."""

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


class InPlace(nn.Module):
    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.linear(x)
        if self.early:
            x += branch
            return x
        branch += x
        return branch


@pytest.mark.parametrize("early", [False, True])
def test_additions_in_place_are_seen(early):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(InPlace(early), InPlace(early)))
    assert names(find_residual_blocks(model, torch.randn(2, 4))) == ["1.0", "1.1"]


class Projected(nn.Module):
    """The shortcut is a projection of the input's own shape: not an identity."""

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
    """The input itself, reshaped, while the parameters serve something else."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.side(x)
        return x.unsqueeze(0).squeeze(0)


@pytest.mark.parametrize(
    "other", [Projected, Scaled, PassedOn, lambda: nn.Linear(4, 4), nn.Identity, lambda: nn.LayerNorm(4)]
)
def test_modules_that_are_no_residual_blocks_are_not_found(other):
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


# Nothing is disturbed


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("training", [True, False])
def test_random_states_buffers_gradients_and_modes_stay(kind, training):
    model = build(kind)
    model.train(training)
    next(model.children()).train(not training)
    model(**batch()).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [None if gradient is None else gradient.clone() for gradient in gradients]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    before, states = snapshot(model), (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    find_residual_blocks(model)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(
        gradient is None or torch.equal(gradient, value) for gradient, value in zip(gradients, values, strict=True)
    )
    assert list(dict(model.named_buffers())) == list(buffers)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    assert all(torch.equal(parameter, weight) for parameter, weight in zip(model.parameters(), weights, strict=True))


def test_random_layers_and_writing_buffers_leave_no_trace():
    class Noisy(InPlace):
        def __init__(self) -> None:
            super().__init__(False)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(()))
            self.note = "before"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.replaced = self.replaced + 1
            self.note = "after"
            self.extra = torch.rand(())
            return super().forward(x + 0 * torch.rand(()))  # Not residual: x was copied by the addition.

    noisy = Noisy()
    model = nn.Sequential(InPlace(False), noisy)
    state, replaced = torch.get_rng_state(), noisy.replaced
    find_residual_blocks(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert noisy.calls == 0
    assert noisy.replaced is replaced
    assert noisy.note == "before"
    assert not hasattr(noisy, "extra")


def test_trace_is_undone_after_a_failed_forward():
    class Failing(InPlace):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such shape")

    model = nn.Sequential(InPlace(False), nn.BatchNorm1d(4), Failing(False)).train()
    model[0].requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(BlockError, match="no such shape"):
        find_residual_blocks(model, torch.zeros(2, 4))
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_swin_keeps_its_shifted_window_where_the_input_is_no_larger_than_it():
    model = _swin(image_size=32, window_size=4)
    blocks = [module for module in model.modules() if hasattr(module, "shift_size")]
    before = [(block.shift_size, block.window_size) for block in blocks]
    assert before == [(0, 4), (0, 4), (2, 4)]
    find_residual_blocks(model)
    assert [(block.shift_size, block.window_size) for block in blocks] == before
    # The forward itself does change them for good.
    model(torch.zeros(1, 3, 32, 32))
    assert [(block.shift_size, block.window_size) for block in blocks] == [(0, 4)] * 3


def test_given_batch_stays_as_it_is():
    data = batch(2)
    images = data["pixel_values"].clone()
    find_residual_blocks(build("vit"), data)
    assert set(data) == {"pixel_values", "labels"}
    assert torch.equal(data["pixel_values"], images)
    assert not data["pixel_values"].requires_grad


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_search_costs_one_forward(kind):
    model = build(kind)
    calls = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    for block in find_residual_blocks(model):
        block.module.register_forward_hook(lambda *_: calls.append("block"))
    calls.clear()
    found = find_residual_blocks(model)
    assert calls.count("model") == 1
    assert calls.count("block") == len(found)


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
        find_residual_blocks(_mobilenet_v1())


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


# Targets


def select(target: object) -> list[str]:
    return names(find_residual_blocks(build("convnext"), target_blocks=target))


FOUND = MODELS["convnext"][1]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (None, FOUND),
        (r".*", FOUND),
        (r".*\.stages\.1\..*", FOUND[2:]),
        (r"convnext\.encoder\.stages\.0\.layers\.1", FOUND[1:2]),
        (r".*layers\.[0-9]", FOUND),
        (r".*(0\.layers\.1|1\.layers\.0)", FOUND[1:3]),
        ([FOUND[3], FOUND[0]], [FOUND[0], FOUND[3]]),
        (["layers.1"], [FOUND[1], FOUND[3]]),
        (["stages.1.layers.0", FOUND[0]], [FOUND[0], FOUND[2]]),
        (("1",), [FOUND[1], FOUND[3]]),
    ],
)
def test_target_filters_in_forward_order(target, expected):
    assert select(target) == expected


@pytest.mark.parametrize(
    ("target", "named"),
    [
        # A regular expression must match the whole name, from its start to its end.
        ("layers", "layers"),
        (r"layers\.0", r"layers\.0"),
        (r"convnext\.encoder\.stages\.0\.layers\.", r"convnext\.encoder\.stages\.0\.layers\."),
        (r".*stages\.9.*", r".*stages\.9.*"),
        # An ending must begin after a dot.
        (["ayers.0"], "ayers.0"),
        (["onvnext.encoder.stages.0.layers.0"], "onvnext.encoder.stages.0.layers.0"),
        # No beginning, no module inside a block, no container, no regular expression in a list.
        (["convnext.encoder"], "convnext.encoder"),
        (["pwconv1"], "pwconv1"),
        (["stages.0"], "stages.0"),
        ([r".*"], r".*"),
        # One entry that matches nothing is an error even if others match.
        ([FOUND[0], "layers.7"], "layers.7"),
        (["layers.0", "layers"], "layers"),
    ],
)
def test_target_that_matches_nothing_names_the_candidates(target, named):
    with pytest.raises(BlockError) as caught:
        select(target)
    message = str(caught.value)
    assert f"`target_blocks={named!r}` matches no residual block of ConvNextForImageClassification" in message
    assert all(name in message for name in FOUND)


def test_bad_regular_expression_is_named():
    with pytest.raises(BlockError, match=r"`target_blocks='\(layers'` is no regular expression") as caught:
        select("(layers")
    assert FOUND[0] in str(caught.value)


def test_empty_target_is_an_error():
    with pytest.raises(BlockError, match=r"`target_blocks=\[\]` matches no residual block"):
        select([])


def test_long_lists_of_candidates_are_cut():
    with pytest.raises(BlockError) as caught:
        find_residual_blocks(_mobilenet_v2(), target_blocks="nothing")
    message = str(caught.value)
    assert "(10 in all)" in message
    assert MODELS["mobilenet_v2"][1][7] in message
    assert MODELS["mobilenet_v2"][1][8] not in message


# Blocks that train


def test_trainable_blocks_are_those_with_a_parameter_that_requires_gradients():
    model = build("vit")
    blocks = find_residual_blocks(model)
    blocks[0].module.requires_grad_(False)
    blocks[2].module.requires_grad_(False)
    next(blocks[2].module.parameters()).requires_grad_(True)
    assert trainable_blocks(model, blocks) == blocks[1:]


def test_blocks_of_an_adapter_are_trainable_only_where_it_is():
    model = get_peft_model(build("vit"), LoraConfig(r=2, target_modules=r".*layers\.[13]\..*q_proj"))
    blocks = find_residual_blocks(model)
    assert names(trainable_blocks(model, blocks)) == ["base_model.model.vit.layers.1", "base_model.model.vit.layers.3"]


def test_no_trainable_block_is_an_error():
    model = build("vit").requires_grad_(False)
    model.classifier.requires_grad_(True)
    with pytest.raises(BlockError, match=r"None of the 4 residual blocks of ViTForImageClassification"):
        trainable_blocks(model, find_residual_blocks(model))


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
