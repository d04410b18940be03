"""Time a step of Trainer, of FeatureReuseTrainer and of each of its kinds of step, in one interleaved run.

    OMP_NUM_THREADS=2 python benchmarks/speed.py
    OMP_NUM_THREADS=2 python benchmarks/speed.py --granularity batch sample --peers

Rounds of the trainers alternate on copies of one model, so that drifts of the machine's speed affect all alike. Each
time is printed as a ratio to the plain step's, next to the share of arithmetic: a skipped block costs nothing; masked
freeze runs the whole forward pass, input gradients down to the lowest block that trains, and weight gradients of the
blocks that train. The peers are the stock Trainer with the DropPath of transformers and, if installed, of timm around
the same blocks at the same rates: they compute every sample and mask some.

This script is for a CPU, and for the overhead of a Trainer. On a GPU, run `device_speed.py`, which times with device
events and reports host and kernels separately. Here, the memory on a CUDA device is the peak allocated in a step; on
a CPU it is the activations saved for backward plus the gradients.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from overhead import kind_row, measure_discovery, measure_memory, measure_overhead
from peers import with_drop_path
from reporting import versions
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.models.beit.modeling_beit import BeitDropPath

from hf_featreuse import (
    FeatureReuseArguments,
    FeatureReuseConfig,
    FeatureReuseTrainer,
    find_residual_blocks,
)
from hf_featreuse.small_models import small_config

GRANULARITIES = ("batch", "sample")
REUSE = {"batch": "FeatureReuseTrainer", "sample": "FeatureReuseTrainer by sample"}
# In the order of the table.
ROWS = (
    "Trainer",
    "transformers DropPath",
    "timm DropPath",
    "stochastic_depth",
    "masked_freeze",
    "vanilla",
    "FeatureReuseTrainer",
    "stochastic_depth by sample",
    "masked_freeze by sample",
    "FeatureReuseTrainer by sample",
)


class StepTimer(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next: data, forward, backward, optimizer."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.seconds: dict[int, float] = {}
        self._last = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step > self.warm_up:
            self.seconds[state.global_step - 1] = now - self._last
        self._last = now


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_type", default="vit")
    parser.add_argument(
        "--config_overrides",
        default="hidden_size=384,num_hidden_layers=12,num_attention_heads=6,intermediate_size=1536,patch_size=4",
        help="As in examples/run_image_classification.py; an empty string is the small model of the type.",
    )
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--drop_rate", type=float, default=0.5)
    parser.add_argument("--drop_rate_schedule", default="uniform", choices=("uniform", "linear"))
    parser.add_argument(
        "--granularity", nargs="+", default=["batch"], choices=GRANULARITIES, help="As drop_granularity; one or both."
    )
    parser.add_argument("--peers", action="store_true", help="Time drop path of transformers and timm as well.")
    parser.add_argument("--train_trunk", default="all", choices=("all", "head", "none"))
    parser.add_argument("--unscaled", action="store_true", help="As scale_kept=False.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=9, help="Optimizer steps per round of each trainer; the first is warm-up."
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument(
        "--torch_compile",
        action="store_true",
        help="Compile: FeatureReuseTrainer its blocks, Trainer the whole model. Three steps per round are warm-up.",
    )
    parser.add_argument("--cpu", action="store_true", help="Use the CPU even if there is a GPU.")
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    return parser


def timed_arguments(config, folder: str, options: argparse.Namespace, seed: int, **more):
    """Return the arguments of a round: no logging, saving or evaluation between the steps."""
    return config(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        dataloader_pin_memory=False,
        **more,
    )


def timed_training(trainer: Trainer, warm_up: int = 1) -> dict[int, float]:
    """Train, and return the seconds of each optimizer step after the warm-up."""
    trainer.add_callback(timer := StepTimer(warm_up))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return timer.seconds


def make_trainer(cls, config, model, options: argparse.Namespace, folder: str, seed: int, **reuse):
    """Return a trainer over fixed random images."""
    size = options.image_size
    generator = torch.Generator().manual_seed(seed)
    data = [
        {"pixel_values": torch.randn(3, size, size, generator=generator), "labels": index % model.config.num_labels}
        for index in range(options.batch_size)
    ]
    args = timed_arguments(
        config,
        folder,
        options,
        seed,
        use_cpu=options.cpu,
        bf16=options.bf16,
        torch_compile=options.torch_compile,
        **reuse,
    )
    return cls(model, args, train_dataset=data)


@dataclass(frozen=True)
class Arm:
    """A row of the table: which trainer, over which model, with which options of feature reuse."""

    trainer: type[Trainer]
    config: type[TrainingArguments]
    model: nn.Module
    reuse: dict


def make_arms(model: nn.Module, options: argparse.Namespace) -> dict[str, Arm]:
    arms = {"Trainer": Arm(Trainer, TrainingArguments, model, {})}
    for granularity in options.granularity:
        reuse = reuse_options(options, granularity)
        arms[REUSE[granularity]] = Arm(FeatureReuseTrainer, FeatureReuseConfig, copy.deepcopy(model), reuse)
    if options.peers:
        count = len(find_residual_blocks(model))
        rates = FeatureReuseArguments(**reuse_options(options, "batch")).schedule(count, max_steps=1, seed=0).rates
        layers = {"transformers DropPath": BeitDropPath}
        if importlib.util.find_spec("timm"):
            from timm.layers import DropPath

            layers["timm DropPath"] = DropPath
        for name, layer in layers.items():
            arms[name] = Arm(Trainer, TrainingArguments, with_drop_path(model, rates, layer), {})
    return arms


def reuse_options(options: argparse.Namespace, granularity: str) -> dict:
    return {
        "drop_rate": options.drop_rate,
        "drop_rate_schedule": options.drop_rate_schedule,
        "drop_granularity": granularity,
        "train_trunk": options.train_trunk,
        "scale_kept": not options.unscaled,
        "stochastic_depth_steps": 1,  # Both kinds of step are timed equally often.
    }


def measure(options: argparse.Namespace) -> dict:
    """Run all rounds; return times, shares of arithmetic and memory by row of the table."""
    torch.manual_seed(0)
    settings = small_config(options.model_type, options.image_size, num_labels=10, overrides=options.config_overrides)
    model = transformers.AutoModelForImageClassification.from_config(settings)
    arms = make_arms(model, options)
    seconds, bounds, ratios, trainers = defaultdict(list), defaultdict(list), [], {}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.rounds):
            means = {}
            for name in [*arms][index % len(arms) :] + [*arms][: index % len(arms)]:
                trainers[name], times = run_round(arms[name], options, folder, index)
                means[name] = statistics.mean(times.values())
                seconds[name] += times.values()
                if arms[name].reuse:
                    note_kinds(trainers[name], times, name, options, seconds, bounds)
            ratios.append({name: mean / means["Trainer"] for name, mean in means.items() if name != "Trainer"})
            shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios[-1].items())
            print(
                f"round {index + 1} of {options.rounds}: plain step {means['Trainer']:.3f} s, ratios: {shown}",
                flush=True,
            )
    reusing = {name: trainer for name, trainer in trainers.items() if arms[name].reuse}
    figures = {"seconds": seconds, "bounds": bounds, "ratio of each round": ratios}
    figures["memory"] = measure_memory(reusing, options)
    figures["overhead ms"] = {name: measure_overhead(trainer, options) for name, trainer in reusing.items()}
    first = next(iter(reusing.values()))
    figures["discovery in forwards"] = measure_discovery(first.model, options.image_size)
    return figures


def run_round(arm: Arm, options: argparse.Namespace, folder: str, seed: int) -> tuple[Trainer, dict[int, float]]:
    """Train for a round; return the trainer and the seconds of each step."""
    trainer = make_trainer(arm.trainer, arm.config, arm.model, options, folder, seed, **arm.reuse)
    # The first step of each kind compiles a graph.
    return trainer, timed_training(trainer, warm_up=3 if options.torch_compile else 1)


def note_kinds(trainer, times: dict[int, float], name: str, options: argparse.Namespace, seconds, bounds) -> None:
    """Add the times and shares of arithmetic of a round by kind of step."""
    granularity = trainer.feature_reuse.schedule.drop_granularity
    for step, elapsed in times.items():
        plan = trainer.feature_reuse.plan(step, batch_size=options.batch_size)
        share, row = trainer.step_costs.share(plan), kind_row(plan.kind.value, granularity)
        seconds[row].append(elapsed)
        bounds[row].append(share)
        bounds[name].append(share)


def table(figures: dict) -> str:
    """Return the figures as a Markdown table."""
    base = statistics.mean(figures["seconds"]["Trainer"])
    lines = [
        "| step | mean s | ratio to Trainer | share of arithmetic | ratio / share | memory MiB | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        times = figures["seconds"].get(row)
        if times:
            bound = statistics.mean(figures["bounds"].get(row) or [1.0])
            ratio = statistics.mean(times) / base
            memory = figures["memory"].get(row)
            cells = (
                row.replace("_", " "),
                f"{statistics.mean(times):.3f}",
                f"{ratio:.3f}",
                f"{bound:.3f}",
                f"{ratio / bound:.3f}",
                "-" if memory is None else f"{memory:.0f}",
                str(len(times)),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def described(options: argparse.Namespace) -> dict:
    """Return device, versions and settings of the figures, for JSON."""
    on_cpu = getattr(options, "cpu", False) or not torch.cuda.is_available()
    return {
        "device": "CPU" if on_cpu else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
    }


def main() -> None:
    options = make_parser().parse_args()
    transformers.utils.logging.set_verbosity_error()
    found = {**described(options), **measure(options)}
    print(f"\n{found['device']}, {found['threads']} threads, {found['versions']}\n{found['settings']}\n")
    print(f"{table(found)}\n")
    for name, milliseconds in found["overhead ms"].items():
        share = milliseconds / 1000 / statistics.mean(found["seconds"]["Trainer"])
        print(f"{name}: plan, contexts and logging {milliseconds:.2f} ms per step, {share:.3%} of a plain step.")
    print(f"Finding the blocks: {found['discovery in forwards']:.2f} forward passes of a batch of one.")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
