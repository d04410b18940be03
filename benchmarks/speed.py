"""Time a step of Trainer, of FeatureReuseTrainer and of each of its kinds of step, in one interleaved run.

    OMP_NUM_THREADS=2 python benchmarks/speed.py

Rounds of both trainers take turns on copies of one model, so that a machine whose speed drifts slows both alike. Each
time is printed as a ratio to the plain step's, beside the ratio of the arithmetic (the FLOP bound): a skipped block
costs nothing; masked freeze runs the whole forward, input gradients down to the lowest block that trains, and weight
gradients of the blocks that train.

On a CUDA device the memory is the peak allocated in a step; on the CPU it is the activations saved for backward plus
the gradients.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_featreuse import FeatureReuse, FeatureReuseConfig, FeatureReuseTrainer
from hf_featreuse.small_models import small_config

MEGABYTE = 2**20


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_type", default="vit")
    parser.add_argument(
        "--config_overrides",
        default="hidden_size=384,num_hidden_layers=12,num_attention_heads=6,intermediate_size=1536,patch_size=4",
        help="As of examples/run_image_classification.py; an empty string takes the small model of the type.",
    )
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--drop_rate", type=float, default=0.5)
    parser.add_argument("--drop_rate_schedule", default="uniform", choices=("uniform", "linear"))
    parser.add_argument("--train_trunk", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=9, help="Optimizer steps a round of each trainer; the first warms up."
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument(
        "--torch_compile",
        action="store_true",
        help="Compile: FeatureReuseTrainer its blocks, Trainer the whole model. Three steps of each round warm up.",
    )
    parser.add_argument("--cpu", action="store_true", help="Stay on the CPU where there is a GPU.")
    parser.add_argument("--json", type=Path, help="Write the figures to this file as well.")
    return parser.parse_args()


def make_trainer(cls, config, model, options: argparse.Namespace, folder: str, seed: int, **reuse):
    """A trainer over fixed random images, with no logging, saving or evaluation between the steps."""
    size = options.image_size
    generator = torch.Generator().manual_seed(seed)
    data = [
        {"pixel_values": torch.randn(3, size, size, generator=generator), "labels": index % model.config.num_labels}
        for index in range(options.batch_size)
    ]
    args = config(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=options.cpu,
        bf16=options.bf16,
        torch_compile=options.torch_compile,
        seed=seed,
        dataloader_pin_memory=False,
        **reuse,
    )
    return cls(model, args, train_dataset=data)


def measure(options: argparse.Namespace) -> dict:
    """Run all rounds; give times, bounds and memory by row of the table."""
    torch.manual_seed(0)
    settings = small_config(options.model_type, options.image_size, num_labels=10, overrides=options.config_overrides)
    model = transformers.AutoModelForImageClassification.from_config(settings)
    twin = copy.deepcopy(model)
    seconds, bounds = defaultdict(list), defaultdict(list)
    reuse = {
        "drop_rate": options.drop_rate,
        "drop_rate_schedule": options.drop_rate_schedule,
        "train_trunk": options.train_trunk,
    }
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.rounds):
            plain = make_trainer(Trainer, TrainingArguments, model, options, folder, index)
            reusing = make_trainer(FeatureReuseTrainer, FeatureReuseConfig, twin, options, folder, index, **reuse)
            timers = {}
            for trainer in (plain, reusing) if index % 2 == 0 else (reusing, plain):
                # Each kind of step makes a graph when it first comes.
                timers[trainer] = timer = StepTimer(warm_up=3 if options.torch_compile else 1)
                trainer.add_callback(timer)
                trainer.remove_callback(PrinterCallback)
                trainer.train()
            base = statistics.mean(timers[plain].seconds.values())
            seconds["Trainer"] += timers[plain].seconds.values()
            for step, elapsed in timers[reusing].seconds.items():
                plan = reusing.feature_reuse.schedule.plan(step)
                share = reusing.step_costs.share(plan)
                for row in (plan.kind.value, "FeatureReuseTrainer"):
                    seconds[row].append(elapsed)
                    bounds[row].append(share)
            ratios.append(statistics.mean(timers[reusing].seconds.values()) / base)
            print(
                f"round {index + 1} of {options.rounds}: plain step {base:.3f} s, ratio {ratios[-1]:.3f}", flush=True
            )
        memory = measure_memory(reusing.model, reusing.feature_reuse, options)
        overhead = measure_overhead(reusing)
    return {
        "seconds": seconds,
        "bounds": bounds,
        "memory": memory,
        "ratio of each round": ratios,
        "overhead ms": overhead,
    }


def measure_overhead(trainer: FeatureReuseTrainer, steps: int = 400) -> float:
    """Milliseconds a step that plan, contexts and logging take by themselves: the step with nothing inside."""
    loss = torch.zeros((), device=trainer.args.device)
    started = time.perf_counter()
    for step in range(steps):
        with trainer.feature_reuse.step(step) as plan:
            pass
        trainer._step_log.add(step, plan, trainer.step_costs.share(plan), loss)
    return (time.perf_counter() - started) / steps * 1000


def measure_memory(model, reuse: FeatureReuse, options: argparse.Namespace) -> dict[str, float]:
    """Largest memory of a step in megabytes, by row, over the first plans of the schedule."""
    size, device = options.image_size, next(model.parameters()).device
    batch = {
        "pixel_values": torch.randn(options.batch_size, 3, size, size, device=device),
        "labels": torch.zeros(options.batch_size, dtype=torch.long, device=device),
    }
    model.train()
    outside = FeatureReuse(
        model, [], FeatureReuseConfig(stochastic_depth_steps=0, masked_freeze_steps=0).schedule(0, 1, 0)
    )
    memory = {"Trainer": step_memory(model, outside, 0, batch)}
    for step in range(6):
        row = reuse.schedule.plan(step).kind.value
        memory[row] = max(memory.get(row, 0.0), step_memory(model, reuse, step, batch))
    memory["FeatureReuseTrainer"] = max(value for row, value in memory.items() if row != "Trainer")
    return memory


def step_memory(model, reuse: FeatureReuse, step: int, batch: dict[str, torch.Tensor]) -> float:
    """Memory of one step in megabytes."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    is_cuda = batch["labels"].is_cuda
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with reuse.step(step), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
        peak = sum(saved.values())
        loss.backward()
    peak += sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    return (torch.cuda.max_memory_allocated() if is_cuda else peak) / MEGABYTE


def table(figures: dict) -> str:
    """The figures as a Markdown table."""
    base = statistics.mean(figures["seconds"]["Trainer"])
    lines = [
        "| step | mean s | ratio to Trainer | FLOP bound | ratio / bound | memory MB | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ("Trainer", "stochastic_depth", "masked_freeze", "vanilla", "FeatureReuseTrainer"):
        times = figures["seconds"].get(row)
        if times:
            bound = statistics.mean(figures["bounds"].get(row) or [1.0])
            ratio = statistics.mean(times) / base
            memory = figures["memory"].get(row, float("nan"))
            lines.append(
                f"| {row} | {statistics.mean(times):.3f} | {ratio:.3f} | {bound:.3f} | {ratio / bound:.3f} | "
                f"{memory:.0f} | {len(times)} |"
            )
    return "\n".join(lines)


def main() -> None:
    options = parse()
    transformers.utils.logging.set_verbosity_error()
    figures = measure(options)
    device = "CPU" if options.cpu or not torch.cuda.is_available() else torch.cuda.get_device_name()
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    print(f"\n{device}, {torch.get_num_threads()} threads, {versions}\n{settings}\n\n{table(figures)}")
    share = figures["overhead ms"] / 1000 / statistics.mean(figures["seconds"]["Trainer"])
    print(f"\nPlan, contexts and logging: {figures['overhead ms']:.2f} ms a step, {share:.3%} of a plain step.")
    if options.json:
        record = {"device": device, "threads": torch.get_num_threads(), "versions": versions, "settings": settings}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**record, **figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
