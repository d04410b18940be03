"""Small configurations build, train and load again; overrides and their errors."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.small_models import SMALL_FAMILIES, parse_overrides, small_config, small_image_processor


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def repeated_blocks(model: nn.Module) -> int:
    """Count the modules in a list with others of their class; of a stage, count its content."""
    count = 0
    for child in model.children():
        items = list(child.children())
        is_list = isinstance(child, nn.ModuleList | nn.Sequential) and len({type(item) for item in items}) == 1
        inner = [module for item in items for module in [item, *item.children()]]
        is_stages = (
            any(isinstance(module, nn.ModuleList) for module in inner) or "Stage" in type(items[0]).__name__
            if items
            else False
        )
        count += len(items) if is_list and not is_stages and len(items) > 1 else repeated_blocks(child)
    return count


def forward_backward(config, image_size: int, device: str = "cpu"):
    with torch.device(device):
        model = AutoModelForImageClassification.from_config(config)
        pixels = torch.randn(2, 3, image_size, image_size)
        output = model(pixel_values=pixels, labels=torch.tensor([0, 2]))
        output.loss.backward()
    return model, output


@pytest.mark.parametrize("model_type", SMALL_FAMILIES)
@pytest.mark.parametrize("image_size", [8, 32])
def test_small_families_run_and_have_blocks(model_type, image_size):
    model, output = forward_backward(small_config(model_type, image_size, 3), image_size)
    assert output.logits.shape == (2, 3)
    assert torch.isfinite(output.logits).all()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    assert repeated_blocks(model) >= 4
    assert sum(parameter.numel() for parameter in model.parameters()) < 7e6


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SMALL_FAMILIES)
@pytest.mark.parametrize("image_size", [11, 48])
def test_small_families_take_other_small_sizes(model_type, image_size):
    _, output = forward_backward(small_config(model_type, image_size, 3), image_size, device="meta")
    assert output.logits.shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SMALL_FAMILIES)
def test_large_images_get_the_default_configuration(model_type):
    config = small_config(model_type, 224, 3)
    default = type(config)()
    ignored = {"id2label", "label2id", "architectures"}
    assert {name for name, value in config.to_dict().items() if value != default.to_dict()[name]} <= ignored
    _, output = forward_backward(config, 224, device="meta")
    assert output.logits.shape == (2, 3)


def test_default_at_224_computes():
    _, output = forward_backward(small_config("resnet", 224, 3, overrides="depths=[1,1,1,1]"), 224)
    assert output.logits.shape == (2, 3)
    assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES))
def test_every_type_gets_its_labels(model_type):
    for image_size in (32, 96):
        config = small_config(model_type, image_size, 3, ["ant", "bee", "cow"])
        assert config.num_labels == 3
        assert config.id2label == {0: "ant", 1: "bee", 2: "cow"}
        assert config.label2id == {"ant": 0, "bee": 1, "cow": 2}
        options = {**config.to_dict(), **config.to_dict().get("vision_config", {})}
        assert options.get("image_size", image_size) in (image_size, [image_size] * 2, (image_size, image_size))


def test_tokens_and_default_names():
    assert [small_config("vit", size, 2).patch_size for size in (8, 28, 32, 64)] == [2, 4, 4, 8]
    assert small_config("vit", 27, 2).patch_size == 3
    assert small_config("vit", 32, 2).id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_overrides_in_text_equal_overrides_in_a_dict():
    text = "hidden_size=96,hidden_act=relu,qkv_bias=false,layer_norm_eps=1e-6,hidden_dropout_prob=0"
    options = {
        "hidden_size": 96,
        "hidden_act": "relu",
        "qkv_bias": False,
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
    }
    config = small_config("vit", 32, 2, overrides=text)
    assert config.to_dict() == small_config("vit", 32, 2, overrides=options).to_dict()
    assert {name: getattr(config, name) for name in options} == options
    assert isinstance(config.hidden_dropout_prob, float)
    # What follows from the width follows the new width, unless it is given too.
    assert (config.intermediate_size, config.num_attention_heads) == (384, 3)
    assert small_config("vit", 32, 2, overrides=text + ",intermediate_size=100").intermediate_size == 100


def test_overrides_of_lists_and_nested_options():
    config = small_config("convnext", 8, 2, overrides="hidden_sizes=[16, 32,48],depths=[1,2,1]")
    assert (config.hidden_sizes, config.depths, config.num_stages) == ([16, 32, 48], [1, 2, 1], 3)
    assert config.to_dict()["stage_names"] == ["stem", "stage1", "stage2", "stage3"]  # follows from depths
    two_stages = small_config("resnet", 8, 3, overrides={"hidden_sizes": [16, 24], "depths": [2, 2]})
    forward_backward(two_stages, 8)
    nested = small_config("siglip", 8, 2, overrides="vision_config.hidden_size=32,text_config.vocab_size=100")
    assert (nested.vision_config.hidden_size, nested.vision_config.intermediate_size) == (32, 128)
    assert nested.text_config.vocab_size == 100
    assert small_config("vit", 96, 2, overrides="num_hidden_layers=3").num_hidden_layers == 3
    whole = small_config("clip", 8, 2, overrides={"vision_config": {"num_hidden_layers": 5}})
    assert (whole.vision_config.num_hidden_layers, whole.vision_config.patch_size) == (5, 2)


def test_parse_overrides_values():
    assert parse_overrides("a=none,b=[true,relu],c='x,y',d=-3,e={'k': [1, 2]}, f = (1,2) ,") == {
        "a": None,
        "b": [True, "relu"],
        "c": "x,y",
        "d": -3,
        "e": {"k": [1, 2]},
        "f": (1, 2),
    }
    assert parse_overrides(None) == parse_overrides("") == {}
    given = {"a": 1}
    assert parse_overrides(given) == given and parse_overrides(given) is not given


@pytest.mark.parametrize(
    ("model_type", "overrides", "words"),
    [
        ("vit", "hiden_size=96", ["hiden_size", "hidden_size", "num_hidden_layers"]),
        ("clip", "vision_config.hiden_size=96", ["vision_config.hidden_size"]),
        ("vit", "hidden_size", ["'hidden_size'", "name=value"]),
        ("vit", "hidden_size=", ["hidden_size", "does not parse"]),
        ("vit", "hidden_size=[96", ["hidden_size", "does not parse", "brackets"]),
        ("vit", "hidden_act=quick-gelu", ["hidden_act", "in quotes"]),
        ("vit", "hidden_size=96,hidden_size=32", ["twice"]),
        ("vit", "hidden_size=abc", ["hidden_size='abc'", "whole number"]),
        ("vit", "hidden_size=96.5", ["hidden_size=96.5", "whole number"]),
        ("vit", "hidden_size=0", ["hidden_size=0"]),
        ("vit", "qkv_bias=maybe", ["qkv_bias", "true or false"]),
        ("vit", "layer_norm_eps=tiny", ["layer_norm_eps"]),
        ("vit", "num_attention_heads=5", ["num_attention_heads=5", "multiple"]),
        ("vit", "num_labels=5", ["argument `num_labels`"]),
        ("vit", {"id2label": {0: "a"}}, ["argument `label_names`"]),
        ("vit", "image_size=16", ["argument `image_size`"]),
        ("convnext", "hidden_sizes=[32,64]", ["hidden_sizes=2", "depths=3", "Give all of them"]),
        ("convnext", "depths=3", ["depths"]),
        ("convnext", "num_stages=2", ["num_stages=2", "depths=3"]),
        ("efficientnet", "num_hidden_layers=5", ["num_hidden_layers=5", "computes it", "64"]),
        ("swin", "embed_dim=wide", ["embed_dim"]),
    ],
)
def test_overrides_that_cannot_be_used(model_type, overrides, words):
    with pytest.raises(ConfigurationError) as caught:
        small_config(model_type, 32, 2, overrides=overrides)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("vt", 32, 2), ["'vt'", "vit", "Pass one of these 42", "perceiver", "convnext"]),
        (("vit", 4, 2), ["image_size=4", "8 pixels"]),
        (("vit", 32.0, 2), ["image_size=32.0"]),
        (("vit", 32, 0), ["num_labels=0"]),
        (("vit", 32, 2, ["a"]), ["1 names", "num_labels=2"]),
        (("vit", 32, 2, ["a", "a"]), ["['a'] more than once"]),
    ],
)
def test_arguments_that_cannot_be_used(arguments, words):
    with pytest.raises(ConfigurationError) as caught:
        small_config(*arguments)
    assert [word for word in words if word not in str(caught.value)] == []


def test_processor_scales_and_resizes_any_image_mode():
    processor = small_image_processor("resnet", 8)
    white = processor(Image.new("L", (8, 8), 255), return_tensors="pt")["pixel_values"]
    assert torch.allclose(white, torch.ones(1, 3, 8, 8))
    black = processor(Image.new("RGB", (30, 20), 0), return_tensors="pt")["pixel_values"]
    assert torch.allclose(black, -torch.ones(1, 3, 8, 8))
    for mode in ("1", "P", "RGBA", "LA"):
        assert processor(Image.new(mode, (9, 5)), return_tensors="pt")["pixel_values"].shape == (1, 3, 8, 8)


def test_processor_that_does_not_fit_is_refused():
    with pytest.raises(ConfigurationError, match="configuration is for images of 32 pixels"):
        small_image_processor(small_config("vit", 32, 2), 8)
    with pytest.raises(ConfigurationError, match="1 channels"):
        small_image_processor(small_config("vit", 8, 2, overrides="num_channels=1"), 8)
    with pytest.raises(ConfigurationError, match="color-cluster ids"):
        small_image_processor("imagegpt", 32)
    with pytest.raises(ConfigurationError, match="Did you mean resnet"):
        small_image_processor("resnett", 32)
    with pytest.raises(ConfigurationError, match="image_size=0"):
        small_image_processor("vit", 0)


@pytest.mark.parametrize("model_type", ["vit", "convnext"])
def test_saved_model_and_processor_load_with_plain_transformers(model_type, tmp_path):
    config = small_config(model_type, 8, 3, ["ant", "bee", "cow"])
    model = AutoModelForImageClassification.from_config(config).eval()
    processor = small_image_processor(config, 8)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    with torch.no_grad():
        expected = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    found: Any = pipeline("image-classification", model=str(tmp_path), device="cpu")(image)
    assert {entry["label"] for entry in found} == {"ant", "bee", "cow"}
    for entry in found:
        class_id = ["ant", "bee", "cow"].index(entry["label"])
        assert entry["score"] == pytest.approx(float(expected[class_id]), abs=1e-6)
