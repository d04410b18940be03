"""What a step per sample asks of a device, counted on a CPU: operators, copies, waits, sizes of groups."""

import contextlib

import numpy as np
import pytest
import torch
from operators import Operators
from sample_checks import sample_schedule
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

from hf_featreuse import FeatureReuse, find_residual_blocks
from hf_featreuse.method.per_sample import index_rows

# Of the layers of a ViT-B and a ConvNeXt-T.
VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
)
CONVNEXT = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[3, 3, 9, 3])
MODELS = {"vit": (ViTForImageClassification, VIT), "convnext": (ConvNextForImageClassification, CONVNEXT)}
STEPS = {"stochastic depth": 0, "masked freeze": 1}
# What makes the host wait for a device, or adds where a copy would do.
WAITS = {"nonzero", "_local_scalar_dense", "is_nonzero", "equal", "masked_select", "unique2"}
ADDS = {"index_add", "index_add_", "index_put", "index_put_", "_index_put_impl_", "index", "scatter_add"}


def counted(name: str, step: int | None, granularity: str = "sample", last: bool = False, **options) -> Operators:
    """The operators of forward and backward of one step; `None` is a plain one."""
    torch.manual_seed(0)
    cls, config = MODELS[name]
    model = cls(config).train()
    images, labels = torch.randn(32, 3, 32, 32), torch.zeros(32, dtype=torch.long)
    if last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    blocks = find_residual_blocks(model)
    schedule = sample_schedule(len(blocks))
    schedule.drop_granularity = granularity
    reuse = FeatureReuse(model, blocks, schedule, **options)
    # In the first step of each kind it is seen that blocks do not mix samples, and which buffers change.
    for _ in range(2):
        with Operators() as operators:
            with contextlib.nullcontext() if step is None else reuse.step(step, batch_size=32):
                model(pixel_values=images, labels=labels).loss.backward()
        model.zero_grad(set_to_none=True)
    return operators


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("name", "bound"), [("vit", 1.15), ("convnext", 1.3)])
def test_stochastic_depth_per_sample_takes_few_more_operators_than_a_plain_step(name, bound, last):
    plain = counted(name, None, last=last).total
    assert counted(name, 0, last=last).total <= bound * plain
    # Per batch, dropped blocks are not called.
    assert counted(name, 0, "batch", last=last).total < 0.8 * plain


@pytest.mark.parametrize(("name", "bound"), [("vit", 1.7), ("convnext", 1.8)])
def test_masked_freeze_per_sample_calls_each_layer_twice(name, bound):
    plain = counted(name, None).total
    for trunk in ("all", "head", "none"):
        assert counted(name, 1, train_trunk=trunk).total <= bound * plain
        assert counted(name, 1, "batch", train_trunk=trunk).total < plain


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("name", MODELS)
def test_the_host_never_waits_and_gradients_are_copied(name, granularity, step):
    plain, counts = counted(name, None).counts, counted(name, step, granularity).counts
    for operator in WAITS | ADDS:
        assert counts[operator] <= plain[operator], operator
    # The embeddings of no model here are looked up.
    assert not WAITS & set(counts) and not {"index_add", "index_add_", "index_put", "index_put_"} & set(counts)


def test_all_indices_go_to_the_device_in_one_copy():
    masks = np.random.default_rng(0).random((32, 12)) < 0.5
    with Operators() as operators:
        rows = index_rows(masks, torch.device("meta"))
    assert operators.counts["_to_copy"] == 1 and operators.total <= 5
    assert len(rows) == 12 and all(row.device.type == "meta" for pair in rows for row in pair)
    for block, (dropped, kept) in enumerate(index_rows(masks, torch.device("cpu"))):
        assert torch.equal(dropped, torch.from_numpy(np.flatnonzero(masks[:, block])))
        assert torch.equal(kept, torch.from_numpy(np.flatnonzero(~masks[:, block])))


def sizes_of(schedule, batches) -> list[set[int]]:
    """The numbers of samples that drop each block in 200 steps with these numbers of samples."""
    sizes: list[set[int]] = [set() for _ in range(schedule.num_blocks)]
    for step in range(200):
        masks = schedule.plan(step, batch_size=batches[step % len(batches)]).sample_masks
        for of_block, count in zip(sizes, masks.sum(0).tolist(), strict=True):
            of_block.add(count)
    return sizes


@pytest.mark.parametrize("rates", ["linear", "uniform"])
@pytest.mark.parametrize(("samples", "bound"), [(64, 1), (48, 1), (16, 1), (8, 2), (24, 2), (4, 2), (2, 2)])
def test_a_block_sees_one_or_two_sizes(samples, bound, rates):
    schedule = sample_schedule(12, drop_rate=0.5, drop_rate_schedule=rates)
    found = sizes_of(schedule, [samples])
    assert max(map(len, found)) <= bound
    # As many samples as the rate says, to a whole number.
    for rate, of_block in zip(schedule.rates, found, strict=True):
        assert all(abs(size - rate * samples) < 1 for size in of_block)


@pytest.mark.parametrize("last", [36, 13, 8, 1])
def test_a_smaller_last_batch_adds_a_few(last):
    schedule = sample_schedule(12, drop_rate=0.5, drop_rate_schedule="linear")
    assert max(map(len, sizes_of(schedule, [64] * 9 + [last]))) <= 5


@pytest.mark.parametrize("trunk", ["all", "head", "none"])
def test_with_any_trunk_a_block_is_called_with_the_samples_that_it_trains_and_with_all_others(trunk):
    model = ViTForImageClassification(VIT).train()
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)), train_trunk=trunk)
    seen: list[set[int]] = [set() for _ in blocks]
    for index, block in enumerate(blocks):
        block.module.layernorm_before.register_forward_pre_hook(
            lambda _module, args, index=index: seen[index].add(len(args[0]))
        )
    for step in (1, 3, 5, 7):
        with reuse.step(step, batch_size=16):
            model(torch.zeros(16, 3, 32, 32)).logits.sum().backward()
        model.zero_grad(set_to_none=True)
    # Half of the samples each. Two are looked at in the first call, to see that a block does not mix samples.
    assert all(sizes - {2} == {8} for sizes in seen)
