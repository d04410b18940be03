"""Models of timm behind transformers' TimmWrapper: found, skipped, frozen, counted, trained, saved and resumed."""

import numpy as np
import pytest
import torch
from architecture_checks import (
    check_costs_are_those_of_the_flop_counter,
    check_every_block_makes_a_difference,
    check_skipping_equals_taking_the_blocks_out,
    check_train_only_one_block,
    check_trainer_takes_alternating_steps,
    each,
    trainer_of,
)
from scaling_reference import drop_path_around
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

from hf_featreuse import BlockError, find_residual_blocks, inspect_model, skip_blocks, train_only

pytest.importorskip("timm", reason="timm, or the torchvision that it needs, is missing", exc_type=ImportError)

from tiny_timm import TIMM, TIMM_SKIPPABLE, TIMM_WITH_BLOCKS

CASES = {case.name: case for case in TIMM}


def names(blocks) -> tuple[str, ...]:
    return tuple(block.name for block in blocks)


# Finding


@each(TIMM_WITH_BLOCKS)
def test_blocks_are_exactly_those_labeled(case):
    model = case.build()
    blocks = find_residual_blocks(model, case.batch())
    assert names(blocks) == case.blocks
    assert {block.exact for block in blocks} == {case.exact}
    assert {block.activation for block in blocks} == {case.activation}
    assert {block.num_outputs for block in blocks} == {case.num_outputs}
    for block in blocks:
        position = next((position for part, position in case.streams.items() if part in block.name), 0)
        assert (block.position, block.passed_on) == (position, case.handed_on)


@each(TIMM_WITH_BLOCKS)
def test_branches_are_those_labeled(case):
    for block in find_residual_blocks(case.build(), case.batch()):
        assert block.branch is (case.branch and block.module.get_submodule(case.branch)), block.name


@pytest.mark.parametrize(
    ("architecture", "model_args", "branch"),
    [
        ("resnet18", None, "bn2"),
        ("resnet50", {"drop_path_rate": 0.1}, "drop_path"),
        ("resnet18", {"block_args": {"attn_layer": "se"}}, "se"),
        ("seresnet50", {"drop_path_rate": 0.1}, "drop_path"),
        ("regnety_002", None, "drop_path"),
    ],
)
def test_the_branch_is_the_last_module_before_the_addition(architecture, model_args, branch):
    with torch.device("meta"):
        config = TimmWrapperConfig(architecture=architecture, model_args=model_args, num_labels=3)
        model = TimmWrapperForImageClassification(config)
    blocks = find_residual_blocks(model)
    assert blocks
    assert all(block.branch is block.module.get_submodule(branch) for block in blocks)


@each(tuple(case for case in TIMM if not case.blocks))
def test_models_without_blocks_in_rows_are_refused(case):
    with pytest.raises(BlockError, match=r"no residual block that can be skipped.*name its blocks in `target_blocks`"):
        find_residual_blocks(case.build(), case.batch())


def default_on_meta(architecture: str) -> TimmWrapperForImageClassification:
    with torch.device("meta"):
        return TimmWrapperForImageClassification(TimmWrapperConfig(architecture=architecture, num_labels=3))


@pytest.mark.parametrize(
    "architecture", ["vgg11", "densenet121", "dpn68", "rexnet_100", "repvit_m0_9", "inception_v3"]
)
def test_no_false_hits_in_default_models(architecture):
    with pytest.raises(BlockError, match="no residual block that can be skipped"):
        find_residual_blocks(default_on_meta(architecture))


@pytest.mark.parametrize(
    ("architecture", "target", "counts"),
    [
        ("dla34", r".*\.level([25]\.tree\d|[34]\.tree\d\.tree\d)", (12, 8)),
        ("legacy_xception", r".*\.block([4-9]|10|11)", (8, 8)),
        ("repvit_m0_9", r".*\.stages\.\d\.blocks\.\d+", (20, 0)),
        (
            "caformer_s18",
            [f"stages.{s}.blocks.{b}" for s, depth in enumerate((3, 3, 9, 3)) for b in range(depth)],
            (18, 6),
        ),
    ],
)
def test_named_blocks_of_default_models(architecture, target, counts):
    """`counts` is the number of blocks and that of exact ones."""
    # The first block of a tree of DLA that widens adds to a projection, which no ReLU has made non-negative.
    blocks = find_residual_blocks(default_on_meta(architecture), target_blocks=target)
    assert (len(blocks), sum(block.exact for block in blocks)) == counts


@each(TIMM_WITH_BLOCKS)
def test_a_batch_is_made_of_the_size_given_to_timm(case):
    assert names(find_residual_blocks(case.build())) == case.blocks


@pytest.mark.parametrize(
    ("architecture", "model_args", "shape"),
    [
        ("resnet18", None, (1, 3, 224, 224)),
        ("vit_base_patch16_384", {"depth": 1}, (1, 3, 384, 384)),
        ("vit_tiny_patch16_224", {"img_size": [32, 64], "in_chans": 1, "depth": 1}, (1, 1, 32, 64)),
    ],
)
def test_shape_of_the_batch(architecture, model_args, shape):
    with torch.device("meta"):
        config = TimmWrapperConfig(architecture=architecture, model_args=model_args, num_labels=3)
        model = TimmWrapperForImageClassification(config)
    seen = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    assert find_residual_blocks(model)
    assert [tuple(images.shape) for images in seen] == [shape]


# Skipping and freezing


@each(TIMM_WITH_BLOCKS)
def test_skipping_equals_taking_the_blocks_out(case):
    check_skipping_equals_taking_the_blocks_out(case)


@each(TIMM_WITH_BLOCKS)
def test_scaling_equals_drop_path_around_the_blocks(case):
    model = case.build().double().eval()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in case.batch(4).items()}
    blocks = find_residual_blocks(model, inputs)
    survival = [0.9 - 0.6 * index / len(blocks) for index in range(len(blocks))]
    with torch.no_grad():
        plain = model(**inputs).logits
        with drop_path_around(blocks, np.zeros((1, len(blocks)), dtype=bool), survival, case.branch):
            expected = model(**inputs).logits
        with skip_blocks([], kept=blocks, survival=survival):
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(plain, expected, rtol=1e-3)


@each(TIMM_SKIPPABLE)
def test_every_block_makes_a_difference(case):
    check_every_block_makes_a_difference(case)


@each(TIMM_WITH_BLOCKS)
def test_train_only_one_block(case):
    check_train_only_one_block(case)


@each(TIMM_SKIPPABLE)
def test_costs_are_those_of_the_flop_counter(case):
    # Hiera's trunk holds whole layers with attention, whose gradients are taken to cost as much as a matrix product's.
    check_costs_are_those_of_the_flop_counter(case, rel=0.04 if case.name == "hiera" else 0.02)


def test_a_second_stream_that_is_not_shown_to_be_kept_is_refused():
    case = CASES["tnt"]
    with pytest.raises(BlockError, match="does not show all that it returns"):
        with skip_blocks(find_residual_blocks(case.build(), case.batch())):
            pass


# The real trainer


@each(TIMM_SKIPPABLE)
def test_trainer_takes_alternating_steps(case, tmp_path):
    check_trainer_takes_alternating_steps(case, tmp_path)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    case = CASES["cait"]
    whole = trainer_of(case, tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer_of(case, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_the_trained_model_is_a_plain_one_that_transformers_loads(tmp_path):
    case = CASES["regnet"]
    trainer = trainer_of(case, tmp_path)
    trainer.train()
    trainer.save_model()
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(model) is TimmWrapperForImageClassification
    with torch.no_grad():
        assert torch.equal(model.eval()(**case.batch()).logits, trainer.model.eval()(**case.batch()).logits)
    report = inspect_model(tmp_path)
    assert tuple(block.name for block in report.blocks) == case.blocks
    assert all(0 < report.costs[kind] < 1 for kind in ("stochastic_depth", "masked_freeze"))


@pytest.mark.parametrize("kind", ["skip", "freeze"])
def test_activation_checkpointing_changes_no_gradient(kind):
    case = CASES["swin"]
    gradients = []
    for checkpointing in (False, True):
        model = case.build()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        chosen = find_residual_blocks(model, case.batch())[1:2]
        with skip_blocks(chosen) if kind == "skip" else train_only(model, chosen):
            model(**case.labeled()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert (found is None) == (expected is None), name
        assert expected is None or torch.equal(found, expected), name


# Families that are named


def test_scaled_shortcuts_are_dropped_if_the_user_confirms(tmp_path):
    case = CASES["caformer"]
    targets = [*case.blocks, "stages.2.blocks.0", "stages.2.blocks.1", "stages.3.blocks.0"]
    blocks = find_residual_blocks(case.build(), case.batch(), target_blocks=targets)
    assert [(block.name.removeprefix("timm_model."), block.exact) for block in blocks] == [
        ("stages.0.blocks.0", True),
        ("stages.1.blocks.0", True),
        ("stages.2.blocks.0", False),
        ("stages.2.blocks.1", False),
        ("stages.3.blocks.0", False),
    ]
    with pytest.raises(BlockError, match=r"stages\.2\.blocks\.0 .*does not show.*allow_inexact_skip=True"):
        trainer_of(case, tmp_path, target_blocks=targets).train()
    trainer = trainer_of(case, tmp_path, target_blocks=targets, allow_inexact_skip=True)
    trainer.train()
    assert len(trainer.feature_reuse.blocks) == 5


def test_blocks_outside_of_rows_are_exact_if_the_graph_shows_it(tmp_path):
    case = CASES["dla"]
    targets = [f"level{level}.tree2" for level in (2, 5)] + ["level3.tree2.tree2"]
    blocks = find_residual_blocks(case.build(), case.batch(), target_blocks=targets)
    assert [block.name for block in blocks] == [f"timm_model.{name}" for name in sorted(targets)]
    assert all(block.exact and block.activation == "Relu" for block in blocks)
    trainer_of(case, tmp_path, target_blocks=targets).train()


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("stages.1.downsample", r" It names timm_model.stages.1.downsample \(RepVitDownsample\), which returns"),
        ("stages.2", r" It names timm_model.stages.2 \(RepVitStage\), which returns torch.float32 of shape"),
        ("stages.9", r" None is found by structure"),
    ],
)
def test_modules_that_cannot_be_blocks_are_refused_with_the_reason(target, found):
    case = CASES["repvit"]
    with pytest.raises(BlockError, match=r"matches no residual block of TimmWrapperForImageClassification\." + found):
        find_residual_blocks(case.build(), case.batch(), target_blocks=[target])
