"""Selecting the requested blocks, and the blocks that train."""

import pytest
from labeled_models import MODELS, mobilenet_v2, names
from peft import LoraConfig, get_peft_model
from tiny_models import build

from hf_featreuse import BlockError, find_residual_blocks, trainable_blocks

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
        # An ending must start after a dot.
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
    with pytest.raises(BlockError, match=r"`target_blocks='\(layers'` is not a regular expression") as caught:
        select("(layers")
    assert FOUND[0] in str(caught.value)


def test_empty_target_is_an_error():
    with pytest.raises(BlockError, match=r"`target_blocks=\[\]` matches no residual block"):
        select([])


def test_long_lists_of_candidates_are_cut():
    with pytest.raises(BlockError) as caught:
        find_residual_blocks(mobilenet_v2(), target_blocks="nothing")
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


def test_blocks_of_an_adapter_are_trainable_only_if_they_have_one():
    model = get_peft_model(build("vit"), LoraConfig(r=2, target_modules=r".*layers\.[13]\..*q_proj"))
    blocks = find_residual_blocks(model)
    assert names(trainable_blocks(model, blocks)) == ["base_model.model.vit.layers.1", "base_model.model.vit.layers.3"]


def test_no_trainable_block_is_an_error():
    model = build("vit").requires_grad_(False)
    model.classifier.requires_grad_(True)
    with pytest.raises(BlockError, match=r"None of the 4 residual blocks of ViTForImageClassification"):
        trainable_blocks(model, find_residual_blocks(model))
