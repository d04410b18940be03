"""Time every kind of step on a GPU, against a plain step of the same loop.

    python benchmarks/device_speed.py                  # five minutes on an H100
    python benchmarks/device_speed.py --all            # more models
    python benchmarks/device_speed.py --small          # a check of the script itself, on any machine
    python benchmarks/device_speed.py --report         # measure nothing, write the table of docs/performance.md

A plain loop: data on the device, bf16 autocast (--precision fp16 with a GradScaler, fp32, or tf32), fused AdamW. The
arms of a case take turns on one model, each after steps that warm up until two in a row take about as long. Reported
per arm:

- *ms*: between two events of the device, from the start of a step to its end; on a CPU, by the clock. *host ms*: until
  the host has queued it; if the two are equal, the host is the limit.
- *ratio*: to the plain step of the case. *arithmetic*: share of the operations of a plain step. *time bound*: the
  share that the times of single blocks predict, `hf_featreuse.method.step_times`.
- *kernels*: the time of all kernels of one profiled step; with --no_profile it is left out.

The last case trains from JPEG files: images per second of decoding, of the copy to the device, and of training, from
device memory and from files. It needs the library datasets.

Each case is appended to --out as soon as it is done, so an interrupted run loses nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peers import with_drop_path
from reporting import versions, write_between
from torch import nn
from transformers import AutoModelForImageClassification, ConvNextConfig, ResNetConfig, SwinConfig, ViTConfig
from transformers.models.beit.modeling_beit import BeitDropPath

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    StepCosts,
    compile_blocks,
    find_residual_blocks,
    measure_step_costs,
)
from hf_featreuse.method.step_times import measure_step_times

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None, "tf32": None}
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "outputs" / "device_speed.jsonl"
# What the page shows.
PUBLISHED, PAGE = ROOT / "benchmarks" / "results" / "device_speed_h100.jsonl", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- begin: benchmarks/device_speed.py -->", "<!-- end: benchmarks/device_speed.py -->"
_MEBIBYTE = 2**20


def _vit(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


MODELS = {
    "ViT-S/16": (ViTConfig, _vit(384, 12, 6)),
    "ViT-B/16": (ViTConfig, _vit(768, 12, 12)),
    "ViT-L/16": (ViTConfig, _vit(1024, 24, 16)),
    "ConvNeXt-T": (ConvNextConfig, {}),
    "ConvNeXt-B": (ConvNextConfig, {"hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3]}),
    "ResNet-50": (ResNetConfig, {}),
    "Swin-T": (SwinConfig, {}),
}
SMALL = {
    "ViT-S/16": (ViTConfig, {**_vit(32, 3, 2), "image_size": 32, "patch_size": 8}),
    "ConvNeXt-T": (ConvNextConfig, {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "image_size": 32}),
    "ResNet-50": (ResNetConfig, {"embedding_size": 8, "hidden_sizes": [8], "depths": [3], "layer_type": "basic"}),
}


@dataclass(frozen=True)
class Case:
    """One model and batch, timed with all arms in one run.

    Args:
        model (`str`): of `MODELS`.
        batch_size (`int`): images in a step.
        compiled (`bool`): whether the blocks are compiled.
        sample (`bool`): whether sets per sample are timed, too; not with BatchNorm.
        channels_last (`bool`): memory format of model and images.
    """

    model: str
    batch_size: int = 128
    compiled: bool = False
    sample: bool = True
    channels_last: bool = False

    @property
    def title(self) -> str:
        parts = [self.model, f"batch {self.batch_size}", "compiled blocks" if self.compiled else "eager"]
        return ", ".join([*parts, *(["channels last"] if self.channels_last else [])])


DEFAULT = (
    Case("ViT-B/16"),
    Case("ViT-B/16", compiled=True),
    Case("ConvNeXt-T", channels_last=True),
    Case("ResNet-50", channels_last=True, sample=False),
    Case("ViT-B/16", batch_size=8),
    Case("ConvNeXt-T", channels_last=True, compiled=True),
    Case("ResNet-50", channels_last=True, compiled=True, sample=False),
)
MORE = (
    Case("ViT-S/16", batch_size=256),
    Case("ViT-L/16", batch_size=64),
    Case("ConvNeXt-B", batch_size=64, channels_last=True),
    Case("Swin-T"),
)
SMALL_CASES = (
    Case("ViT-S/16", batch_size=16),
    Case("ViT-S/16", batch_size=16, compiled=True),
    Case("ConvNeXt-T", batch_size=16, channels_last=True),
    Case("ResNet-50", batch_size=16, channels_last=True, sample=False),
)


@dataclass
class Arm:
    """How one row of a table trains, and what was measured of it.

    Args:
        model (`torch.nn.Module`): of the arm.
        reuse (`FeatureReuse`, *optional*): draws the plans; `None` is plain training.
        costs, times (`StepCosts`, *optional*): arithmetic and time of the blocks.
    """

    model: nn.Module
    reuse: FeatureReuse | None = None
    costs: StepCosts | None = None
    times: StepCosts | None = None
    device_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    arithmetic: list[float] = field(default_factory=list)
    bound: list[float] = field(default_factory=list)
    memory: float = 0.0
    kernels: float | None = None


class Loop:
    """A training loop over one batch that lies on the device."""

    def __init__(self, case: Case, device: torch.device, small: bool, precision: str = "bf16") -> None:
        config_class, settings = (SMALL if small else MODELS)[case.model]
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.model = AutoModelForImageClassification.from_config(config_class(num_labels=1000, **settings)).to(device)
        self.model.train()
        size = 32 if small else 224
        format_ = torch.channels_last if case.channels_last else torch.contiguous_format
        self.model.to(memory_format=format_)
        pixels = torch.randn(case.batch_size, 3, size, size, device=device).to(memory_format=format_)
        labels = torch.randint(0, 1000, (case.batch_size,), device=device)
        self.batch = {"pixel_values": pixels, "labels": labels}
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        # On a CPU, lower precisions would measure emulation.
        self.low = PRECISIONS[precision] if device.type == "cuda" else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.low is torch.float16)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if id(model) not in self.optimizers:
            fused = self.device.type == "cuda"
            self.optimizers[id(model)] = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)
        return self.optimizers[id(model)]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.low or torch.bfloat16, enabled=self.low is not None)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def queue(self, arm: Arm, index: int) -> None:
        """Run one optimizer step without waiting for the device."""
        optimizer = self.optimizer(arm.model)
        samples = len(self.batch["labels"])
        with contextlib.nullcontext() if arm.reuse is None else arm.reuse.step(index, batch_size=samples):
            with self.autocast():
                loss = arm.model(**self.batch).loss
            self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def step(self, arm: Arm, index: int) -> tuple[float, float]:
        """One optimizer step: milliseconds on the device, and until the host has queued it."""
        self.wait()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.device.type == "cuda" else []
        started = time.perf_counter()
        if events:
            events[0].record()
        self.queue(arm, index)
        if events:
            events[1].record()
        queued = time.perf_counter()
        self.wait()
        spent = events[0].elapsed_time(events[1]) if events else (time.perf_counter() - started) * 1e3
        return spent, (queued - started) * 1e3


def make_arms(loop: Loop, blocks: list, rate: float) -> dict[str, Arm]:
    """Return the arms of a case. The mean of a cycle is computed from its two kinds of step."""
    case, model = loop.case, loop.model

    def arm(granularity: str, train_trunk: str, **cycle: int) -> Arm:
        schedule = FeatureReuseSchedule(
            len(blocks), drop_rate=rate, drop_rate_schedule="uniform", drop_granularity=granularity, **cycle
        )
        reuse = FeatureReuse(model, blocks, schedule, train_trunk=train_trunk)
        return Arm(model, reuse, costs[train_trunk], times[train_trunk])

    few = {"pixel_values": loop.batch["pixel_values"][:1]}
    costs = {trunk: measure_step_costs(model, blocks, few, train_trunk=trunk) for trunk in ("all", "head")}
    whole = measure_step_times(model, blocks, loop.batch, autocast=loop.low)
    times = {trunk: dataclasses.replace(whole, train_trunk=trunk) for trunk in ("all", "head")}
    depth, freeze = {"masked_freeze_steps": 0}, {"stochastic_depth_steps": 0}
    arms = {
        "plain": Arm(model),
        "stochastic depth": arm("batch", "all", **depth),
        "masked freeze": arm("batch", "all", **freeze),
        "masked freeze, trunk: head": arm("batch", "head", **freeze),
    }
    if case.sample:
        arms["stochastic depth per sample"] = arm("sample", "all", **depth)
        arms["masked freeze per sample"] = arm("sample", "all", **freeze)
    if not case.compiled:
        arms["drop path of transformers"] = Arm(with_drop_path(model, [rate] * len(blocks), BeitDropPath))
    return arms


def measure(case: Case, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all arms of a case, in alternation."""
    loop = Loop(case, device, options.small, options.precision)
    blocks = find_residual_blocks(loop.model)
    with compile_blocks(blocks) if case.compiled else contextlib.nullcontext():
        arms = make_arms(loop, blocks, options.drop_rate)
        step = 0
        for arm in arms.values():
            step += warm_up(loop, arm, step)
        for _ in range(options.rounds):
            for arm in arms.values():
                for _ in range(options.steps):
                    note(loop, arm, step)
                    step += 1
        if options.profile and device.type == "cuda":
            for arm in arms.values():
                arm.kernels = kernel_milliseconds(loop, arm, step)
    base = statistics.median(arms["plain"].device_ms)
    return {
        "case": case.title,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": versions(),
        "drop_rate": options.drop_rate,
        "precision": options.precision if device.type == "cuda" else "fp32",
        "rows": {name: row(arm, base) for name, arm in with_mean(arms).items()},
    }


def warm_up(loop: Loop, arm: Arm, first: int, most: int = 12) -> int:
    """Run until two steps in a row take about as long; return the number of steps."""
    last = loop.step(arm, first)[0]
    for index in range(1, most):
        before, last = last, loop.step(arm, first + index)[0]
        if index > 2 and abs(last - before) < 0.1 * before:
            return index + 1
    return most


def note(loop: Loop, arm: Arm, index: int) -> None:
    """Run one step and record its cost."""
    if loop.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    device_ms, host_ms = loop.step(arm, index)
    arm.device_ms.append(device_ms)
    arm.host_ms.append(host_ms)
    plan = None if arm.reuse is None else arm.reuse.plan(index, batch_size=loop.case.batch_size)
    for shares, costs in ((arm.arithmetic, arm.costs), (arm.bound, arm.times)):
        shares.append(1.0 if plan is None or costs is None else costs.share(plan))
    if loop.device.type == "cuda":
        arm.memory = max(arm.memory, torch.cuda.max_memory_allocated() / _MEBIBYTE)


def kernel_milliseconds(loop: Loop, arm: Arm, index: int) -> float:
    """Return the total time of the kernels of one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        loop.step(arm, index)
    return sum(event.self_device_time_total for event in profiler.events()) / 1e3


def with_mean(arms: dict[str, Arm]) -> dict[str, Arm]:
    """Return the arms, and the mean step of the default cycle for each granularity."""
    default = FeatureReuseSchedule(1)
    found = dict(arms)
    for ending in ("", " per sample"):
        pair = [arms.get(f"{kind}{ending}") for kind in ("stochastic depth", "masked freeze")]
        if all(pair):
            mean = Arm(pair[0].model)
            for name in ("device_ms", "host_ms", "arithmetic", "bound"):
                depth, freeze = (getattr(arm, name) for arm in pair)
                setattr(mean, name, depth * default.stochastic_depth_steps + freeze * default.masked_freeze_steps)
            mean.memory = max(arm.memory for arm in pair)
            found[f"mean of feature reuse{ending}"] = mean
    return found


def row(arm: Arm, base: float) -> dict[str, float | None]:
    milliseconds = statistics.fmean(arm.device_ms)
    return {
        "ms": milliseconds,
        "host ms": statistics.fmean(arm.host_ms),
        "ratio": milliseconds / base,
        "arithmetic": statistics.fmean(arm.arithmetic),
        "time bound": statistics.fmean(arm.bound),
        "kernels ms": arm.kernels,
        "memory MiB": arm.memory or None,
    }


def table(record: dict[str, Any]) -> str:
    """Return a case as a Markdown table."""
    if "images per second" in record:
        lines = ["| stage | images per second |", "|---|---|"]
        return "\n".join(lines + [f"| {name} | {value:,.0f} |" for name, value in record["images per second"].items()])
    columns = ("ms", "host ms", "ratio", "arithmetic", "time bound", "kernels ms", "memory MiB")
    digits = dict(zip(columns, (1, 1, 3, 3, 3, 1, 0), strict=True))
    lines = [f"| step | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, values in record["rows"].items():
        cells = ("-" if values[key] is None else f"{values[key]:.{digits[key]}f}" for key in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(records: list[dict[str, Any]]) -> str:
    """Return the time of each kind of step and its share of the arithmetic, one column for each case."""
    shown = [name for name in records[0]["rows"] if name != "plain"]
    lines = [["step", *(record["case"] for record in records)], ["---"] * (len(records) + 1)]
    lines.append(["plain training", *(f"{record['rows']['plain']['ms']:.0f} ms" for record in records)])
    for name in shown:
        rows = [record["rows"].get(name) for record in records]
        cells = ("-" if found is None else f"{found['ratio']:.2f} / {found['arithmetic']:.2f}" for found in rows)
        lines.append([name, *cells])
    [where] = {f"{record['device']}, {record['versions']}" for record in records}
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{where}.\n"


def published() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PUBLISHED.read_text(encoding="utf-8").splitlines()]


def measure_files(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Return images per second of each stage from JPEG files to training steps, and of training from each source."""
    from images import write_images

    from hf_featreuse.data import ImageCollator, TrainTransform, load_image_data
    from hf_featreuse.small_models import small_image_processor

    case = SMALL_CASES[0] if options.small else DEFAULT[0]
    loop = Loop(case, device, options.small, options.precision)
    size = loop.batch["pixel_values"].shape[-1]
    blocks = find_residual_blocks(loop.model)
    reuse = FeatureReuse(loop.model, blocks, FeatureReuseSchedule(len(blocks), options.drop_rate, "uniform"))
    arms = {"plain": Arm(loop.model), "feature reuse": Arm(loop.model, reuse)}
    steps, in_memory = (2 if options.small else 20), loop.batch
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), 4 * case.batch_size)
        split = load_image_data(train_dir=folder, train_val_split=None, splits=("train",)).splits["train"]
        data = split.with_transform(TrainTransform((size, size), seed=0))
        collator = ImageCollator.from_processor(small_image_processor("vit", size))
        workers = 0 if options.small else os.cpu_count() or 0

        def batches() -> Iterator[dict[str, torch.Tensor]]:
            loader = torch.utils.data.DataLoader(
                data,
                case.batch_size,
                num_workers=workers,
                collate_fn=collator,
                pin_memory=device.type == "cuda",
                persistent_workers=workers > 0,
            )
            while True:
                yield from loader

        found = batches()
        host = next(found)
        rates[f"decoding, {workers} workers"] = rate(loop, case, steps, lambda _: next(found))
        rates["copy to the device"] = rate(loop, case, steps, lambda _: moved(host, device))
        for name, arm in arms.items():
            loop.batch = in_memory
            warm_up(loop, arm, 0)
            rates[f"{name}, from memory"] = rate(loop, case, steps, lambda index, arm=arm: loop.queue(arm, index))

            def from_files(index: int, arm: Arm = arm) -> None:
                loop.batch = moved(next(found), device)
                loop.queue(arm, index)

            rates[f"{name}, from files"] = rate(loop, case, steps, from_files)
    return {
        "case": f"{case.model} from JPEG files, batch {case.batch_size}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": versions(),
        "images per second": rates,
    }


def moved(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def rate(loop: Loop, case: Case, steps: int, stage: Callable[[int], object]) -> float:
    """Return images per second of a stage that takes one batch at a time, including work on the device."""
    loop.wait()
    started = time.perf_counter()
    for index in range(steps):
        stage(index)
    loop.wait()
    return steps * case.batch_size / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="Time more models.")
    parser.add_argument("--small", action="store_true", help="Tiny models, for a check of the script.")
    parser.add_argument("--report", action="store_true", help="Measure nothing, write the page from the stored cases.")
    parser.add_argument("--only", nargs="+", default=[""], help='Parts of the cases\' titles, such as "ResNet-50".')
    parser.add_argument("--budget", type=float, default=300, help="Seconds after which no further case starts.")
    parser.add_argument("--drop_rate", type=float, default=0.5)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16", help="On a GPU; a CPU takes fp32.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="Steps of each arm in a round.")
    parser.add_argument("--no_profile", dest="profile", action="store_false")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.report:
        return write_between(PAGE, BEGIN, END, page(published()))
    transformers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = SMALL_CASES if options.small else (*DEFAULT, *(MORE if options.all else ()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
    started = time.monotonic()
    todo = {case.title: functools.partial(measure, case, device, options) for case in cases}
    todo["JPEG files"] = functools.partial(measure_files, device, options)
    for title, run in todo.items():
        if not any(part in title for part in options.only):
            continue
        if time.monotonic() - started > options.budget:
            print(f"No time left for {title}.")
            continue
        try:
            record = run()
        except (RuntimeError, ImportError, torch.cuda.OutOfMemoryError) as error:
            # The other cases run even if one fails.
            print(f"{title} failed: {type(error).__name__}: {str(error)[:500]}", flush=True)
            continue
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"\n{record['case']}, {record['device']}, {record['versions']}\n\n{table(record)}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
