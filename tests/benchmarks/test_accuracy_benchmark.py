"""The accuracy study: its variants of the method, equal arithmetic, resuming, and its tables; run small."""

import argparse
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_models import build, examples
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_featreuse import (
    FeatureReuseArguments,
    StepKind,
    find_residual_blocks,
    measure_step_costs,
    skip_blocks,
    train_only,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import accuracy  # noqa: E402
import accuracy_report  # noqa: E402
import accuracy_tables  # noqa: E402
import tasks  # noqa: E402
from variants import VariantConfig, VariantTrainer, mean_share  # noqa: E402


def options(folder, **changed) -> VariantConfig:
    settings = {"stochastic_depth_steps": 1, "drop_rate": 0.5, "drop_rate_schedule": "uniform", "train_trunk": "none"}
    settings |= {"max_steps": 4, "seed": 3, **changed}
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


def thinned(model, blocks, plan):
    """The model as a stochastic-depth step of the plan runs it."""
    kept = [index for index in range(len(blocks)) if index not in plan.dropped]
    return skip_blocks(
        [blocks[index] for index in plan.dropped],
        kept=[blocks[index] for index in kept],
        survival=[plan.survival[index] for index in kept],
    )


def labels_of(images):
    """The labels that belong to a batch."""
    found = {example["pixel_values"].numpy().tobytes(): example["labels"] for example in examples()}
    return torch.tensor([found[image.numpy().tobytes()] for image in images])


def taught(output, teacher, weight):
    """The loss of a pass whose logits are taught by those of another one."""
    soft = torch.nn.functional.cross_entropy(output.logits, teacher.detach().softmax(-1))
    return (1 - weight) * output.loss + weight * soft


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("train_trunk", ["none", "head", "all"])
def test_joined_gradients_are_those_of_the_thinned_and_of_the_whole_network(tmp_path, train_trunk, weight):
    trainer, watch = train(tmp_path, join_gradients=True, max_steps=1, train_trunk=train_trunk, distillation=weight)
    plan = trainer.feature_reuse.plan(0)
    model = build("vit").train()
    blocks = find_residual_blocks(model)
    assert 0 < len(plan.dropped) < len(blocks)
    assert len(trainer.seen) == 2
    assert torch.equal(*trainer.seen)
    images, labels = trainer.seen[0], labels_of(trainer.seen[0])
    with train_only(model, [blocks[i] for i in plan.dropped], train_trunk=train_trunk, all_blocks=blocks):
        whole = model(images, labels=labels)
        whole.loss.backward()
    with thinned(model, blocks, plan):
        taught(model(images, labels=labels), whole.logits, weight).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, watch.gradients[0][name], rtol=1e-5, atol=1e-7), name


def test_a_joined_step_that_drops_nothing_is_one_scaled_pass(tmp_path):
    trainer, watch = train(tmp_path, join_gradients=True, max_steps=1, drop_rate=1e-9, distillation=0.5)
    plan = trainer.feature_reuse.plan(0)
    assert (plan.kind, plan.dropped) == (StepKind.STOCHASTIC_DEPTH, ())
    assert len(trainer.seen) == 1
    model = build("vit").train()
    model(trainer.seen[0], labels=labels_of(trainer.seen[0])).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, watch.gradients[0][name], rtol=1e-5, atol=1e-7), name
    costs = measure_step_costs(trainer.model, trainer.feature_reuse.blocks)
    assert mean_share(trainer.args, costs, len(trainer.feature_reuse.blocks), 10) == 1


def test_a_plain_step_teaches_the_thinned_step_that_follows_on_its_batch(tmp_path):
    cycle = {"vanilla_steps": 1, "masked_freeze_steps": 0, "second_batch": "same"}
    trainer, watch = train(tmp_path, **cycle, distillation=0.3, learning_rate=0.0, max_steps=4)
    blocks = find_residual_blocks(model := build("vit").train())
    for first in (0, 2):
        images, labels = trainer.seen[first], labels_of(trainer.seen[first])
        assert torch.equal(images, trainer.seen[first + 1])
        plan = trainer.feature_reuse.plan(first + 1)
        assert plan.kind is StepKind.STOCHASTIC_DEPTH
        model.zero_grad()
        whole = model(images, labels=labels)
        whole.loss.backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter.grad, watch.gradients[first][name], rtol=1e-5, atol=1e-7), name
        model.zero_grad()
        with thinned(model, blocks, plan):
            taught(model(images, labels=labels), whole.logits, 0.3).backward()
        for name, parameter in model.named_parameters():
            found = watch.gradients[first + 1][name]
            assert (found is None) == (parameter.grad is None)
            assert found is None or torch.allclose(parameter.grad, found, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("second_batch", ["same", "fresh"])
@pytest.mark.parametrize("vanilla_steps", [0, 1])
def test_the_steps_of_a_cycle_have_one_batch_or_fresh_ones(tmp_path, second_batch, vanilla_steps):
    steps = 2 + vanilla_steps
    trainer, _ = train(tmp_path, second_batch=second_batch, vanilla_steps=vanilla_steps, max_steps=2 * steps)
    kinds = [trainer.feature_reuse.plan(step).kind for step in range(steps)]
    assert kinds == [StepKind.VANILLA] * vanilla_steps + [StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE]
    for step in range(1, steps):
        assert torch.equal(trainer.seen[step - 1], trainer.seen[step]) == (second_batch == "same")
    assert not torch.equal(trainer.seen[steps - 1], trainer.seen[steps])


def test_outside_the_window_every_step_has_a_fresh_batch(tmp_path):
    trainer, _ = train(tmp_path, second_batch="same", reuse_start=0.5, max_steps=4)
    same = [torch.equal(one, other) for one, other in zip(trainer.seen, trainer.seen[1:], strict=False)]
    assert same == [False, False, True]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"distillation": 0.5}, "needs a full pass over the same batch first"),
        ({"distillation": 0.5, "vanilla_steps": 1}, "needs a full pass over the same batch first"),
        ({"distillation": 1.5, "join_gradients": True}, "is not a weight"),
        ({"join_gradients": True, "drop_granularity": "sample"}, "needs one set per batch"),
        ({"second_batch": "other"}, "Pass 'fresh' or 'same'"),
    ],
)
def test_variants_that_mean_nothing_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **changed)


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
    # A cycle that drops nothing costs one plain step in all three.
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


def test_a_batch_of_shifted_images_has_the_draws_of_one_after_the_other():
    images = tasks.Images(torch.arange(6 * 3 * 25, dtype=torch.uint8).reshape(6, 3, 5, 5), torch.arange(6))
    single, batched = (tasks.ShiftedImages(images, 2, seed=5) for _ in range(2))
    for rows in ([0, 3, 5, 1], [2], [4, 4, 0, 1, 2]):
        expected, found = [single[row] for row in rows], batched.__getitems__(rows)
        for first, second in zip(expected, found, strict=True):
            assert torch.equal(first["pixel_values"], second["pixel_values"])
            assert first["labels"] == second["labels"]


def test_augmentations_follow_each_other_in_a_batch_too():
    class Add:
        def __init__(self, value):
            self.value = value

        def __call__(self, found, rows, epoch):
            assert len(found) == len(rows) == 1
            return [found[0].point(lambda pixel: pixel + self.value)]

    images = tasks.Images(torch.zeros(2, 3, 5, 5, dtype=torch.uint8), torch.arange(2))
    shifted = tasks.ShiftedImages(images, 2, seed=5)
    shifted.augments = [Add(1), Add(2)]
    for found in shifted.__getitems__([0, 1]):
        assert (found["pixel_values"] == tasks.scaled(torch.tensor(3))).all()


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


# Which runs there are


def keys(arms, **asked) -> dict[str, list[str]]:
    """What identifies the runs that a command plans, by arm."""
    defaults = {
        "seeds": [0],
        "tasks": ["digits"],
        "models": ["vit"],
        "options": [""],
        "recipes": [""],
        "budgets": ["steps"],
    }
    planned = accuracy.planned(argparse.Namespace(**{**defaults, **asked}, arms=arms, split="test", steps=None))
    return {arm: [run.key for run in planned if run.arm == arm] for arm in arms}


def test_runs_are_known_by_every_option_of_the_method_and_the_recipe():
    arms = ["vanilla", "feature_reuse"]
    plain = keys(arms)
    assert json.loads(plain["feature_reuse"][0])["method"].keys() >= {
        "scale_kept",
        "drop_rate_over_time",
        "distillation",
    }
    # Plain training has none of the options of the method.
    changed = keys(arms, options=["", "drop_rate=0.3", "drop_rate=0.5"])
    assert changed["vanilla"] == plain["vanilla"]
    assert changed["feature_reuse"][0] == changed["feature_reuse"][2] == plain["feature_reuse"][0]
    assert changed["feature_reuse"][1] != plain["feature_reuse"][0]
    recipes = keys(arms, recipes=["learning_rate=1e-3", "learning_rate=2e-3", "label_smoothing=0.1"])
    for arm in arms:
        assert recipes[arm][0] == plain[arm][0]
        assert len({*recipes[arm]}) == 3
    # An option has one spelling.
    spellings = keys(arms, options=["train_trunk=true", "train_trunk=all", "train_trunk=false", "train_trunk=none"])
    assert len({*spellings["feature_reuse"]}) == 2
    assert spellings["feature_reuse"][1] == plain["feature_reuse"][0]


def test_a_changed_default_makes_other_runs_except_plain_ones(monkeypatch):
    arms = ["vanilla", "stochastic_depth", "feature_reuse"]
    before, asked = keys(arms), keys(arms, options=["drop_rate=0.2"])

    @dataclass
    class Changed(FeatureReuseArguments):
        drop_rate: float = 0.2

    monkeypatch.setattr(accuracy, "FeatureReuseArguments", Changed)
    after = keys(arms)
    assert after["vanilla"] == before["vanilla"]
    for arm in arms[1:]:
        assert after[arm] == asked[arm] != before[arm]


def test_a_line_of_older_code_is_the_run_with_the_options_of_today(tmp_path):
    line = json.loads(keys(["feature_reuse"])["feature_reuse"][0])
    del line["method"]["distillation"]
    line["method"]["train_trunk"] = True
    (tmp_path / "lines.jsonl").write_text(json.dumps(line) + "\n")
    (read,) = accuracy.read(tmp_path / "lines.jsonl")
    assert accuracy.Run(**read).key == keys(["feature_reuse"])["feature_reuse"][0]
    assert accuracy.read(tmp_path / "none.jsonl") == []


# The command


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Run the benchmark as a user does; give what it printed and all its lines."""
    folder = tmp_path_factory.mktemp("study")
    out = folder / "new" / "results.jsonl"

    def run(*arguments: str) -> tuple[str, list[dict]]:
        command = [sys.executable, str(BENCHMARKS / "accuracy.py"), "--out", str(out), "--jobs", "2", "--steps", "12"]
        command += ["--tasks", "digits-few", "--models", "vit", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, [json.loads(line) for line in out.read_text().splitlines()]

    said = [run("--arms", "vanilla", "stochastic_depth", "--seeds", "0", "--keep", str(folder / "kept"))]
    said.append(run("--arms", "vanilla", "feature_reuse", "--seeds", "0", "1"))
    search = ("--split", "validation", "--seeds", "100", "--budgets", "steps", "--arms", "vanilla", "feature_reuse")
    recipes = ("--recipes", "", "learning_rate=2e-3", "weight_decay=0.3")
    said.append(run(*search, "--options", "", "drop_rate=0.2", *recipes))
    return out, said


@pytest.mark.slow
def test_runs_are_resumed_and_equal_in_arithmetic(study):
    _, ((first_said, first), (second_said, both), _) = study
    assert "3 runs to do, 0 already done" in first_said
    assert {(run["arm"], run["budget"]) for run in first} == {
        ("vanilla", "steps"),
        ("stochastic_depth", "steps"),
        ("stochastic_depth", "arithmetic"),
    }
    assert "5 runs to do, 1 already done" in second_said
    assert both[:3] == first
    for run in both:
        assert 0 <= run["accuracy"] <= 1
        if run["budget"] == "arithmetic":
            assert run["trained_steps"] * run["compute_share"] == pytest.approx(12, abs=1.5)
            assert run["trained_steps"] > 12
        else:
            assert run["trained_steps"] == 12


@pytest.mark.slow
def test_a_line_has_the_commit_and_the_accuracy_without_blocks(study):
    out, (_, _, (_, lines)) = study
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    for run in lines:
        assert run["commit"] == "unknown" if head.returncode else head.stdout.startswith(run["commit"].rstrip("+"))
        assert len(run["commit"]) >= 7
        assert set(run["recipe"]) == set(tasks.RECIPE)
        assert len(run["accuracy_without_block"]) == 6
        # A quarter of six blocks is one block.
        assert run["accuracy_without_last_quarter"] == run["accuracy_without_block"][-1]
    model = AutoModelForImageClassification.from_pretrained(out.parents[1] / "kept" / "digits-few-vit-vanilla-steps-0")
    blocks = find_residual_blocks(model.eval())
    _, test = tasks.load(tasks.TASKS["digits-few"], 0, "test", None)
    images = torch.stack([test[index]["pixel_values"] for index in range(len(test))])

    def measured(dropped):
        with skip_blocks(dropped), torch.inference_mode():
            return round((model(images).logits.argmax(-1) == test.labels).float().mean().item(), 4)

    run = next(line for line in lines if line["arm"] == "vanilla" and line["split"] == "test")
    assert run["accuracy_of_these_images"] == measured([])
    assert run["accuracy_without_block"] == [measured([block]) for block in blocks]
    assert run["accuracy_without_last_half"] == measured(blocks[3:])


def test_runs_that_started_from_different_models_are_not_compared():
    run, same, other = (
        {"accuracy": value, "start_model": start} for value, start in ((0.5, "a"), (0.4, "a"), (0.3, "b"))
    )
    assert accuracy_tables.differences({0: run, 1: run}, {0: same, 1: other}) == [pytest.approx(10)]


def test_the_digest_of_the_start_is_that_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "CHECKPOINTS", tmp_path)
    run = accuracy.Run("finetune", "vit", "vanilla", "steps", 0, "test")
    folder = accuracy.started("six-classes", "vit")
    folder.mkdir()
    digests = []
    for weights in (b"one", b"one", b"two"):
        (folder / "model.safetensors").write_bytes(weights)
        digests.append(accuracy.start_digest(run))
    assert digests[0] == digests[1] != digests[2]
    assert accuracy.start_digest(accuracy.Run("digits", "vit", "vanilla", "steps", 0, "test")) is None


def rows(text: str, title: str, index: int = 0) -> list[dict[str, str]]:
    """A table under a heading of the page."""
    section = re.split(r"^#", text.partition(f"{title}\n")[2], flags=re.MULTILINE)[0]
    table = [part for part in section.split("\n\n") if part.lstrip("\n").startswith("|")][index]
    columns, _, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines())
    return [dict(zip(columns, row, strict=True)) for row in cells]


@pytest.mark.slow
def test_the_report_pairs_the_seeds_and_shows_a_study_that_is_not_complete(study, tmp_path, monkeypatch, capsys):
    out, (_, _, (_, lines)) = study
    monkeypatch.setattr(accuracy_report, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(accuracy_report, "PICTURE", tmp_path / "accuracy.png")
    accuracy_report.PAGE.write_text(f"before\n{accuracy_report.BEGIN}\nstale text\n{accuracy_report.END}\nafter\n")
    accuracy_report.main(["--results", str(out), "--steps", "12", "--print"])
    printed = capsys.readouterr().out
    assert "stale text" in accuracy_report.PAGE.read_text()
    accuracy_report.main(["--results", str(out), "--steps", "12"])
    page = accuracy_report.PAGE.read_text()
    assert printed.strip() in page
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "stale text" not in page
    assert accuracy_report.PICTURE.stat().st_size > 5000

    of = {(run["arm"], run["budget"], run["seed"]): run for run in lines if run["split"] == "test"}
    gains = [
        100 * (of["feature_reuse", "arithmetic", seed]["accuracy"] - of["vanilla", "steps", seed]["accuracy"])
        for seed in (0, 1)
    ]
    gain = accuracy_tables.shown(gains, 2)
    found = {(row["training"], row["budget"]): row for row in rows(page, "### digits-few, ViT")}
    assert set(found) == {
        ("plain training", "-"),
        ("stochastic depth", "equal steps"),
        ("stochastic depth", "equal arithmetic"),
        ("feature reuse", "equal steps"),
        ("feature reuse", "equal arithmetic"),
    }
    row = found["feature reuse", "equal arithmetic"]
    assert (row["over plain training"], row["seeds"], row["learning rate"]) == (gain, "2", "0.001")
    # Stochastic depth has one of the two seeds.
    assert row["over stochastic depth"].endswith(" (1)")
    assert found["stochastic depth", "equal steps"]["seeds"] == "1"
    losses = [of["vanilla", "steps", seed]["train_loss"] for seed in (0, 1)]
    assert found["plain training", "-"]["training loss"] == f"{sum(losses) / 2:.2f}"
    (row,) = rows(page, "## All tasks and models")
    assert (row["feature reuse over plain"], row["feature reuse at 65 % over plain"], row["seeds"]) == (gain, "-", "2")
    assert "\n- `digits-few`, defaults: feature reuse over plain: " in page
    (row,) = rows(page, "## When does it gain?")
    assert row["feature reuse over plain"] == gain
    row = rows(page, "### digits-few, without some blocks")[0]
    without = [min(of["vanilla", "steps", seed]["accuracy_without_block"]) for seed in (0, 1)]
    assert row["without its most important block"] == f"{50 * sum(without):.1f}"


@pytest.mark.slow
def test_the_report_shows_all_that_was_searched_and_marks_what_was_chosen(study):
    out, (_, _, (said, lines)) = study
    # Plain training with three recipes, feature reuse with two settings and three recipes.
    assert "9 runs to do" in said
    page = accuracy_report.page(accuracy.read(out), {}, steps=12)
    accuracies = {
        (
            run["arm"],
            run["method"].get("drop_rate"),
            run["recipe"]["learning_rate"],
            run["recipe"]["weight_decay"],
        ): 100 * run["accuracy"]
        for run in lines
        if run["split"] == "validation"
    }
    rates = rows(page, "### digits-few, on validation images")
    assert [(row["training"], row["budget"]) for row in rates] == [
        ("plain training", "-"),
        ("feature reuse", "equal steps"),
    ]
    for row, (arm, rate) in zip(rates, (("vanilla", None), ("feature_reuse", 0.5)), strict=True):
        assert row["learning rate 0.001"] == f"**{accuracies[arm, rate, 1e-3, 0.05]:.1f} (1)**"
        assert row["learning rate 0.002"] == f"{accuracies[arm, rate, 2e-3, 0.05]:.1f} (1)"
    settings = rows(page, "### digits-few, on validation images", 1)
    found = {(row["training"], row["options"]): row["ViT (seeds)"] for row in settings}
    base = accuracies["vanilla", None, 1e-3, 0.05]
    expected = {
        ("plain training", "weight_decay=0.3"): ("vanilla", None, 1e-3, 0.3),
        ("feature reuse", "defaults"): ("feature_reuse", 0.5, 1e-3, 0.05),
        ("feature reuse", "weight_decay=0.3"): ("feature_reuse", 0.5, 1e-3, 0.3),
        ("feature reuse", "drop_rate=0.2"): ("feature_reuse", 0.2, 1e-3, 0.05),
        ("feature reuse", "drop_rate=0.2, learning_rate=0.002"): ("feature_reuse", 0.2, 2e-3, 0.05),
        ("feature reuse", "drop_rate=0.2, weight_decay=0.3"): ("feature_reuse", 0.2, 1e-3, 0.3),
    }
    assert found == {name: f"{accuracies[key] - base:+.1f} (1)" for name, key in expected.items()}


def test_an_interval_is_students():
    mean, half = accuracy_tables.interval([1.0, 2.0, 3.0])
    # t with 2 degrees of freedom at 97.5 % is 4.3027; the standard error is 1 / sqrt(3).
    assert mean == 2
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert accuracy_tables.interval([1.0]) == (1.0, math.inf)
    shown = accuracy_tables.shown
    assert [shown([1.0, 1.1, 1.2], 3), shown([-1.0, 1.0], 3), shown([1.0], 1), shown([], 1)] == [
        "**+1.1 ± 0.2**",
        "+0.0 ± 12.7 (2)",
        "+1.0",
        "-",
    ]


def test_the_verdict_names_the_models_on_which_a_difference_is_significant():
    models = {"vit": [1.0, 1.1, 1.2], "convnext": [-1.0, 1.0], "resnet": [-2.0, -2.1], "other": [5.0]}
    values = {model: {"a over b": found} for model, found in models.items()}
    expected = "significantly better on ViT, no significant difference on ConvNeXt, significantly worse on ResNet"
    assert accuracy_tables.verdict(values, "a over b") == f"{expected} (+0.5 ± 1.9 over all 8 pairs)"
    values["convnext"] = values["resnet"] = values["vit"]
    del values["other"]
    expected = "significantly better on ViT, ConvNeXt and ResNet (**+1.1 ± 0.1** over all 9 pairs)"
    assert accuracy_tables.verdict(values, "a over b") == expected
    assert accuracy_tables.verdict({"vit": values["vit"]}, "a over b") == "significantly better on ViT"
    # One seed says nothing.
    assert accuracy_tables.verdict({"vit": {"a over b": [5.0]}}, "a over b") == ""


def test_the_page_shows_what_was_measured():
    lines = accuracy.read(accuracy.DEFAULT_OUT)
    text = accuracy_report.page(lines, accuracy_tables.read_unscaled(accuracy_report.UNSCALED))
    assert text in accuracy_report.PAGE.read_text(encoding="utf-8")
