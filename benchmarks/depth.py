"""Measure accuracy, latency and size over depth: models trained in three ways and pruned greedily.

    OMP_NUM_THREADS=1 python benchmarks/depth.py --data uoft-cs/cifar10 --json benchmarks/results/depth_vit_cpu.json

trains a small ViT plainly, with stochastic depth and with feature reuse at equal arithmetic: cheaper steps mean more
steps. Blocks to remove are chosen on images held out from training; accuracies in the table are on test images. Every
row is a separate model from `prune_blocks`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, PreTrainedModel, PrinterCallback

from hf_featreuse import (
    FeatureReuseConfig,
    FeatureReuseTrainer,
    accuracy_on,
    inspect_model,
    prune_blocks,
    rank_removals,
)
from hf_featreuse.data import EvalTransform, ImageCollator, TrainTransform, default_crop_scale, load_image_data
from hf_featreuse.small_models import small_config, small_image_processor

# Steps of stochastic depth and of masked freeze per cycle.
ARMS = {"vanilla": (0, 0), "stochastic depth": (1, 0), "feature reuse": (3, 1)}
MEGABYTE = 1e6


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="Data set on the Hub or a local folder. Default: scikit-learn's digits.")
    parser.add_argument("--model_type", default="vit")
    parser.add_argument("--config_overrides", default="hidden_size=64,num_hidden_layers=12,patch_size=8")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--max_train_samples", type=int, default=10000)
    parser.add_argument("--max_eval_samples", type=int, default=2000, help="Images to validate and to test on, each.")
    parser.add_argument("--steps", type=int, default=1500, help="Optimizer steps of plain training.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--drop_rate", type=float, default=0.5)
    parser.add_argument("--drop_rate_schedule", default="linear", choices=("uniform", "linear"))
    parser.add_argument("--unscaled", action="store_true", help="As scale_kept=False.")
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 8, 6, 4, 2], help="Residual blocks to keep.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="Use the CPU even if there is a GPU.")
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    return parser.parse_args(arguments)


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration, the training images with augmentation, and batches to validate and to test on."""
    limits = {"max_train_samples": options.max_train_samples, "max_eval_samples": options.max_eval_samples}
    # The digits have no test split, so their 360 held-out images are used for both.
    splits = ("train", "validation", "test") if options.data else ("train", "validation")
    data = load_image_data(options.data, splits=splits, seed=options.seed, **(limits if options.data else {}))
    size, labels = options.image_size, data.label_names
    config = small_config(options.model_type, size, len(labels), labels, options.config_overrides)
    processor = small_image_processor(config, size)
    collator = ImageCollator.from_processor(processor)
    flip = 0.5 if options.data else 0.0
    transform = TrainTransform((size, size), scale=default_crop_scale((size, size)), flip=flip, seed=options.seed)
    batches = {
        name: list(DataLoader(split.with_transform(EvalTransform(processor)), 200, collate_fn=collator))
        for name, split in data.splits.items()
        if name != "train"
    }
    return {"config": config, "collator": collator, "train": data.splits["train"].with_transform(transform), **batches}


def train(arm: str, data: dict[str, Any], options: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, float]]:
    """Train one arm, and return the model with its steps and seconds."""
    torch.manual_seed(options.seed)
    model = AutoModelForImageClassification.from_config(data["config"])
    method = dict(zip(("stochastic_depth_steps", "masked_freeze_steps"), ARMS[arm], strict=True))
    method |= {"drop_rate": options.drop_rate, "drop_rate_schedule": options.drop_rate_schedule}
    cost = inspect_model(model, **method).costs["mean"]
    with tempfile.TemporaryDirectory() as folder:
        args = FeatureReuseConfig(
            output_dir=folder,
            max_steps=round(options.steps / cost),
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.05,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=options.cpu,
            seed=options.seed,
            dataloader_pin_memory=False,
            scale_kept=not options.unscaled,
            **method,
        )
        trainer = FeatureReuseTrainer(model, args, train_dataset=data["train"], data_collator=data["collator"])
        trainer.remove_callback(PrinterCallback)
        seconds = trainer.train().metrics["train_runtime"]
    return model.eval(), {"steps": args.max_steps, "seconds": seconds, "cost of a step": cost}


def measure(model: PreTrainedModel, data: dict[str, Any]) -> dict[str, float]:
    """Return the figures of one model: test accuracy, latency, parameters, size of its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return {
        "accuracy": accuracy_on(data.get("test", data["validation"]))(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "megabytes": size / MEGABYTE,
        "milliseconds an image": milliseconds(model, data["validation"][0]["pixel_values"][:1]),
        "milliseconds a batch of 64": milliseconds(model, data["validation"][0]["pixel_values"][:64], repeats=5),
    }


def milliseconds(model: nn.Module, pixels: torch.Tensor, repeats: int = 30) -> float:
    """Return the median time of a forward, after a warm-up."""
    pixels = pixels.to(next(model.parameters()).device)
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            model(pixels).logits.sum().item()
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) * 1000


def run_arm(arm: str, data: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and measure it at every depth."""
    model, training = train(arm, data, options)
    removals = rank_removals(model, accuracy_on(data["validation"]), budget=min(options.budgets))
    depths = {removals[0].blocks_left + len(removals[0].blocks): {**measure(model, data), "removed": []}}
    for budget in sorted(options.budgets, reverse=True):
        gone = [name for removal in removals if removal.blocks_left >= budget for name in removal.blocks]
        pruned = prune_blocks(model, drop=gone)
        depths[budget] = {**measure(pruned, data), "removed": gone}
        print(f"{arm}, {budget} blocks: {depths[budget]['accuracy']:.3f}", flush=True)
    return {"training": training, "depths": depths}


def table(arms: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        f"| blocks | {' | '.join(arms)} | ms, 1 image | ms, 64 images | parameters | checkpoint MB |",
        "|---" * (len(arms) + 5) + "|",
    ]
    for depth in next(iter(arms.values()))["depths"]:
        rows = [arm["depths"][depth] for arm in arms.values()]
        times = (
            statistics.median(row[name] for row in rows)
            for name in ("milliseconds an image", "milliseconds a batch of 64")
        )
        cells = [
            str(depth),
            *(f"{row['accuracy']:.1%}" for row in rows),
            *(f"{value:.1f}" for value in times),
            f"{rows[0]['parameters']:,}",
            f"{rows[0]['megabytes']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    data = load(options)
    arms: dict[str, Any] = {}
    record = {
        "device": "CPU" if options.cpu or not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
        # Only the name: the path is specific to this machine.
        "settings": {key: value for key, value in vars(options).items() if key != "json"}
        | {"data": Path(options.data).name if options.data else "digits"},
        "arms": arms,
    }
    for arm in ARMS:
        arms[arm] = run_arm(arm, data, options)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\n{record['device']}, {record['threads']} threads, {record['versions']}\n\n{table(arms)}")
    return record


if __name__ == "__main__":
    main()
