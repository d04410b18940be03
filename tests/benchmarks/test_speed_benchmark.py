"""The benchmarks of speed, run small: what they count, and that the page shows what was measured."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import batch, build

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, find_residual_blocks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import images  # noqa: E402
import performance  # noqa: E402
import speed  # noqa: E402
from overhead import step_memory  # noqa: E402
from transformers.models.beit.modeling_beit import BeitDropPath  # noqa: E402

SMALL = ["--config_overrides", "hidden_size=16,num_hidden_layers=4,num_attention_heads=2", "--image_size", "8"]
SMALL += ["--batch_size", "4", "--rounds", "2", "--steps", "5", "--drop_rate", "0.5", "--cpu"]


@pytest.mark.slow
def test_both_grains_and_drop_path_are_timed_in_one_run(capsys):
    options = speed.make_parser().parse_args([*SMALL, "--granularity", "batch", "sample", "--peers"])
    found = {**speed.described(options), **speed.measure(options)}
    steps = {row: len(times) for row, times in found["seconds"].items()}
    # Four steps of a round count, after one that warms up.
    for row in ("Trainer", "transformers DropPath", "FeatureReuseTrainer", "FeatureReuseTrainer by sample"):
        assert steps[row] == 8
    by_sample = ("stochastic_depth by sample", "masked_freeze by sample")
    assert sum(steps[row] for row in by_sample) == 8
    for row, bounds in found["bounds"].items():
        assert all(0 < bound <= 1 for bound in bounds), row
    table = speed.table(found)
    assert table.count("\n") == 1 + len([row for row in speed.ROWS if row in steps])
    assert "| FeatureReuseTrainer by sample |" in table
    assert found["memory"]["stochastic_depth"] < found["memory"]["Trainer"]
    assert set(found["overhead ms"]) == {"FeatureReuseTrainer", "FeatureReuseTrainer by sample"}
    json.dumps(found)


def test_drop_path_of_another_library_masks_whole_branches_of_samples():
    torch.manual_seed(0)
    model = build("vit").train()
    masked = speed.with_drop_path(model, [0.999999] * len(find_residual_blocks(model)), BeitDropPath)
    inputs = batch()["pixel_values"]
    with FeatureReuse(
        model,
        blocks := find_residual_blocks(model),
        FeatureReuseSchedule(len(blocks), 0.999999, "uniform", masked_freeze_steps=0),
    ).step(0) as plan:
        assert len(plan.dropped) == len(blocks)
        expected = model(inputs).logits
    assert torch.allclose(masked(inputs).logits, expected)


def test_memory_of_a_step_that_drops_every_block_is_that_of_the_trunk():
    model = build("vit").train()
    blocks = find_residual_blocks(model)
    nearly_all = FeatureReuseSchedule(len(blocks), 0.999999, "uniform", masked_freeze_steps=0)
    none = FeatureReuseSchedule(0, stochastic_depth_steps=0, masked_freeze_steps=0)
    data = batch()
    thin = step_memory(model, FeatureReuse(model, blocks, nearly_all), 0, data)
    assert thin < step_memory(model, FeatureReuse(model, [], none), 0, data) / 2
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_images_are_read_as_files_and_every_stage_is_timed(tmp_path, monkeypatch, capsys):
    arguments = ["--images", "8", "--batch_size", "2", "--rounds", "1", "--steps", "3", "--workers", "0"]
    arguments += ["--config_overrides", "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,patch_size=56"]
    monkeypatch.setattr(images, "SECONDS", 0.05)
    monkeypatch.setattr(sys, "argv", ["images.py", *arguments, "--json", str(tmp_path / "new" / "images.json")])
    images.main()
    found = json.loads((tmp_path / "new" / "images.json").read_text())
    stages = found["stages"]
    assert stages["all of these"] < min(stages["decode"], stages["crop, resize, flip"])
    assert set(found["seconds"]) == {"memory", "files, 0 workers"}
    assert images.tables(found) in capsys.readouterr().out


def test_the_page_shows_what_was_measured():
    found = performance.load()
    assert set(found) == set(performance.CASES)
    assert performance.page(found) in performance.PAGE.read_text(encoding="utf-8")
