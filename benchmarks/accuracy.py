r"""Accuracy of plain training, drop path, stochastic depth, masked freeze and feature reuse, over seeds.

    OMP_NUM_THREADS=1 python benchmarks/accuracy.py --tasks digits digits-few --jobs 2
    OMP_NUM_THREADS=1 python benchmarks/accuracy.py --jobs 2 --data uoft-cs/cifar10 --tasks cifar10-long

Every run is one line of JSON in --out, with all options of the method and of the recipe and the commit. A run that is
already there with the same options is skipped, so the study can be stopped and started at any time.
`python benchmarks/accuracy_report.py` makes tables and plots from the lines.

Each arm runs at equal optimizer steps ("steps") and, if its steps are cheaper than plain ones, at equal arithmetic
("arithmetic"): with as many more steps as the arithmetic of the plain run allows. "arithmetic-65" allows 65 % of it.
Images are decoded once, so that data loading is never the bottleneck. Options are searched with --split validation, a
fifth of the training images; reported figures use --split test. Fine-tuning starts from models that the command first
trains plainly on six of the ten classes, and saves in outputs/accuracy.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from tasks import MODELS, RECIPE, TASKS, Images, ShiftedImages, load, recipe_of
from torch import nn
from transformers import AutoModelForImageClassification, PrinterCallback
from variants import VARIANTS, VariantConfig, VariantTrainer, mean_share

from hf_featreuse import FeatureReuseArguments, find_residual_blocks, measure_step_costs, skip_blocks
from hf_featreuse.data import RandAugment, augmentation
from hf_featreuse.data.metrics import build_compute_metrics, rank_top_k
from hf_featreuse.small_models import parse_overrides, small_config, small_image_processor

DEFAULT_OUT = Path(__file__).parent / "results" / "accuracy.jsonl"
CHECKPOINTS = Path(__file__).parents[1] / "outputs" / "accuracy"
_ROBUSTNESS_IMAGES = 1000

ARMS = {
    "vanilla": {"stochastic_depth_steps": 0, "masked_freeze_steps": 0},
    "stochastic_depth": {"stochastic_depth_steps": 1, "masked_freeze_steps": 0},
    "stochastic_depth_then_plain": {"stochastic_depth_steps": 1, "masked_freeze_steps": 0, "vanilla_steps": 1},
    "masked_freeze": {"stochastic_depth_steps": 0},
    "layer_drop_back": {"stochastic_depth_steps": 0, "vanilla_steps": 1, "drop_rate_schedule": "uniform"},
    "feature_reuse": {},
    "stochastic_depth_unscaled": {"stochastic_depth_steps": 1, "masked_freeze_steps": 0, "scale_kept": False},
    "feature_reuse_unscaled": {"stochastic_depth_steps": 1, "scale_kept": False},
    "feature_reuse_sample": {"drop_granularity": "sample"},
    "drop_path": {"stochastic_depth_steps": 0, "masked_freeze_steps": 0},
}
PLAIN = ("vanilla", "drop_path")
# Options of the method that the first lines of the results lack, and their values in these runs.
NEWER_OPTIONS = {"unfreeze_at": None}
# Share of the plain run's arithmetic that a run may take; with `None` it takes as many steps.
BUDGETS = {"steps": None, "arithmetic": 1.0, "arithmetic-65": 0.65}
# The model's own drop path, if it has one.
MODEL_OPTIONS = {"drop_path": "drop_path_rate=0.2"}


@dataclass(frozen=True)
class Run:
    """One run of the study, which gives one line of the results.

    Args:
        task, model_type, arm, budget, seed, split, steps: as the command's options.
        method (`dict`): every option of the method; of plain training, only the numbers of steps.
        recipe (`dict`): learning rate and the like, whole.
    """

    task: str
    model_type: str
    arm: str
    budget: str
    seed: int
    split: str
    steps: int | None = None
    method: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The text that identifies the run."""
        return json.dumps(vars(self), sort_keys=True)


def resolved_method(arm: str, settings: str = "") -> dict[str, Any]:
    """Return every option of the method of an arm, including defaults; of plain training only the numbers of steps."""
    if arm in PLAIN:
        return dict(ARMS[arm])
    options = parse_overrides(settings) | ARMS[arm]
    if options.get("train_trunk", "") is None:  # The word "none" was parsed as a value.
        options["train_trunk"] = "none"
    variants = {name: options.pop(name, default) for name, default in _variant_defaults().items()}
    # One spelling for each setting: `train_trunk=true` and `train_trunk=all` are the same run.
    return FeatureReuseArguments(**options).settings() | variants


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file with today's options; an empty list if the file does not exist.

    A run older than an option of `VARIANTS`, `NEWER_OPTIONS` or `RECIPE` had its default.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for line in lines:
        line["recipe"] = RECIPE | line["recipe"]
        if line["arm"] not in PLAIN:
            line["method"] = NEWER_OPTIONS | _variant_defaults() | line["method"]
            trunk = line["method"]["train_trunk"]
            line["method"]["train_trunk"] = {True: "all", False: "none"}.get(trunk, trunk)
    return lines


def _variant_defaults() -> dict[str, Any]:
    return {option.name: option.default for option in fields(VariantConfig) if option.name in VARIANTS}


def run_of(line: dict[str, Any]) -> Run:
    """Return the run of a line."""
    return Run(**{option.name: line[option.name] for option in fields(Run)})


def make_trainer(run: Run, train: Images, test: Images, max_steps: int, folder: str) -> VariantTrainer:
    task = TASKS[run.task]
    recipe = run.recipe
    weights = "" if recipe["first_weights"] is None else f"initializer_range={recipe['first_weights']}"
    overrides = ",".join(filter(None, [task.models[run.model_type], MODEL_OPTIONS.get(run.arm, ""), weights]))
    torch.manual_seed(run.seed)
    config = small_config(run.model_type, task.image_size, num_labels=len(task.classes), overrides=overrides)
    if task.start is None:
        model = AutoModelForImageClassification.from_config(config)
        if task.fine_stem and run.model_type == "resnet":
            stem = model.resnet.embedder
            stem.embedder.convolution = nn.Conv2d(3, config.embedding_size, 3, padding=1, bias=False)
            stem.pooler = nn.Identity()
    else:
        model = AutoModelForImageClassification.from_pretrained(
            started(task.start, run.model_type), config=config, ignore_mismatched_sizes=True
        )
    args = VariantConfig(
        output_dir=folder,
        max_steps=max_steps,
        per_device_train_batch_size=task.batch_size,
        per_device_eval_batch_size=500,
        learning_rate=recipe["learning_rate"],
        weight_decay=recipe["weight_decay"],
        label_smoothing_factor=recipe["label_smoothing"],
        mixup_alpha=recipe["mixup_alpha"],
        cutmix_alpha=recipe["cutmix_alpha"],
        ema_decay=recipe["ema_decay"],
        warmup_steps=max_steps // 10,
        lr_scheduler_type="cosine",
        seed=run.seed,
        save_strategy="no",
        logging_steps=max(max_steps // 20, 1),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        **run.method,
    )
    trainer = VariantTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=build_compute_metrics((1,)),
        preprocess_logits_for_metrics=rank_top_k,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def started(task: str, model_type: str) -> Path:
    """Return the folder of the plainly trained model from which runs of another task start."""
    return CHECKPOINTS / f"{task}-{model_type}"


def start_digest(run: Run) -> str | None:
    """Return a digest of the weights from which a run starts; runs from different ones cannot be compared."""
    if (start := TASKS[run.task].start) is None:
        return None
    weights = started(start, run.model_type) / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:10]


def make_start(task: str, model_type: str, data_name: str | None) -> None:
    """Train a model plainly, only on training images, as the start of other runs."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transformers.utils.logging.set_verbosity_error()
    method, recipe = resolved_method("vanilla"), recipe_of(task, model_type, "vanilla")
    run = Run(task, model_type, "vanilla", "steps", 0, "validation", method=method, recipe=recipe)
    train, test = load(TASKS[task], run.seed, run.split, data_name)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(run, train, test, TASKS[task].steps, folder)
        trainer.train()
        print(f"{task}, {model_type}: {trainer.evaluate()['eval_accuracy']:.1%} on held-out images", flush=True)
        trainer.save_model(str(started(task, model_type)))


def steps_at_equal_arithmetic(run: Run, steps: int) -> int:
    """Return the number of optimizer steps with the arithmetic of so many plain ones, times the run's budget."""
    task = TASKS[run.task]
    blank = Images(torch.zeros(1, 3, task.image_size, task.image_size, dtype=torch.uint8), torch.zeros(1).long())
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(run, blank, blank, steps, folder)
        blocks = find_residual_blocks(trainer.model)
        costs = measure_step_costs(trainer.model, blocks, train_trunk=trainer.args.train_trunk)
        arithmetic, found = BUDGETS[run.budget] * steps, steps
        # With a window or with rates that change, the mean cost depends on the number of steps.
        for _ in range(5):
            found = round(arithmetic / mean_share(trainer.args, costs, len(blocks), found))
        return found


def execute(run: Run, data_name: str | None, keep: Path | None = None) -> dict:
    """Train and evaluate once; save the model and its image processor in a folder of `keep`."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transformers.utils.logging.set_verbosity_error()
    task = TASKS[run.task]
    train, test = load(task, run.seed, run.split, data_name)
    augments = []
    if run.recipe["rand_augment_ops"]:
        augments.append(RandAugment(run.recipe["rand_augment_ops"], seed=run.seed))
    if run.recipe["random_erasing"]:
        augments.append(augmentation(None, run.seed, run.recipe["random_erasing"]))
    if augments:
        assert isinstance(train, ShiftedImages), "the digits are not augmented"
        train.augments = augments
    steps = run.steps or task.steps
    if BUDGETS[run.budget]:
        steps = steps_at_equal_arithmetic(run, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(run, train, test, steps, folder)
        result = trainer.train()
        if keep is not None:
            kept = keep / "-".join((run.task, run.model_type, run.arm, run.budget, str(run.seed)))
            trainer.save_model(str(kept))
            small_image_processor(trainer.model.config, task.image_size).save_pretrained(kept)
        trainer.label_smoother = None  # Without smoothing the loss is comparable between recipes.
        metrics = trainer.evaluate()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        costs = trainer.step_costs
        few = test.rows(slice(_ROBUSTNESS_IMAGES))
        found = find_residual_blocks(trainer.model)

        def without(blocks: list) -> float:
            with skip_blocks(blocks):
                return round(trainer.evaluate(few)["eval_accuracy"], 4)

        robustness = {
            "accuracy_of_these_images": without([]),
            "accuracy_without_block": [without([block]) for block in found],
            "accuracy_without_last_quarter": without(found[len(found) - len(found) // 4 :]),
            "accuracy_without_last_half": without(found[len(found) // 2 :]),
        }
    share = mean_share(trainer.args, costs, len(trainer.feature_reuse.blocks), steps) if costs else 1.0
    return {
        **vars(run),
        "trained_steps": steps,
        "accuracy": round(metrics["eval_accuracy"], 6),
        "test_loss": round(metrics["eval_loss"], 5),
        "train_loss": round(logs[-1]["loss"], 5),
        "train_loss_by_kind": {key: round(value, 5) for key, value in logs[-1].items() if key.startswith("loss/")},
        "compute_share": round(share, 5),
        **robustness,
        "seconds": round(result.metrics["train_runtime"], 1),
        "versions": ", ".join(
            (f"torch {torch.__version__}", f"transformers {transformers.__version__}", platform.machine(), *_gpu())
        ),
        "commit": _commit(),
        "start_model": start_digest(run),
    }


def _gpu() -> list[str]:
    return [torch.cuda.get_device_name()] if torch.cuda.is_available() else []


def _commit() -> str:
    """Return the commit of this tree, with a plus if there are uncommitted changes."""
    asked = ("git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*")
    done = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def planned(options: argparse.Namespace) -> list[Run]:
    """Return the selected runs, seed by seed, so that an early stop leaves complete comparisons."""
    return [
        Run(
            task=task,
            model_type=model_type,
            arm=arm,
            budget=budget,
            seed=seed,
            split=options.split,
            steps=options.steps,
            method=resolved_method(arm, settings),
            recipe=recipe_of(task, model_type, arm, settings) | parse_overrides(changed),
        )
        for seed in options.seeds
        for task in options.tasks
        for model_type in options.models
        for arm in options.arms
        for settings in ([""] if arm in PLAIN else options.options)
        for changed in options.recipes
        for budget in options.budgets
        if applies(arm, model_type, budget)
    ]


def applies(arm: str, model_type: str, budget: str) -> bool:
    """Return whether a run exists: plain steps cost the same at both budgets; only ConvNeXt has its own drop path."""
    if arm == "drop_path":
        return model_type == "convnext" and budget == "steps"
    if arm == "feature_reuse_sample":
        return model_type != "resnet"
    return arm != "vanilla" or budget == "steps"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits"], choices=TASKS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--budgets", nargs="+", default=["steps", "arithmetic"], choices=BUDGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument(
        "--options",
        nargs="+",
        default=[""],
        help="Options of the arms that drop blocks, such as drop_rate=0.2,train_trunk=head; several are run in turn.",
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=[""],
        help=f"Changes of the recipe, such as learning_rate=2e-3; of {', '.join(RECIPE)}. Several are run in turn.",
    )
    parser.add_argument("--steps", type=int, help="Optimizer steps of a plain run; by default the task's.")
    parser.add_argument("--split", default="test", choices=("test", "validation"), help="Split to evaluate on.")
    parser.add_argument("--data", help="Name or folder of CIFAR-10, for the tasks that take it.")
    parser.add_argument("--jobs", type=int, default=1, help="Number of runs in parallel.")
    parser.add_argument("--keep", type=Path, help="Folder for the trained models, one folder each.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    return parser


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if options.data is None and any(TASKS[task].data for task in options.tasks):
        parser.error("these tasks need `--data`, the name or folder of CIFAR-10, such as uoft-cs/cifar10")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = {run_of(line).key for line in read(options.out)}
    runs = [run for run in planned(options) if run.key not in known]
    print(f"{len(runs)} runs to do, {len(planned(options)) - len(runs)} already done")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        starts = {(TASKS[run.task].start, run.model_type) for run in runs if TASKS[run.task].start}
        missing = [(*start, options.data) for start in sorted(starts) if not started(*start).exists()]
        for future in [pool.submit(make_start, *start) for start in missing]:
            future.result()
        pending = {pool.submit(execute, run, options.data, options.keep): run for run in runs}
        for count, future in enumerate(concurrent.futures.as_completed(pending), 1):
            record = future.result()
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(
                f"{count}/{len(runs)} {record['task']} {record['model_type']} {record['arm']} {record['budget']} "
                f"{record['recipe']['learning_rate']:g} seed {record['seed']}: {record['accuracy']:.1%}, "
                f"{record['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
