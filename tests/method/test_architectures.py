"""Every image classifier in transformers: blocks found, skipped, frozen, counted and trained as expected of each."""

import contextlib
import importlib
import re
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from architecture_checks import (
    DEPTH,
    check_costs_are_those_of_the_flop_counter,
    check_every_block_makes_a_difference,
    check_skipping_equals_taking_the_blocks_out,
    check_train_only_one_block,
    check_trainer_takes_alternating_steps,
    counted,
    each,
    trainer_of,
)
from tiny_architectures import ARCHITECTURES, NOT_INSTALLED, SKIPPABLE, WITH_BLOCKS, Architecture
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as MAPPING

from hf_featreuse import (
    BlockError,
    ConfigurationError,
    StepPlan,
    find_residual_blocks,
    inspect_model,
    measure_step_costs,
    skip_blocks,
)

# The mapping


def is_installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def test_every_type_of_this_transformers_is_labeled():
    labeled = {case.model_type for case in ARCHITECTURES} | set(NOT_INSTALLED)
    assert len(labeled) == 42
    assert labeled <= set(MAPPING)
    classes = {case.model_class for case in ARCHITECTURES}
    for model_type in labeled - set(NOT_INSTALLED):
        names = MAPPING[model_type]
        assert {names} if isinstance(names, str) else set(names) <= classes, model_type
    assert len({case.name for case in ARCHITECTURES}) == len(ARCHITECTURES)


@pytest.mark.parametrize("model_type", sorted(MAPPING))
def test_default_configuration_has_blocks_or_says_why_not(model_type):
    # A type that a later transformers adds comes here by itself.
    package = NOT_INSTALLED.get(model_type)
    if package and not is_installed(package):
        with pytest.raises(ConfigurationError, match=rf"cannot build `{model_type}`.*requires the {package} library"):
            inspect_model(model_type)
        return
    names = MAPPING[model_type]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    with torch.device("meta"):
        model = model_class(CONFIG_MAPPING[model_type]())
    before = tiny_models.snapshot(model)
    try:
        blocks = find_residual_blocks(model)
    except BlockError as error:
        assert len(str(error)) > 60
    else:
        assert blocks
        assert all(model.get_submodule(block.name) is block.module for block in blocks)
    assert tiny_models.snapshot(model) == before


# The table in the documentation


def test_the_table_names_every_type():
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    assert sorted(set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))) == sorted(MAPPING), (
        "docs/architectures.md is for another transformers. Run `python benchmarks/architectures.py`."
    )
    classes = [names for value in MAPPING.values() for names in ((value,) if isinstance(value, str) else value)]
    assert all(f"| `{name}` |" in page for name in classes)
    # Figures known from the papers' layouts: 12 layers of ViT; 16 layers of ResNet-50, of which 4 have projections.
    assert "| `vit` | `ViTForImageClassification` | 12 |" in page
    assert "| `resnet` | `ResNetForImageClassification` | 12 |" in page
    assert "| `mobilenet_v1` | `MobileNetV1ForImageClassification` | 0 |" in page


# Finding


@each(WITH_BLOCKS)
def test_blocks_are_exactly_those_labeled(case):
    model = case.build()
    before, state = tiny_models.snapshot(model), {key: value.clone() for key, value in model.state_dict().items()}
    blocks = find_residual_blocks(model, case.batch())
    assert tuple(block.name for block in blocks) == case.blocks
    assert {block.exact for block in blocks} == {case.exact}
    assert {block.activation for block in blocks} == {case.activation}
    assert {block.num_outputs for block in blocks} == {case.num_outputs}
    assert {(block.position, block.keyword) for block in blocks} == {(0, None)}
    assert tiny_models.snapshot(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@each(tuple(case for case in ARCHITECTURES if not case.blocks))
def test_models_without_shortcuts_are_refused(case):
    with pytest.raises(BlockError, match="has no residual block that can be skipped"):
        find_residual_blocks(case.build(), case.batch())


@each(tuple(case for case in WITH_BLOCKS if not case.needs_inputs))
def test_a_batch_is_made_from_the_config(case):
    assert tuple(block.name for block in find_residual_blocks(case.build())) == case.blocks


@each(tuple(case for case in WITH_BLOCKS if case.needs_inputs))
def test_models_with_inputs_of_their_own_need_a_batch(case):
    model = case.build()
    if case.model_type == "shieldgemma2":
        # Without an image, its vision tower is not called.
        assert tuple(block.name for block in find_residual_blocks(model)) == case.blocks[2:]
        return
    with pytest.raises(BlockError, match="Pass a small batch"):
        find_residual_blocks(model)


@each(tuple(case for case in SKIPPABLE if case.model_type == "levit"))
def test_finding_leaves_no_graph_in_the_model(case):
    model = case.build()
    find_residual_blocks(model, case.batch())
    caches = [module.attention_bias_cache for module in model.modules() if "attention_bias_cache" in vars(module)]
    assert caches
    assert not any(caches)


# Skipping


@each(SKIPPABLE)
def test_skipping_equals_taking_the_blocks_out(case):
    check_skipping_equals_taking_the_blocks_out(case)


@each(SKIPPABLE)
def test_every_block_makes_a_difference(case):
    check_every_block_makes_a_difference(case)


@each(tuple(case for case in WITH_BLOCKS if not case.exact))
def test_inexact_shortcuts_are_refused(case):
    blocks = find_residual_blocks(case.build(), case.batch())
    with pytest.raises(BlockError, match="Gelu follows the addition"), skip_blocks(blocks[:1]):
        pass


def with_eager_attention(case: Architecture) -> PreTrainedModel:
    model = case.build().eval()
    model.set_attn_implementation("eager")
    return model


# Their loops collect what each block returns; in the others, hooks on the attention modules collect it.
_ONE_ENTRY_A_BLOCK = {"data2vec-vision", "imagegpt", "perceiver", "pvt", "pvt_v2"}
_ONE_ENTRY_A_STAGE = {"donut-swin", "hiera", "swinv2"}
# One entry a stage, of its last block, where that one runs.
_LAST_OF_A_STAGE = {"swin"}


@each(SKIPPABLE)
def test_attentions_can_be_asked_for_while_blocks_are_skipped(case):
    model = with_eager_attention(case)
    blocks = find_residual_blocks(model, case.batch())
    full = model(**case.batch(), output_attentions=True)
    for dropped in (blocks[:1], blocks):
        with skip_blocks(dropped):
            output = model(**case.batch(), output_attentions=True)
        with skip_blocks(dropped):
            plain = model(**case.batch())
        assert torch.equal(output.logits, plain.logits)
        attentions = output.get("attentions")
        if not full.get("attentions"):
            assert not attentions
        elif case.model_type in _ONE_ENTRY_A_BLOCK | _ONE_ENTRY_A_STAGE:
            assert len(attentions) == len(full.attentions)
        elif case.model_type in _LAST_OF_A_STAGE:
            assert len(attentions) == (len(full.attentions) if len(dropped) == 1 else 0)
        else:
            assert len(attentions) == len(full.attentions) - len(dropped)


# transformers collects the hidden states of these with hooks on the blocks, which a skipped block does not run.
_FEWER_HIDDEN_STATES = {
    "beit",
    "clip",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "ijepa",
    "metaclip_2",
    "siglip",
    "siglip2",
    "vit",
    "vit_msn",
}


@each(tuple(case for case in SKIPPABLE if case.model_type != "shieldgemma2"))
def test_hidden_states_can_be_asked_for_while_a_block_is_skipped(case):
    model = case.build().eval()
    blocks = find_residual_blocks(model, case.batch())
    full = model(**case.batch(), output_hidden_states=True).hidden_states
    with skip_blocks(blocks[1:2]):
        states = model(**case.batch(), output_hidden_states=True).hidden_states
    assert len(states) == len(full) - (case.model_type in _FEWER_HIDDEN_STATES)


# Freezing


@each(WITH_BLOCKS)
def test_train_only_one_block(case):
    check_train_only_one_block(case)


# Costs


@each(SKIPPABLE)
def test_costs_are_those_of_the_flop_counter(case):
    # A pooling head's query does not depend on the image, so no gradient flows through it when it is frozen, and
    # ShieldGemma2 runs the head for nothing. Neither is told apart, and in a model as small as this one the head
    # counts for much.
    rel = 0.06 if case.model_type in ("siglip", "siglip2", "shieldgemma2") else 0.02
    check_costs_are_those_of_the_flop_counter(case, rel)


@each(tuple(case for case in SKIPPABLE if case.model_type == "levit"))
def test_costs_after_a_backward_in_eval_mode(case):
    # The cache of attention biases then keeps a graph that cannot be run again.
    model = case.build().eval()
    blocks = find_residual_blocks(model, case.batch(1))
    expected = measure_step_costs(model, blocks, case.batch(1))
    model(**case.batch(1)).logits.sum().backward()
    caches = [module.attention_bias_cache for module in model.modules() if "attention_bias_cache" in vars(module)]
    before = [dict(cache) for cache in caches]
    assert measure_step_costs(model, blocks, case.batch(1)) == expected
    assert find_residual_blocks(model, case.batch(1))
    assert all(cache[key] is value for cache, old in zip(caches, before, strict=True) for key, value in old.items())


# Models that keep keys and values. torch's counter sees eager attention on the CPU, and so how many keys there are.
@pytest.mark.parametrize("name", ["imagegpt", "shieldgemma2"])
def test_a_cache_of_keys_and_values_costs_nothing(name):
    case = next(case for case in ARCHITECTURES if case.name == name)
    model = with_eager_attention(case)
    without = {**case.batch(1), "use_cache": False}
    blocks = find_residual_blocks(model, without)
    costs = measure_step_costs(model, blocks, {**case.batch(1), "use_cache": True})
    assert costs == measure_step_costs(model, blocks, without)
    with skip_blocks(blocks[-1:]):
        skipped = counted(case, model, contextlib.nullcontext()) / costs.vanilla
    assert costs.share(StepPlan(DEPTH, (len(blocks) - 1,))) == pytest.approx(skipped, rel=0.02)


# The real trainer


@each(tuple(case for case in SKIPPABLE if case.returns_loss))
def test_trainer_takes_alternating_steps(case, tmp_path):
    check_trainer_takes_alternating_steps(case, tmp_path)


@each(tuple(case for case in SKIPPABLE if not case.returns_loss))
def test_a_missing_loss_is_the_error_of_trainer(case, tmp_path):
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer_of(case, tmp_path).train()


@each(tuple(case for case in ARCHITECTURES if case not in SKIPPABLE))
def test_trainer_says_why_it_cannot(case, tmp_path):
    with pytest.raises(BlockError, match="follows the addition" if case.blocks else "has no residual block"):
        trainer_of(case, tmp_path).train()
