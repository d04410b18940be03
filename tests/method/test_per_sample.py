"""Every sample with its own set of blocks: skipped, frozen and counted as if each were alone in the batch."""

import contextlib
import dataclasses

import numpy as np
import pytest
import tiny_models
import torch
from sample_checks import assert_same_gradients, gradients, sample_schedule
from scaling_reference import drop_path_around
from tiny_architectures import SKIPPABLE, Architecture
from tiny_models import WITHOUT_BATCH_NORM, build
from torch import nn
from torch.func import functional_call, grad

from hf_featreuse import (
    BlockError,
    ConfigurationError,
    FeatureReuse,
    FeatureReuseSchedule,
    ResidualBlock,
    StepKind,
    StepPlan,
    find_residual_blocks,
    measure_step_costs,
    train_only,
)
from hf_featreuse.method.cost import flop_counter
from hf_featreuse.method.per_sample import FROZEN, RESTS, TRAINS, sample_groups, skip_samples, train_samples

DEPTH, FREEZE = StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE
CPU = torch.device("cpu")


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


APART = tuple(case for case in SKIPPABLE if not has_batch_norm(case.build()))
TOGETHER = tuple(case for case in SKIPPABLE if case not in APART)


def each(architectures: tuple[Architecture, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in architectures])


def random_masks(samples: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Masks with a sample that drops nothing, one that drops everything, and blocks that all or none drop."""
    masks = np.random.default_rng(seed).random((samples, blocks)) < 0.5
    masks[0], masks[1] = False, True
    return masks


def score(logits: torch.Tensor) -> torch.Tensor:
    """A loss a sample that depends on every logit."""
    return (logits * torch.linspace(0.5, 1.5, logits.shape[-1])).square().sum(-1)


# Groups


def test_groups_of_stochastic_depth():
    groups = sample_groups(np.array([[True, False], [False, False]]), freezing=False, gradient_everywhere=True)
    assert groups.tolist() == [[RESTS, TRAINS], [TRAINS, TRAINS]]


def test_groups_of_masked_freeze():
    masks = np.array([[False, True, False], [False, False, False], [True, False, True]])
    groups = sample_groups(masks, freezing=True, gradient_everywhere=False)
    # Samples that train nothing earlier have no separate path: a block sees two sizes, whatever others drew.
    assert groups.tolist() == [[RESTS, TRAINS, FROZEN], [RESTS, FROZEN, FROZEN], [TRAINS, FROZEN, TRAINS]]
    groups = sample_groups(np.roll(masks, 1, axis=1) & [False, True, True], freezing=True, gradient_everywhere=False)
    assert groups.tolist() == [[RESTS, RESTS, TRAINS], [RESTS, RESTS, FROZEN], [RESTS, TRAINS, FROZEN]]
    groups = sample_groups(masks, freezing=True, gradient_everywhere=True)
    assert groups.tolist() == [[FROZEN, TRAINS, FROZEN], [FROZEN, FROZEN, FROZEN], [TRAINS, FROZEN, TRAINS]]


# Every architecture


@each(APART)
def test_stochastic_depth_equals_masking(case):
    model = case.build().eval()
    blocks = find_residual_blocks(model, case.batch())
    masks, inputs = random_masks(6, len(blocks)), case.batch(6)
    survival = [0.5 + 0.5 * index / len(blocks) for index in range(len(blocks))]
    for divisors in (None, survival):
        with drop_path_around(blocks, masks, divisors or [1.0] * len(blocks), case.branch):
            expected = model(**inputs).logits
            score(expected).sum().backward()
        wanted = gradients(model)
        with skip_samples(blocks, masks, CPU, survival=divisors):
            logits = model(**inputs).logits
            score(logits).sum().backward()
        torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
        assert_same_gradients(gradients(model), wanted)


@each(APART)
def test_masked_freeze_equals_the_samples_one_by_one(case):
    model = case.build().eval()
    blocks = find_residual_blocks(model, case.batch())
    trunk = [parameter for parameter in model.parameters() if not in_any(parameter, blocks)]
    masks, inputs = random_masks(4, len(blocks)), case.batch(4)
    expected = model(**inputs).logits
    for sample, mask in enumerate(masks):
        chosen = [block for block, dropped in zip(blocks, mask, strict=True) if dropped]
        if chosen:
            with train_only(model, chosen):
                score(
                    model(**{key: value[sample : sample + 1] for key, value in inputs.items()}).logits
                ).sum().backward()
    wanted = gradients(model)
    for parameter in trunk:
        parameter.requires_grad_(False)
    with train_samples(blocks, masks, CPU):
        logits = model(**inputs).logits
        score(logits).sum().backward()
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
    assert_same_gradients(gradients(model), wanted)


def in_any(parameter: nn.Parameter, blocks: list[ResidualBlock]) -> bool:
    return any(parameter is own for block in blocks for own in block.module.parameters())


@each(TOGETHER)
def test_models_with_batch_norm_are_refused(case):
    model = case.build()
    blocks = find_residual_blocks(model, case.batch())
    schedule = FeatureReuseSchedule(len(blocks), drop_granularity="sample")
    with pytest.raises(BlockError, match=r"cannot train .*BatchNorm.*normalizes over the batch"):
        FeatureReuse(model, blocks, schedule)


@pytest.mark.parametrize(
    ("survival", "message"),
    [
        ([], "`survival` has 0 entries for 4 blocks"),
        ([0.5] * 3, "`survival` has 3 entries for 4 blocks"),
        ([0.5] * 5, "`survival` has 5 entries for 4 blocks"),
        ([0.5, 0.5, 0.5, 0.0], r"`survival` contains 0\.0"),
        ([0.5, -0.1, 0.5, 0.5], r"`survival` contains -0\.1"),
        ([1.5, 0.5, 0.5, 0.5], r"`survival` contains 1\.5"),
        ([0.5, 0.5, float("nan"), 0.5], "`survival` contains nan"),
    ],
)
def test_survival_must_fit_the_blocks(survival, message):
    model = build("vit")
    blocks, before = find_residual_blocks(model), tiny_models.snapshot(model)
    with pytest.raises(ConfigurationError, match=message):
        with skip_samples(blocks, random_masks(2, 4), CPU, survival=survival):
            raise AssertionError("entered")
    assert tiny_models.snapshot(model) == before


def test_blocks_with_an_activation_and_no_branch_cannot_be_scaled():
    model = build("resnet")
    before = tiny_models.snapshot(model)
    blocks = [dataclasses.replace(block, branch=None) for block in find_residual_blocks(model)]
    with pytest.raises(ConfigurationError, match=rf"{blocks[1].name} .*: Relu follows its addition, and no module"):
        with skip_samples(blocks, random_masks(2, 4), CPU, survival=[1.0, 0.5, 0.5, 0.5]):
            raise AssertionError("entered")
    assert tiny_models.snapshot(model) == before
    # Without survival probabilities nothing is scaled, but there is BatchNorm.
    with pytest.raises(BlockError, match="normalizes over the batch"):
        with skip_samples(blocks, random_masks(2, 4), CPU):
            raise AssertionError("entered")


# Against gradients of single samples


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_masked_freeze_equals_a_masked_sum_of_per_sample_gradients(name: str):
    model = build(name).eval()
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks), stochastic_depth_steps=0), train_trunk=False)
    inputs = tiny_models.batch(6)
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(weights: dict, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, weights, (image[None],)).logits
        return nn.functional.cross_entropy(logits, label[None])

    single = [
        grad(loss)(parameters, image, label)
        for image, label in zip(inputs["pixel_values"], inputs["labels"], strict=True)
    ]
    with reuse.step(0, batch_size=6) as plan:
        model(**inputs).loss.backward()
    found = gradients(model)
    for index, block in enumerate(blocks):
        for key in parameters:
            if key.startswith(f"{block.name}."):
                parts = [single[sample][key] for sample in np.flatnonzero(plan.sample_masks[:, index])]
                wanted = torch.stack(parts).sum(0) / 6
                torch.testing.assert_close(found.pop(key), wanted, rtol=1e-4, atol=1e-6)
    assert all(gradient is None for gradient in found.values())


# What is computed


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_a_block_is_computed_on_the_samples_that_keep_it_and_no_others(name: str):
    model = build(name)
    blocks = find_residual_blocks(model)
    masks = random_masks(6, len(blocks))
    masks[:, 0], masks[:, 1] = True, False
    seen = [0] * len(blocks)

    def count(index: int):
        return lambda _module, args: seen.__setitem__(index, args[0].shape[0])

    for index, block in enumerate(blocks):
        norm = next(m for m in block.module.modules() if isinstance(m, nn.LayerNorm))
        norm.register_forward_pre_hook(count(index))
    with skip_samples(blocks, masks, CPU):
        model(**tiny_models.batch(6))
    assert seen == (~masks).sum(0).tolist()


@pytest.mark.parametrize("freezing", [False, True])
def test_groups_keep_the_memory_format_of_the_stream(freezing: bool):
    model = build("convnext")
    blocks = find_residual_blocks(model)
    masks = random_masks(6, len(blocks))
    masks[0], masks[1] = True, False
    found: dict[str, list[bool]] = {}

    def note(_module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found["inputs"].append(args[0].is_contiguous(memory_format=torch.channels_last))
        if output.requires_grad:
            output.register_hook(
                lambda gradient: found["gradients"].append(gradient.is_contiguous(memory_format=torch.channels_last))
            )

    for block in blocks:
        next(m for m in block.module.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(note)
    context = train_samples if freezing else skip_samples
    for run in (contextlib.nullcontext(), context(blocks, masks, CPU)):
        found.update(inputs=[], gradients=[])
        with run:
            model(**tiny_models.batch(6)).loss.backward()
        assert all(found["inputs"]) and all(found["gradients"]) and len(found["gradients"]) >= len(blocks)


@pytest.mark.parametrize("train_trunk", ["none", "head", "all"])
@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_arithmetic_falls_in_proportion(name: str, train_trunk: str):
    model = build(name).eval()
    model.set_attn_implementation("eager")
    blocks = find_residual_blocks(model)
    costs = measure_step_costs(model, blocks, train_trunk=train_trunk)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)), train_trunk=train_trunk)
    inputs = {"pixel_values": torch.randn(8, 3, model.config.image_size, model.config.image_size)}
    for step in range(4):
        with reuse.step(step, batch_size=8) as plan, flop_counter() as counter:
            model(**inputs).logits.sum().backward()
        model.zero_grad(set_to_none=True)
        assert plan.kind is (DEPTH, FREEZE)[step % 2]
        counted = counter.get_total_flops() / (8 * costs.vanilla)
        assert costs.share(plan) == pytest.approx(counted, rel=0.01)


def test_share_is_the_mean_over_samples_of_what_each_costs_alone():
    model = build("vit")
    blocks = find_residual_blocks(model)
    costs = measure_step_costs(model, blocks)
    masks = random_masks(5, len(blocks))
    alone = [costs.share(StepPlan(DEPTH, tuple(np.flatnonzero(mask)))) for mask in masks]
    assert costs.share(StepPlan(DEPTH, sample_masks=masks)) == pytest.approx(np.mean(alone), rel=1e-6)
