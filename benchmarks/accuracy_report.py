"""Tables and a plot of the accuracy study, from the lines that benchmarks/accuracy.py wrote, into docs/results.md.

    python benchmarks/accuracy_report.py

Everything between the two markers of the page is replaced; the text around them is written by hand. An incomplete
study gives the tables that exist. benchmarks/accuracy_tables.py defines which runs are shown.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from accuracy import DEFAULT_OUT, read
from accuracy_tables import (
    BASE,
    MODEL_NAMES,
    Cell,
    Groups,
    Line,
    differences,
    interval,
    label,
    read_unscaled,
    reported,
    robustness_table,
    row_order,
    rule_table,
    search,
    summary,
    table,
    unscaled_table,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from reporting import write_between

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
PICTURE = ROOT / "docs" / "images" / "accuracy.png"
UNSCALED = DEFAULT_OUT.with_name("accuracy_unscaled.jsonl")
BEGIN, END = "<!-- begin: benchmarks/accuracy_report.py -->", "<!-- end -->"
COLORS = {"stochastic": "#0072B2", "masked": "#D55E00", "layer": "#D55E00", "feature": "#009E73", "drop": "#CC79A7"}
MARKERS = {"steps": ("v", ", equal steps"), "arithmetic": ("o", ""), "arithmetic-65": ("s", ", 65 %")}


SUMMARY = """## All tasks and models

Points of accuracy: at equal arithmetic, and in the last comparison at 65 % of it. A number in brackets is that of the
seeds that both sides of a comparison have, if the row has more."""
RULE = """## When does it gain?

The ratio of plain training's final training loss (the mean over the last twentieth of its steps) to its test loss says
how far it overfits: the lower, the more. The gains are points of accuracy at equal arithmetic."""
SEARCH = """## What was searched

On a fifth of the training images, which the runs of the search do not train on. The first table of a task has the
accuracy in % at each learning rate, with the number of seeds in brackets; the chosen rate is bold. The second has all
other settings, in points over plain training with its chosen recipe."""
BEFORE = """## Before scaling

These runs were measured without scaling (`scale_kept=False`), before the default of version 0.1 changed: the kept
blocks of a stochastic-depth step were not divided by their survival probability, so the network that was evaluated
differs from every network that was trained. The table has points of accuracy over plain training at equal arithmetic;
`benchmarks/results/accuracy_unscaled.jsonl` has all lines. The same training with the present code:

```bash
OMP_NUM_THREADS=1 python benchmarks/accuracy.py --jobs 2 --data uoft-cs/cifar10 \\
  --tasks digits cifar10 cifar10-few finetune --arms vanilla stochastic_depth_unscaled feature_reuse_unscaled
```"""


def page(lines: list[Line], unscaled: dict[Cell, Groups], split: str = "test", steps: int | None = None) -> str:
    """Return the text between the markers."""
    found = reported(lines, split, steps)
    parts = []
    if plotted(found):
        parts += ["![Accuracy points over plain training, with 95 % intervals](images/accuracy.png)", ""]
    if found:
        parts += [SUMMARY, "", *summary(found), "", RULE, "", *rule_table(found), ""]
    for task in dict.fromkeys(task for task, _ in found):
        models = {model: groups for (name, model), groups in found.items() if name == task}
        parts += [f"## {task}", ""]
        for model_type, groups in models.items():
            parts += [f"### {task}, {MODEL_NAMES[model_type]}", "", *table(groups), ""]
        parts += [f"### {task}, without some blocks", "", *robustness_table(models), ""]
    if found:
        parts += [provenance(found), ""]
    if tried := search(lines, steps):
        parts += [SEARCH, "", *tried]
    if unscaled:
        parts += [BEFORE, "", *unscaled_table(unscaled), ""]
    return "\n".join(parts).rstrip() + "\n"


def provenance(found: dict[Cell, Groups]) -> str:
    """Return the number of runs, their time and the versions and commits of the code."""
    runs = [run for groups in found.values() for group in groups.values() for run in group.values()]
    commits, versions = (sorted({run[name] for run in runs}) for name in ("commit", "versions"))
    hours = sum(run["seconds"] for run in runs) / 3600
    return (
        f"{len(runs)} runs, {hours:.1f} hours of one core each; {'; '.join(versions)}; commits {', '.join(commits)}."
    )


def plotted(found: dict[Cell, Groups]) -> dict[Cell, Groups]:
    """Return the tasks and models with runs to compare with plain training."""
    return {
        cell: groups
        for cell, groups in found.items()
        if any(differences(group, groups.get(BASE)) for key, group in groups.items() if key != BASE)
    }


def plot(found: dict[Cell, Groups], path: Path) -> None:
    """Plot points over plain training with intervals: a row of panels for each task, a column for each model."""
    cells = plotted(found)
    tasks, models = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    keys = {
        task: sorted({key for cell in cells if cell[0] == task for key in cells[cell] if key != BASE}, key=row_order)
        for task in tasks
    }
    heights = [0.8 + 0.2 * len(keys[task]) for task in tasks]
    figure = Figure(figsize=(3 + 2.6 * len(models), sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tasks), len(models), squeeze=False, sharey="row", height_ratios=heights)
    for row, task in zip(panels, tasks, strict=True):
        names = [label(arm, options) + MARKERS[budget][1] for arm, options, budget in keys[task]]
        row[0].set_yticks(range(len(names)), names, fontsize=7)
        row[0].set_ylim(len(names) - 0.5, -0.5)
        for axis, model_type in zip(row, models, strict=True):
            if (task, model_type) in cells:
                plot_cell(axis, cells[task, model_type], keys[task])
                axis.set_title(f"{task}, {MODEL_NAMES[model_type]}", fontsize=9)
            else:
                axis.set_visible(axis is row[0])
    for axis in panels[-1]:
        axis.set_xlabel("points over plain training", fontsize=8)
    figure.savefig(path, dpi=110)


def plot_cell(axis: Any, groups: Groups, keys: list[tuple[str, ...]]) -> None:
    """Plot one panel. The interval of two seeds may be far wider than all others, so it does not set the limits."""
    limits = [0.0]
    for height, key in enumerate(keys):
        if not (values := differences(groups.get(key), groups.get(BASE))):
            continue
        mean, half = interval(values)
        error, color = None if math.isinf(half) else half, COLORS[key[0].split("_")[0]]
        axis.errorbar(mean, height, xerr=error, fmt=MARKERS[key[-1]][0], color=color, capsize=3, markersize=5)
        reach = half if len(values) > 2 else 0.0
        limits += [mean - reach, mean + reach]
    margin = 0.5 + 0.05 * (max(limits) - min(limits))
    axis.set_xlim(min(limits) - margin, max(limits) + margin)
    axis.axvline(0, color="#666666", linewidth=1)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(alpha=0.3)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--split", default="test", choices=("test", "validation"), help="Split of the results.")
    parser.add_argument(
        "--steps", type=int, help="Show runs of this length, as in accuracy.py; by default that of the task."
    )
    parser.add_argument("--print", action="store_true", help="Print the tables instead of writing the page.")
    options = parser.parse_args(arguments)
    lines = read(options.results)
    text = page(lines, read_unscaled(UNSCALED), options.split, options.steps)
    if options.print:
        print(text)
        return
    if plotted(found := reported(lines, options.split, options.steps)):
        plot(found, PICTURE)
    write_between(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    main()
