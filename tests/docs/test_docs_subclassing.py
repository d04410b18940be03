"""Every code block of docs/subclassing.md runs, and does what the page says of it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import batch, build, examples
from training_runs import losses

import hf_featreuse
from hf_featreuse import StepKind, skip_blocks

PAGE = Path(__file__).parents[2] / "docs" / "subclassing.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
NAMES = [re.search(r"trainer = (\w+)\(", block)[1] for block in BLOCKS]


class QuietConfig(hf_featreuse.FeatureReuseConfig):
    """The config of the page, small and quiet."""

    def __init__(self, output_dir, **options):
        quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
        super().__init__(output_dir, per_device_train_batch_size=4, **quiet, **options)


def run(name, tmp_path, monkeypatch):
    """The names that a block leaves behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf_featreuse, "FeatureReuseConfig", QuietConfig)
    found = {"model": build("vit"), "train": examples()}
    exec(compile(BLOCKS[NAMES.index(name)], str(PAGE), "exec"), found)
    assert len(losses(found["trainer"])) == found["trainer"].args.max_steps
    return found["trainer"], found


def test_every_block_of_the_page_is_run_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(BLOCKS) == len(set(NAMES)) == 7
    assert [name for name in NAMES if f'run("{name}"' not in source] == []


def test_a_loss_function_goes_with_mixup(tmp_path, monkeypatch):
    trainer, names = run("FeatureReuseTrainer", tmp_path, monkeypatch)
    assert trainer.args.mixup_alpha == 0.2
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 0])
    expected = torch.nn.functional.cross_entropy(logits, labels, weight=torch.tensor([1.0, 1, 4]), reduction="none")
    outputs = type("Outputs", (), {"logits": logits})
    torch.testing.assert_close(names["weighted_loss"](outputs, labels), expected.mean())
    torch.testing.assert_close(names["weighted_loss"](outputs, labels, 10), expected.sum() / 10)


def test_a_loss_in_compute_loss(tmp_path, monkeypatch):
    trainer, _ = run("ConfidenceTrainer", tmp_path, monkeypatch)
    assert {"loss/stochastic_depth", "loss/masked_freeze"} & {key for log in trainer.state.log_history for key in log}


def share_over_survival(schedule, steps):
    """Mean over the stochastic-depth steps of each block's mask, divided by its survival probability."""
    plans = [plan for plan in map(schedule.plan, range(steps)) if plan.kind is StepKind.STOCHASTIC_DEPTH]
    kept = np.ones((len(plans), schedule.num_blocks))
    for row, plan in zip(kept, plans, strict=True):
        row[list(plan.dropped)] = 0
    return (kept / np.array([plan.survival for plan in plans])).mean(0)


def test_a_rate_that_rises(tmp_path, monkeypatch, caplog):
    trainer, _ = run("RisingTrainer", tmp_path, monkeypatch)
    assert trainer.feature_reuse.scale_kept
    assert "survival" not in caplog.text
    plans = [trainer.feature_reuse.schedule.plan(step) for step in range(40)]
    assert all(len({plan.dropped for plan in plans[first : first + 4]}) == 1 for first in range(0, len(plans), 4))
    logged = [log["dropped_blocks"] for log in trainer.state.log_history if "dropped_blocks" in log]
    assert logged == [plan.mean_dropped for plan in plans]
    long = trainer.get_schedule(4, 20000)
    means = [sum(long.plan(s).mean_dropped for s in range(4000 * i, 4000 * i + 4000)) / 4000 for i in range(5)]
    # Linear over depth: the mean of the rates is 0.6 * (1/4 + ... + 1) / 4 of the stage.
    assert means == pytest.approx([0.3 * stage for stage in range(1, 6)], rel=0.07)
    last = [1 - 0.6 * (block + 1) / 4 for block in range(4)]
    assert long.plan(19998).survival == pytest.approx(last)
    assert share_over_survival(long, 20000) == pytest.approx([1] * 4, rel=0.03)


def test_a_fixed_number_of_blocks(tmp_path, monkeypatch, caplog):
    trainer, _ = run("FixedCountTrainer", tmp_path, monkeypatch)
    assert "survival" not in caplog.text
    plans = [trainer.feature_reuse.schedule.plan(step) for step in range(12)]
    assert {(plan.kind, len(plan.dropped)) for plan in plans} == {
        (StepKind.STOCHASTIC_DEPTH, 2),
        (StepKind.MASKED_FREEZE, 2),
    }
    assert all(len({plan.dropped for plan in plans[first : first + 4]}) == 1 for first in range(0, len(plans), 4))
    assert len({plan.dropped for plan in plans}) > 1
    long = trainer.get_schedule(4, 16000)
    assert share_over_survival(long, 16000) == pytest.approx([1] * 4, rel=0.05)
    # The trainer's engine scales by the plan.
    reuse, images = trainer.feature_reuse, batch()["pixel_values"]
    first, second = (index for index in range(4) if index not in plans[0].dropped)
    with torch.no_grad():
        with reuse.step(0):
            scaled = trainer.model(images).logits
        dropped = [reuse.blocks[index] for index in plans[0].dropped]
        with skip_blocks(dropped, kept=[reuse.blocks[first], reuse.blocks[second]], survival=[0.5, 0.5]):
            assert torch.equal(trainer.model(images).logits, scaled)
        with skip_blocks(dropped):
            assert not torch.allclose(trainer.model(images).logits, scaled)


def test_blocks_chosen_by_gradient(tmp_path, monkeypatch, caplog):
    trainer, names = run("GradientTrainer", tmp_path, monkeypatch)
    assert "survival" not in caplog.text
    schedule = trainer.feature_reuse.schedule
    assert all(norm > 0 for norm in schedule.norms)
    plans = [schedule.plan(step) for step in range(12)]
    assert {plan.kind for plan in plans} >= {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE}
    assert all(len(plan.dropped) == 1 for plan in plans if plan.kind is not StepKind.VANILLA)
    assert len({plan.dropped for plan in plans}) > 1
    smallest = min(range(4), key=schedule.norms.__getitem__)
    free = next(step for step in range(12, 99) if schedule.plan(step).kind is not StepKind.VANILLA)
    assert schedule.plan(free).dropped == (smallest,)
    # With the default, the page says, nothing is scaled either, with one warning.
    args = QuietConfig(str(tmp_path / "default"), max_steps=6)
    names["GradientTrainer"](build("vit"), args, train_dataset=examples()).train()
    assert caplog.text.count("have no `survival`") == 1


def test_the_later_half_of_the_blocks(tmp_path, monkeypatch):
    trainer, _ = run("LaterHalfTrainer", tmp_path, monkeypatch)
    assert [block.name for block in trainer.feature_reuse.blocks] == ["vit.layers.2", "vit.layers.3"]


def test_blocks_found_with_inputs_of_ones_own(tmp_path, monkeypatch):
    trainer, _ = run("OwnInputsTrainer", tmp_path, monkeypatch)
    assert len(trainer.feature_reuse.blocks) == 4
