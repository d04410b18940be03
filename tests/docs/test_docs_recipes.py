"""The loops of docs/recipes.md run, and the flags of its table exist."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import batch, build

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, find_residual_blocks

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(block):
    model = build("vit").train()
    reuse = FeatureReuse(model, find_residual_blocks(model), FeatureReuseSchedule(4, seed=5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.classifier.weight.detach().clone()
    names = {"model": model, "reuse": reuse, "optimizer": optimizer, "loader": [batch(seed=seed) for seed in range(4)]}
    exec(block, names)
    assert not torch.equal(model.classifier.weight, before)
    return names


def test_a_loop_with_mixing():
    assert 0 < run(BLOCKS[0])["share"] < 1


def test_any_random_transform():
    names = {}
    exec(BLOCKS[1], names)
    images = [Image.radial_gradient("L").convert("RGB").crop((0, 0, 200, 90))] * 2
    first, second = names["transform"].batch(images, np.array([3, 4]), epoch=0)
    assert first.shape == (3, 32, 32)
    assert not torch.equal(first, second)
    assert torch.equal(names["transform"](images[0], row=3), first)


def test_a_loop_with_an_average():
    names = run(BLOCKS[2])
    weight = names["model"].classifier.weight
    assert not torch.equal(names["average"].state_dict()["classifier.weight"], weight)
    assert not names["model"].training


def test_a_loss():
    model = build("vit").train()
    names = {"model": model, "batch": batch()}
    exec(BLOCKS[3], names)
    assert names["value"].requires_grad
    assert 0 < names["value"].item() < 10


def test_learning_rates_by_layer():
    names = {"model": build("vit")}
    exec(BLOCKS[4], names)
    rates = {group["lr"] for group in names["optimizer"].param_groups}
    assert max(rates) == 1e-3
    assert min(rates) == pytest.approx(1e-3 * 0.75**5)


def test_no_block_is_left_out():
    assert len(BLOCKS) == 5


def test_the_flags_of_the_table_and_their_defaults_are_the_examples():
    from hf_featreuse.program import parse_arguments

    options = parse_arguments(["--use_cpu"])
    data_args, args = options.data, options.training
    table = PAGE[PAGE.index("| flag |") : PAGE.index("```bash")]
    flags = re.findall(r"`--(\w+)`", table)
    assert len(flags) == 8
    values = {flag: getattr(data_args if hasattr(data_args, flag) else args, flag) for flag in flags}
    assert values == {
        "mixup_alpha": 0.0,
        "cutmix_alpha": 0.0,
        "label_smoothing_factor": 0.0,
        "rand_augment_ops": 0,
        "rand_augment_magnitude": 9,
        "augmentation": None,
        "random_erasing": 0.0,
        "ema_decay": None,
    }
