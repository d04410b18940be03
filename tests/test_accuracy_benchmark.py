"""The accuracy study: its variants of the method, equal arithmetic, resuming, and its tables; run small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import build, examples
from transformers import TrainerCallback

from hf_featreuse import StepKind, find_residual_blocks, measure_step_costs, skip_blocks, train_only

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import accuracy_report  # noqa: E402
import tasks  # noqa: E402
from variants import VariantConfig, VariantTrainer, mean_share  # noqa: E402


def options(folder, **changed) -> VariantConfig:
    settings = {"drop_rate": 0.5, "drop_rate_schedule": "uniform", "train_trunk": False, "max_steps": 4, "seed": 3}
    settings |= changed
    return VariantConfig(
        str(folder),
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        max_grad_norm=0.0,
        **settings,
    )


class Watch(TrainerCallback):
    """Gradients just before each optimizer step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.gradients.append(
            {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        )


class Batches(VariantTrainer):
    """Remembers the batches that were trained on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(inputs["pixel_values"].clone())
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(tmp_path, **changed):
    watch = Watch()
    trainer = Batches(build("vit"), options(tmp_path, **changed), train_dataset=examples(), callbacks=[watch])
    trainer.train()
    return trainer, watch


# Variants


def test_joined_gradients_are_those_of_the_thinned_and_of_the_whole_network(tmp_path):
    trainer, watch = train(tmp_path, join_gradients=True, max_steps=1)
    dropped_indices = trainer.feature_reuse.plan(0).dropped
    model = build("vit").train()
    blocks = find_residual_blocks(model)
    dropped = [blocks[index] for index in dropped_indices]
    assert 0 < len(dropped) < len(blocks)
    assert len(trainer.seen) == 2
    assert torch.equal(*trainer.seen)
    # The labels that belong to the batch.
    found = {example["pixel_values"].numpy().tobytes(): example["labels"] for example in examples()}
    labels = torch.tensor([found[image.numpy().tobytes()] for image in trainer.seen[0]])
    with skip_blocks(dropped):
        model(trainer.seen[0], labels=labels).loss.backward()
    with train_only(model, dropped, all_blocks=blocks):
        model(trainer.seen[0], labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, watch.gradients[0][name]), name


@pytest.mark.parametrize("second_batch", ["same", "fresh"])
def test_the_second_batch_is_the_first_again_or_a_fresh_one(tmp_path, second_batch):
    trainer, _ = train(tmp_path, second_batch=second_batch)
    assert [trainer.feature_reuse.plan(step).kind for step in range(2)] == [
        StepKind.STOCHASTIC_DEPTH,
        StepKind.MASKED_FREEZE,
    ]
    assert torch.equal(trainer.seen[0], trainer.seen[1]) == (second_batch == "same")
    assert not torch.equal(trainer.seen[1], trainer.seen[2])


def test_the_learning_rate_of_masked_freeze_steps_is_its_own(tmp_path):
    """With plain gradient descent the weights show it."""
    moved = {}
    for scale in (1.0, 4.0):
        trainer, watch = train(tmp_path, freeze_learning_rate=scale, optim="sgd", learning_rate=0.01, max_steps=2)
        block = trainer.feature_reuse.blocks[trainer.feature_reuse.plan(1).dropped[0]]
        name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if n.startswith(block.name))
        start = dict(build("vit").named_parameters())[name]
        # The block was dropped in the first step, so that only the second has moved it.
        assert watch.gradients[0][name] is None
        moved[scale] = (parameter - start).detach()
    assert moved[1.0].abs().max() > 0
    assert torch.allclose(moved[4.0], 4 * moved[1.0], rtol=1e-3, atol=5e-7)


def test_mean_share_counts_both_passes_of_a_joined_step(tmp_path):
    model = build("vit")
    blocks = find_residual_blocks(model)
    costs = measure_step_costs(model, blocks)
    alone = mean_share(options(tmp_path, masked_freeze_steps=0), costs, len(blocks), 500)
    frozen = mean_share(options(tmp_path, stochastic_depth_steps=0), costs, len(blocks), 500)
    joined = mean_share(options(tmp_path, join_gradients=True), costs, len(blocks), 500)
    vanilla = mean_share(options(tmp_path, stochastic_depth_steps=0, masked_freeze_steps=0), costs, len(blocks), 500)
    assert vanilla == 1
    # A cycle that drops nothing is one plain step in all three.
    empty = 0.5 ** len(blocks)
    assert joined == pytest.approx(alone + frozen - empty, rel=0.05)


# Data


def test_training_images_are_shifted_alike_for_every_arm_and_test_images_not_at_all():
    images = tasks.Images(torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8), torch.arange(20))
    draws = [[tasks.ShiftedImages(images, 2, seed=5)[index]["pixel_values"] for index in range(20)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    plain = [images[index]["pixel_values"] for index in range(20)]
    assert sum(torch.equal(a, b) for a, b in zip(draws[0], plain, strict=True)) < 10
    assert all(image.shape == (3, 16, 16) for image in draws[0])


def test_validation_never_looks_at_test_images_and_classes_are_numbered_anew():
    task = tasks.TASKS["digits"]
    train, validation = tasks.load(task, 0, "validation", None)
    _, test = tasks.load(task, 0, "test", None)
    held_out = {pixels.numpy().tobytes() for pixels in validation.pixels}
    assert len(train) + len(validation) == 1437
    assert not held_out & {pixels.numpy().tobytes() for pixels in train.pixels}
    assert len(held_out & {pixels.numpy().tobytes() for pixels in test.pixels}) == 0
    again = tasks.load(task, 1, "validation", None)[1]
    assert torch.equal(again.pixels, validation.pixels)
    some = train.of_classes((2, 5, 7))
    assert set(some.labels.tolist()) == {0, 1, 2}
    assert len(some) == sum((train.labels == label).sum() for label in (2, 5, 7))


# The command


@pytest.fixture
def command(tmp_path):
    """Run the benchmark as a user does; give what it printed and all its lines."""
    out = tmp_path / "new" / "results.jsonl"

    def run(*arguments: str) -> tuple[str, list[dict]]:
        command = [sys.executable, str(BENCHMARKS / "accuracy.py"), "--out", str(out), "--jobs", "2", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, [json.loads(line) for line in out.read_text().splitlines()]

    return run


@pytest.mark.slow
def test_runs_are_resumed_and_equal_in_arithmetic(command, tmp_path, monkeypatch):
    arguments = ("--tasks", "digits-few", "--models", "vit", "--steps", "12")
    said, first = command(*arguments, "--arms", "vanilla", "stochastic_depth", "--seeds", "0")
    assert "3 runs to do, 0 done before" in said
    assert {(run["arm"], run["budget"]) for run in first} == {
        ("vanilla", "steps"),
        ("stochastic_depth", "steps"),
        ("stochastic_depth", "arithmetic"),
    }
    said, both = command(*arguments, "--arms", "vanilla", "stochastic_depth", "feature_reuse", "--seeds", "0", "1")
    assert "7 runs to do, 3 done before" in said
    assert both[:3] == first
    for run in both:
        assert 0 <= run["accuracy"] <= 1
        assert len(run["accuracy_without_block"]) == 6
        if run["budget"] == "arithmetic":
            assert run["trained_steps"] * run["compute_share"] == pytest.approx(12, abs=1.5)
            assert run["trained_steps"] > 12
        else:
            assert run["trained_steps"] == 12
    monkeypatch.setattr(accuracy_report, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(accuracy_report, "ROOT", tmp_path)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    accuracy_report.PAGE.write_text(f"before\n{accuracy_report.BEGIN}\nold\n{accuracy_report.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path / "new" / "results.jsonl"), "--steps", "12"])
    accuracy_report.main()
    page = accuracy_report.PAGE.read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    assert page.count("| feature reuse | equal arithmetic |") == 1
    assert (tmp_path / "docs" / "images" / "accuracy.png").stat().st_size > 5000


def test_an_interval_is_students(tmp_path):
    mean, half = accuracy_report.interval([1.0, 2.0, 3.0])
    # t with 2 degrees of freedom at 97.5 % is 4.3027; the standard error is 1 / sqrt(3).
    assert mean == 2
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
