"""Measure the memory of each kind of step: activations saved for backward, gradients, optimizer moments, and the peak.

    python benchmarks/memory.py              # seconds, and no memory: fake tensors in the place of a CPU's
    python benchmarks/memory.py --device cuda --json memory_cuda.json

prints tables, and writes benchmarks/results/memory.json and table and picture of docs/performance.md#memory.
Fake tensors of torch have shapes and storages but no data, and choose the kernels of the CPU: the counts are those of
a real run, to the byte, which tests/benchmarks/test_memory_benchmark.py checks. On a CUDA device the peak is
`torch.cuda.max_memory_allocated`.

Source: `torch.autograd.graph.saved_tensors_hooks`; `torch.distributed._tools.mem_tracker.MemTracker`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from overhead import saved_for_backward
from reporting import versions, write_between
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, StepKind, StepPlan, find_residual_blocks

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "memory.json"
PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "images" / "memory.png"
BEGIN, END = "<!-- begin: benchmarks/memory.py -->", "<!-- end -->"
MEGABYTE = 1e6
RATES, GRAINS, CYCLES = (0.5, 0.2), ("batch", "sample"), 4
KINDS = (StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE)
HALVES = tuple(f"masked freeze, the {half} half trains, trunk frozen" for half in ("low", "high"))


def vit_small() -> nn.Module:
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=224, patch_size=16, num_labels=1000))


def convnext_tiny() -> nn.Module:
    return ConvNextForImageClassification(ConvNextConfig(image_size=224, num_labels=1000))


MODELS: dict[str, Callable[[], nn.Module]] = {"ViT-S/16": vit_small, "ConvNeXt-T": convnext_tiny}


class Fixed(FeatureReuseSchedule):
    """A schedule with the same plan for every step."""

    fixed: StepPlan

    def plan(self, global_step: int, *, batch_size: int | None = None, position: int = 0) -> StepPlan:
        return self.fixed


def fixed_schedule(num_blocks: int, kind: StepKind, dropped: Sequence[int] = ()) -> FeatureReuseSchedule:
    """Return a schedule of identical steps; stochastic depth has a survival probability of one half."""
    schedule = Fixed(num_blocks, 0.5, "uniform")
    survival = (0.5,) * num_blocks if kind is StepKind.STOCHASTIC_DEPTH else None
    schedule.fixed = StepPlan(kind, tuple(dropped), survival=survival)
    return schedule


class StorageTracker(MemTracker):
    """torch's tracker without its hooks on weights, which frozen weights do not allow; totals do not need them."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


class Bench:
    """A model, its blocks, a batch and AdamW, on fake or real tensors.

    Args:
        make (`Callable`): builds the model.
        device (`str`, defaults to `"fake"`): `"fake"`, `"cpu"` or `"cuda"`.
        batch_size (`int`, defaults to 64): images.
    """

    def __init__(self, make: Callable[[], nn.Module], device: str = "fake", batch_size: int = 64) -> None:
        with torch.device("meta"):
            model = make()
        self.blocks = find_residual_blocks(model)
        self.mode = FakeTensorMode() if device == "fake" else contextlib.nullcontext()
        self.device = "cpu" if device == "fake" else device
        size, self.batch_size = model.config.image_size, batch_size
        with self.mode:
            self.model = model._apply(lambda t: torch.zeros(t.shape, dtype=t.dtype, device=self.device)).train()
            self.batch = {
                "pixel_values": torch.randn(batch_size, 3, size, size, device=self.device),
                "labels": torch.zeros(batch_size, dtype=torch.long, device=self.device),
            }
        self.make_optimizer()

    def make_optimizer(self) -> None:
        """Create AdamW, Trainer's default, without moments."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    @property
    def moments(self) -> int:
        states = self.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))

    def schedule(self, rate: float, grain: str) -> FeatureReuseSchedule:
        # One step of each kind per cycle, so that every step of a kind has another set.
        return FeatureReuseSchedule(
            len(self.blocks), rate, "uniform", stochastic_depth_steps=1, seed=0, drop_granularity=grain
        )

    def fixed(self, kind: StepKind, dropped: Sequence[int] = ()) -> FeatureReuseSchedule:
        return fixed_schedule(len(self.blocks), kind, dropped)

    def measure(
        self, schedule: FeatureReuseSchedule, step: int = 0, *, train_trunk: str = "all", in_backward: bool = False
    ) -> dict[str, int]:
        """Return the bytes of one whole step: saved for backward, gradients at its end, moments, and the peak.

        Args:
            schedule (`FeatureReuseSchedule`): plans the step.
            step (`int`, defaults to 0): optimizer step.
            train_trunk (`"all"`, `"head"` or `"none"`, defaults to `"all"`): as in `FeatureReuse`.
            in_backward (`bool`, defaults to `False`): update each weight as soon as it has a gradient, and free that.
        """
        reuse = FeatureReuse(self.model, self.blocks, schedule, train_trunk=train_trunk)
        if schedule.drop_granularity == "sample":
            # The first step checks once whether a block mixes samples, which the tracker cannot follow.
            with self.mode, reuse.step(step, batch_size=self.batch_size):
                self.model(**self.batch)
        with self.mode, self._tracked() as peak, self._stepping_in_backward(in_backward):
            with reuse.step(step, batch_size=self.batch_size):
                with saved_for_backward(self.model) as saved:
                    loss = self.model(**self.batch).loss
                activations = sum(saved.values())
                loss.backward()
            gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
            if not in_backward:
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            del loss
        return {"activations": activations, "gradients": gradients, "moments": self.moments, "peak": peak()}

    @contextlib.contextmanager
    def _tracked(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield torch.cuda.max_memory_allocated
            return
        tracker = StorageTracker()
        tracker.track_external(self.model, self.optimizer, *self.batch.values())
        with tracker:
            yield lambda: sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())

    @contextlib.contextmanager
    def _stepping_in_backward(self, wanted: bool):
        optimizers = {p: torch.optim.AdamW([p], fused=True) for p in self.model.parameters()} if wanted else {}

        def take(parameter: torch.Tensor) -> None:
            optimizers[parameter].state[parameter] = self.optimizer.state[parameter]
            optimizers[parameter].step()
            parameter.grad = None

        handles = [parameter.register_post_accumulate_grad_hook(take) for parameter in optimizers]
        yield
        for handle in handles:
            handle.remove()


def measure_model(make: Callable[[], nn.Module], device: str, batch_size: int) -> dict[str, Any]:
    """Return all rows of one model. `draws` lists the steps of a kind; `fixed` has one step each."""
    bench = Bench(make, device, batch_size)
    growing = []
    for step in range(2):
        growing.append(bench.measure(bench.schedule(0.5, "batch"), step)["moments"])
    vanilla = bench.fixed(StepKind.VANILLA)
    bench.measure(vanilla)  # From here on every weight has moments.
    low, high = range(len(bench.blocks) // 2), range(len(bench.blocks) // 2, len(bench.blocks))
    fixed = {
        "vanilla": bench.measure(vanilla),
        "vanilla, optimizer in backward": bench.measure(vanilla, in_backward=True),
    }
    for name, dropped in {"the lowest block": (0,), "the low half": low, "the high half": high}.items():
        schedule = bench.fixed(StepKind.MASKED_FREEZE, dropped)
        fixed[f"masked freeze, {name} trains"] = bench.measure(schedule)
        fixed[f"masked freeze, {name} trains, trunk frozen"] = bench.measure(schedule, train_trunk="none")
    draws: dict[str, list[dict[str, int]]] = {}
    for rate in RATES:
        for grain in GRAINS:
            schedule = bench.schedule(rate, grain)
            for step in range(100):
                kind = schedule.plan(step, **({} if grain == "batch" else {"batch_size": batch_size})).kind
                rows = draws.setdefault(row_name(kind, rate, grain), []) if kind in KINDS else None
                if rows is not None and len(rows) < CYCLES:
                    rows.append(bench.measure(schedule, step))
                if all(len(draws.get(row_name(kind, rate, grain), [])) == CYCLES for kind in KINDS):
                    break
    parameters = sum(parameter.nbytes for parameter in bench.model.parameters())
    return {"parameters": parameters, "moments after each step of a cycle": growing, "fixed": fixed, "draws": draws}


def row_name(kind: StepKind, rate: float, grain: str) -> str:
    return f"{kind.value.replace('_', ' ')}, rate {rate:g}, by {grain}"


def mean(rows: Sequence[dict[str, int]], part: str) -> float:
    return sum(row[part] for row in rows) / len(rows)


def tables(found: dict[str, Any]) -> str:
    """Return the figures as Markdown, and for each rate and granularity the peak relative to plain training."""
    parts = []
    for name, figures in found["models"].items():
        plain = figures["fixed"]["vanilla"]
        parts += [f"### {name}, {found['batch_size']} images of 224 pixels", ""]
        parts += ["| step, MB | activations | gradients | peak, largest | peak / vanilla |", "|---" * 5 + "|"]
        for row, draws in {**{row: [step] for row, step in figures["fixed"].items()}, **figures["draws"]}.items():
            sizes = [mean(draws, part) / MEGABYTE for part in ("activations", "gradients")]
            peak = max(step["peak"] for step in draws)
            cells = [*(f"{size:.1f}" for size in sizes), f"{peak / MEGABYTE:.1f}", f"{peak / plain['peak']:.3f}"]
            parts.append(f"| {row} | {' | '.join(cells)} |")
        parts += [
            "",
            f"Weights {figures['parameters'] / MEGABYTE:.1f} MB, moments {plain['moments'] / MEGABYTE:.1f} MB. ",
        ]
        first, second = (size / MEGABYTE for size in figures["moments after each step of a cycle"])
        parts[-1] += (
            f"Moments after the first step of the first cycle {first:.1f} MB, after the second {second:.1f} MB."
        )
        parts += ["", "| peak of both kinds against vanilla | by batch | by sample |", "|---|---|---|"]
        for rate in RATES:
            worst = [pair_peak(figures, rate, grain) / plain["peak"] for grain in GRAINS]
            parts.append(f"| rate {rate:g} | {' | '.join(f'{share:.3f}' for share in worst)} |")
        parts.append("")
    return "\n".join([*parts, f"{found['device']}, {found['versions']}."])


def pair_peak(figures: dict[str, Any], rate: float, grain: str) -> int:
    """Return the peak of the worse of the two kinds of step."""
    return max(step["peak"] for kind in KINDS for step in figures["draws"][row_name(kind, rate, grain)])


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw mean activations and gradients of each kind of step above weights and moments, and the largest peak."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, figures) in zip(figure.subplots(1, len(found["models"])), found["models"].items(), strict=True):
        rows = {"vanilla": [figures["fixed"]["vanilla"]], **figures["draws"]}
        labels = [row.replace("stochastic depth", "SD").replace("masked freeze", "MF") for row in rows]
        base = [figures["parameters"] + mean(draws, "moments") for draws in rows.values()]
        bottom = [0.0] * len(rows)
        for part, sizes, color in (
            ("weights and moments", base, "#999999"),
            ("activations", [mean(draws, "activations") for draws in rows.values()], "#0072B2"),
            ("gradients", [mean(draws, "gradients") for draws in rows.values()], "#E69F00"),
        ):
            axis.barh(labels, [size / 1e9 for size in sizes], left=bottom, color=color, label=part)
            bottom = [left + size / 1e9 for left, size in zip(bottom, sizes, strict=True)]
        peaks = [max(step["peak"] for step in draws) / 1e9 for draws in rows.values()]
        axis.plot(peaks, labels, "k|", markersize=11, markeredgewidth=2, label="largest peak")
        axis.invert_yaxis()
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("GB")
        axis.tick_params(labelsize=8)
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def summary(found: dict[str, Any]) -> str:
    """Return one table: activations and peak of plain training, and those of other steps as shares of these."""
    models = found["models"]
    columns = ["step", *(f"{name}, {part}" for name in models for part in ("activations", "peak"))]
    rows = {"plain training": [f"{sizes / 1e9:.2f} GB" for name in models for sizes in _sizes(models[name])]}
    for row in (*next(iter(models.values()))["draws"], *HALVES):
        rows[row] = [
            f"{size / plain:.2f}"
            for figures in models.values()
            for size, plain in zip(_sizes(figures, row), _sizes(figures), strict=True)
        ]
    lines = [columns, ["---"] * len(columns), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sizes(figures: dict[str, Any], row: str = "vanilla") -> tuple[float, int]:
    """Return the mean activations and the largest peak of a row."""
    steps = figures["draws"].get(row) or [figures["fixed"][row]]
    return mean(steps, "activations"), max(step["peak"] for step in steps)


def page(found: dict[str, Any]) -> str:
    """Return the text of the page: the picture and a summary of the tables."""
    alternative = "Memory of each kind of step by its parts (SD: stochastic depth, MF: masked freeze)"
    return f"![{alternative}](images/{PICTURE.name})\n\n{summary(found)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="fake", choices=("fake", "cpu", "cuda"))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--json", type=Path, default=RESULTS, help="File for the figures; the page shows the default.")
    parser.add_argument("--report", action="store_true", help="Measure nothing, write the page.")
    options = parser.parse_args(arguments)
    if not options.report:
        devices = {"fake": "fake tensors of a CPU", "cpu": "CPU"}
        device = torch.cuda.get_device_name() if options.device == "cuda" else devices[options.device]
        found: dict[str, Any] = {
            "device": device,
            "versions": versions(),
            "batch_size": options.batch_size,
            "scale_kept": True,
            "models": {},
        }
        for name, make in MODELS.items():
            found["models"][name] = measure_model(make, options.device, options.batch_size)
            print(name, flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(tables(found))
    if options.json == RESULTS:
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
        plot(found, PICTURE)
        write_between(PAGE, BEGIN, END, f"{page(found)}\n")


if __name__ == "__main__":
    main()
