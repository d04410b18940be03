"""Time a step of Trainer, of FeatureReuseTrainer and of each of its kinds of step, in one interleaved run.

    OMP_NUM_THREADS=2 python benchmarks/speed.py

    OMP_NUM_THREADS=2 python benchmarks/speed.py --granularity sample

Rounds of the trainers take turns on copies of one model, so that a machine whose speed drifts slows all alike. Each
time is printed as a ratio to the plain step's, beside the ratio of the arithmetic (the FLOP bound): a skipped block
costs nothing; masked freeze runs the whole forward, input gradients down to the lowest block that trains, and weight
gradients of the blocks that train. With sets drawn by sample, the stock Trainer runs too with the DropPath of
transformers, and that of timm where it is installed, around the same blocks at the same rates: they compute every
sample and mask some.

On a CUDA device the memory is the peak allocated in a step; on the CPU it is the activations saved for backward plus
the gradients.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.models.beit.modeling_beit import BeitDropPath

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseArguments,
    FeatureReuseConfig,
    FeatureReuseTrainer,
    find_residual_blocks,
)
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
    parser.add_argument("--granularity", default="batch", choices=("batch", "sample"), help="As drop_granularity.")
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


def with_drop_path(model: nn.Module, rates: list[float], drop_path: type[nn.Module]) -> nn.Module:
    """A copy of the model with drop path of another library around its residual blocks."""
    model = copy.deepcopy(model)
    for block, rate in zip(find_residual_blocks(model), rates, strict=True):
        layer = drop_path(rate)

        def hook(_module, args, kwargs, output, block=block, layer=layer):
            stream = block.stream(args, kwargs)
            first = output if isinstance(output, torch.Tensor) else output[0]
            first = stream + layer(first - stream)
            return first if isinstance(output, torch.Tensor) else (first, *output[1:])

        block.module.register_forward_hook(hook, with_kwargs=True)
    return model


def make_arms(model: nn.Module, options: argparse.Namespace) -> dict[str, tuple]:
    """Class of the trainer, class of its arguments and model, by row of the table."""
    arms = {
        "Trainer": (Trainer, TrainingArguments, model),
        "FeatureReuseTrainer": (FeatureReuseTrainer, FeatureReuseConfig, copy.deepcopy(model)),
    }
    if options.granularity == "sample":
        count = len(find_residual_blocks(model))
        rates = FeatureReuseArguments(**reuse_options(options)).schedule(count, max_steps=1, seed=0).rates
        arms["transformers DropPath"] = (Trainer, TrainingArguments, with_drop_path(model, rates, BeitDropPath))
        if importlib.util.find_spec("timm"):
            from timm.layers import DropPath

            arms["timm DropPath"] = (Trainer, TrainingArguments, with_drop_path(model, rates, DropPath))
    return arms


def reuse_options(options: argparse.Namespace) -> dict:
    return {
        "drop_rate": options.drop_rate,
        "drop_rate_schedule": options.drop_rate_schedule,
        "drop_granularity": options.granularity,
        "train_trunk": options.train_trunk,
    }


def measure(options: argparse.Namespace) -> dict:
    """Run all rounds; give times, bounds and memory by row of the table."""
    torch.manual_seed(0)
    settings = small_config(options.model_type, options.image_size, num_labels=10, overrides=options.config_overrides)
    model = transformers.AutoModelForImageClassification.from_config(settings)
    arms = make_arms(model, options)
    seconds, bounds, ratios = defaultdict(list), defaultdict(list), []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.rounds):
            names = list(arms)[index % len(arms) :] + list(arms)[: index % len(arms)]
            means = {}
            for name in names:
                cls, config, trained = arms[name]
                changed = reuse_options(options) if cls is FeatureReuseTrainer else {}
                trainer = make_trainer(cls, config, trained, options, folder, index, **changed)
                # Each kind of step makes a graph when it first comes.
                trainer.add_callback(timer := StepTimer(warm_up=3 if options.torch_compile else 1))
                trainer.remove_callback(PrinterCallback)
                trainer.train()
                means[name] = statistics.mean(timer.seconds.values())
                seconds[name] += timer.seconds.values()
                if isinstance(trainer, FeatureReuseTrainer):
                    reusing = trainer
                    for step, elapsed in timer.seconds.items():
                        plan = trainer.feature_reuse.plan(step, batch_size=options.batch_size)
                        share = trainer.step_costs.share(plan)
                        seconds[plan.kind.value].append(elapsed)
                        bounds[plan.kind.value].append(share)
                        bounds[name].append(share)
            ratios.append(means["FeatureReuseTrainer"] / means["Trainer"])
            plain = means["Trainer"]
            print(
                f"round {index + 1} of {options.rounds}: plain step {plain:.3f} s, ratio {ratios[-1]:.3f}", flush=True
            )
    return {
        "seconds": seconds,
        "bounds": bounds,
        "memory": measure_memory(reusing.model, reusing.feature_reuse, options),
        "ratio of each round": ratios,
        "overhead ms": measure_overhead(reusing, options.batch_size),
        "discovery in forwards": measure_discovery(reusing.model, options.image_size),
    }


def measure_overhead(trainer: FeatureReuseTrainer, batch_size: int, steps: int = 400) -> float:
    """Milliseconds a step that plan, contexts and logging take by themselves: the step with nothing inside."""
    loss = torch.zeros((), device=trainer.args.device)
    started = time.perf_counter()
    for step in range(steps):
        with trainer.feature_reuse.step(step, batch_size=batch_size) as plan:
            pass
        trainer._step_log.add(step, plan, trainer.step_costs.share(plan), loss)
    return (time.perf_counter() - started) / steps * 1000


def measure_discovery(model: nn.Module, image_size: int, repeats: int = 15) -> float:
    """Time to find the blocks, in forwards of the same batch of one; medians of alternating calls."""
    inputs = {"pixel_values": torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device)}
    forwards, searches = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        model(**inputs)
        forwards.append(time.perf_counter() - started)
        started = time.perf_counter()
        find_residual_blocks(model, inputs)
        searches.append(time.perf_counter() - started)
    return statistics.median(searches) / statistics.median(forwards)


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
        row = reuse.plan(step, batch_size=options.batch_size).kind.value
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
    with (
        reuse.step(step, batch_size=len(batch["labels"])),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
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
    rows = ("Trainer", "transformers DropPath", "timm DropPath", "stochastic_depth", "masked_freeze", "vanilla")
    for row in (*rows, "FeatureReuseTrainer"):
        times = figures["seconds"].get(row)
        if times:
            bound = statistics.mean(figures["bounds"].get(row) or [1.0])
            ratio = statistics.mean(times) / base
            memory = figures["memory"].get(row)
            lines.append(
                f"| {row} | {statistics.mean(times):.3f} | {ratio:.3f} | {bound:.3f} | {ratio / bound:.3f} | "
                f"{'-' if memory is None else format(memory, '.0f')} | {len(times)} |"
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
    print(f"Finding the blocks: {figures['discovery in forwards']:.2f} forwards of a batch of one.")
    if options.json:
        record = {"device": device, "threads": torch.get_num_threads(), "versions": versions, "settings": settings}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**record, **figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
