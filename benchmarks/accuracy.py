"""Accuracy of vanilla training, drop path, stochastic depth, masked freeze and feature reuse, over seeds.

    OMP_NUM_THREADS=1 python benchmarks/accuracy.py --tasks digits digits-few --jobs 2
    OMP_NUM_THREADS=1 python benchmarks/accuracy.py --tasks cifar10 --data uoft-cs/cifar10 --jobs 2

Every run ends as one line of JSON in --out, and a run that is there is not run again: stop and start at will.
`python benchmarks/accuracy_report.py` makes tables and plots of the lines.

Each arm runs at equal optimizer steps ("steps") and, where its steps are cheaper than plain ones, at equal arithmetic
("arithmetic"): with as many more steps as the arithmetic of the plain run allows. Images are decoded once, so that the
data is never the limit. Options are searched with --split validation, a fifth of the training images; --split test is
for the figures that are reported.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForImageClassification, PrinterCallback

from hf_featreuse import FeatureReuseConfig, FeatureReuseTrainer, find_residual_blocks, measure_step_costs, skip_blocks
from hf_featreuse.data import load_image_data
from hf_featreuse.metrics import build_compute_metrics, rank_top_k
from hf_featreuse.small_models import parse_overrides, small_config

DEFAULT_OUT = Path(__file__).parent / "results" / "accuracy.jsonl"
MODELS = ("vit", "convnext", "resnet")
_SAMPLED_PLANS = 200
_ROBUSTNESS_IMAGES = 1000


@dataclass(frozen=True)
class Task:
    """What is learnt: data, models by type with their options, and the length of a plain run.

    Args:
        image_size (`int`): in pixels.
        train_images (`int`, *optional*): how many of the training images are used; `None` takes all.
        steps (`int`): optimizer steps of a plain run, of `batch_size` images.
        models (`dict[str, str]`): options of the small model of each type.
        data (`bool`): whether `--data` names the images; else they are scikit-learn's digits.
        test_images (`int`, *optional*): how many of the test images are used; `None` takes all.
        crop (`int`): pixels by which training images are shifted at random; flips too where it is not 0.
    """

    image_size: int
    train_images: int | None
    steps: int
    models: dict[str, str]
    data: bool = False
    test_images: int | None = None
    crop: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3


_SMALL = {
    "vit": "hidden_size=64,num_hidden_layers=8,num_attention_heads=2,intermediate_size=128",
    "convnext": "hidden_sizes=[32,64],depths=[3,5]",
    "resnet": "embedding_size=16,hidden_sizes=[16,32],depths=[5,5]",
}
TASKS = {
    # Long enough to converge, and little data trained for long, where plain training overfits.
    "digits": Task(8, None, 600, dict.fromkeys(MODELS, "")),
    "digits-few": Task(8, 150, 600, dict.fromkeys(MODELS, "")),
    # Short and underfitting, and little data trained for long.
    "cifar10": Task(32, 10_000, 1000, _SMALL, data=True, test_images=4000, crop=4),
    "cifar10-few": Task(32, 1000, 1000, _SMALL, data=True, test_images=4000, crop=4),
}
ARMS = {
    "vanilla": {"stochastic_depth_steps": 0, "masked_freeze_steps": 0},
    "stochastic_depth": {"masked_freeze_steps": 0},
    "masked_freeze": {"stochastic_depth_steps": 0},
    "feature_reuse": {},
    "feature_reuse_sample": {"drop_granularity": "sample"},
    "drop_path": {"stochastic_depth_steps": 0, "masked_freeze_steps": 0},
}
# The model's own drop path, where it has one.
MODEL_OPTIONS = {"drop_path": "drop_path_rate=0.2"}


@dataclass(frozen=True)
class Run:
    """One line of the results, before it was run."""

    task: str
    model_type: str
    arm: str
    options: str
    budget: str
    seed: int
    split: str
    steps: int | None = None

    @property
    def key(self) -> tuple:
        return tuple(vars(self).values())


class Images(torch.utils.data.Dataset):
    """Decoded images, with their labels."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pixels[index], self.labels[index]


class Batches:
    """Collates, normalises and, for training, shifts and flips: the same for every arm of a seed."""

    def __init__(self, seed: int, crop: int) -> None:
        self.generator, self.crop = np.random.default_rng(seed), crop

    def __call__(self, examples: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([image for image, _ in examples]).float().div_(127.5).sub_(1)
        if self.crop:
            size = pixels.shape[-1]
            padded = nn.functional.pad(pixels, [self.crop] * 4, mode="reflect")
            shifts = self.generator.integers(0, 2 * self.crop + 1, (len(examples), 2))
            pixels = torch.stack(
                [image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, shifts, strict=True)]
            )
            flipped = torch.from_numpy(self.generator.random(len(examples)) < 0.5)
            pixels[flipped] = pixels[flipped].flip(-1)
        return {"pixel_values": pixels, "labels": torch.stack([label for _, label in examples])}


@functools.cache
def decoded(data_name: str | None) -> tuple[Images, Images]:
    """All training and test images as bytes."""
    splits = load_image_data(data_name, splits=("train", "validation", "test")).splits
    parts = []
    for split in (splits["train"], splits.get("test") or splits["validation"]):
        rows = split.__getitems__(range(len(split)))
        parts.append(Images(torch.stack([row["pixel_values"] for row in rows]), torch.tensor(split.labels)))
    return parts[0], parts[1]


def load(task: Task, run: Run, data_name: str | None) -> tuple[Images, Images]:
    """Training images, drawn by the seed, and those that accuracy is measured on."""
    train, test = decoded(data_name if task.data else None)
    rows = np.arange(len(train))
    if run.split == "validation":
        # The same images are held out for every seed.
        rows = np.random.default_rng(0).permutation(rows)
        held_out, rows = rows[: len(rows) // 5], rows[len(rows) // 5 :]
        test = Images(train.pixels[held_out], train.labels[held_out])
    rows = np.random.default_rng(run.seed).permutation(rows)[: task.train_images]
    kept = slice(task.test_images)
    return Images(train.pixels[rows], train.labels[rows]), Images(test.pixels[kept], test.labels[kept])


def make_trainer(run: Run, train: Images, test: Images, max_steps: int, folder: str) -> FeatureReuseTrainer:
    task = TASKS[run.task]
    overrides = ",".join(filter(None, [task.models[run.model_type], MODEL_OPTIONS.get(run.arm, "")]))
    torch.manual_seed(run.seed)
    config = small_config(run.model_type, task.image_size, num_labels=10, overrides=overrides)
    args = FeatureReuseConfig(
        output_dir=folder,
        max_steps=max_steps,
        per_device_train_batch_size=task.batch_size,
        per_device_eval_batch_size=500,
        learning_rate=task.learning_rate,
        weight_decay=0.05,
        warmup_steps=max_steps // 10,
        lr_scheduler_type="cosine",
        seed=run.seed,
        save_strategy="no",
        logging_steps=max(max_steps // 20, 1),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        **{**parse_overrides(run.options), **ARMS[run.arm]},
    )
    trainer = FeatureReuseTrainer(
        AutoModelForImageClassification.from_config(config),
        args,
        data_collator=Batches(run.seed, task.crop),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=build_compute_metrics((1,)),
        preprocess_logits_for_metrics=rank_top_k,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def steps_at_equal_arithmetic(run: Run, steps: int) -> int:
    """Optimizer steps whose arithmetic is that of so many plain ones."""
    task = TASKS[run.task]
    blank = Images(torch.zeros(1, 3, task.image_size, task.image_size, dtype=torch.uint8), torch.zeros(1).long())
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(run, blank, blank, steps, folder)
        options = trainer.reuse_args
        blocks = find_residual_blocks(trainer.model)
        costs = measure_step_costs(trainer.model, blocks, train_trunk=options.train_trunk)
        schedule = options.schedule(len(blocks), steps, run.seed)
        plans = (schedule.plan(step, batch_size=task.batch_size) for step in range(min(steps, _SAMPLED_PLANS)))
        return round(steps / statistics.mean(costs.share(plan) for plan in plans))


def execute(run: Run, data_name: str | None) -> dict:
    """Train and evaluate once."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transformers.utils.logging.set_verbosity_error()
    task = TASKS[run.task]
    train, test = load(task, run, data_name)
    steps = run.steps or task.steps
    if run.budget == "arithmetic":
        steps = steps_at_equal_arithmetic(run, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(run, train, test, steps, folder)
        result = trainer.train()
        metrics = trainer.evaluate()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        few = Images(test.pixels[:_ROBUSTNESS_IMAGES], test.labels[:_ROBUSTNESS_IMAGES])
        dropped = []
        for block in find_residual_blocks(trainer.model):
            with skip_blocks([block]):
                dropped.append(trainer.evaluate(few)["eval_accuracy"])
    return {
        **asdict(run),
        "trained_steps": steps,
        "accuracy": metrics["eval_accuracy"],
        "test_loss": metrics["eval_loss"],
        "train_loss": logs[-1]["loss"],
        "compute_share": statistics.mean(entry.get("compute_share", 1.0) for entry in logs),
        "accuracy_without_block": dropped,
        "seconds": result.metrics["train_runtime"],
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}",
    }


def planned(options: argparse.Namespace) -> list[Run]:
    """Every run that was asked for, seed by seed, so that an early stop leaves whole comparisons."""
    plain = ("vanilla", "drop_path")
    return [
        Run(
            task=task,
            model_type=model_type,
            arm=arm,
            options="" if arm in plain else options.options,
            budget=budget,
            seed=seed,
            split=options.split,
            steps=options.steps,
        )
        for seed in options.seeds
        for task in options.tasks
        for model_type in options.models
        for arm in options.arms
        for budget in options.budgets
        if applies(arm, model_type, budget)
    ]


def applies(arm: str, model_type: str, budget: str) -> bool:
    """Whether there is such a run: plain steps cost the same at both budgets; drop path is ConvNeXt's own."""
    if arm == "drop_path":
        return model_type == "convnext" and budget == "steps"
    if arm == "feature_reuse_sample":
        return model_type != "resnet"
    return arm != "vanilla" or budget == "steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits"], choices=TASKS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--budgets", nargs="+", default=["steps", "arithmetic"], choices=("steps", "arithmetic"))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument(
        "--options", default="", help="Options of every arm that drops, as in drop_rate=0.2,train_trunk=true."
    )
    parser.add_argument("--steps", type=int, help="Optimizer steps of a plain run; by default the task's.")
    parser.add_argument("--split", default="test", choices=("test", "validation"), help="Where accuracy is measured.")
    parser.add_argument("--data", help="Name or folder of CIFAR-10, for the tasks that take it.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    options = parser.parse_args()
    if options.data is None and any(TASKS[task].data for task in options.tasks):
        parser.error("these tasks need `--data`, the name or folder of CIFAR-10, such as uoft-cs/cifar10")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    known = {tuple(json.loads(line)[field.name] for field in fields(Run)) for line in lines}
    runs = [run for run in planned(options) if run.key not in known]
    print(f"{len(runs)} runs to do, {len(planned(options)) - len(runs)} done before")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        pending = {pool.submit(execute, run, options.data): run for run in runs}
        for count, future in enumerate(concurrent.futures.as_completed(pending), 1):
            record = future.result()
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(
                f"{count}/{len(runs)} {record['task']} {record['model_type']} {record['arm']} {record['budget']} "
                f"seed {record['seed']}: {record['accuracy']:.1%}, {record['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
