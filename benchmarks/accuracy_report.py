"""Tables and plots of the accuracy study, from the lines that benchmarks/accuracy.py wrote, into docs/results.md.

    python benchmarks/accuracy_report.py

Everything between the two markers of the page is replaced; the text around them is written by hand. Differences are
paired by seed: the same images, order, augmentation and first weights, wherever two arms share them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from accuracy import ARMS, BUDGETS, DEFAULT_OUT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from reporting import write_between
from scipy.stats import t as student
from tasks import MODELS, TASKS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- begin: benchmarks/accuracy_report.py -->", "<!-- end -->"
NAMES = {
    "vanilla": "vanilla",
    "drop_path": "drop path of transformers",
    "stochastic_depth": "stochastic depth",
    "masked_freeze": "masked freeze",
    "feature_reuse": "feature reuse",
    "feature_reuse_sample": "feature reuse, per sample",
}
BUDGET_NAMES = {"steps": "equal steps", "arithmetic": "equal arithmetic", "arithmetic-65": "65 % of the arithmetic"}
MODEL_NAMES = {"vit": "ViT", "convnext": "ConvNeXt", "resnet": "ResNet"}
COLOURS = {
    "vanilla": "#666666",
    "drop_path": "#CC79A7",
    "stochastic_depth": "#0072B2",
    "masked_freeze": "#D55E00",
    "feature_reuse": "#009E73",
    "feature_reuse_sample": "#56B4E9",
}
CONFIDENCE = 0.95

# The runs of an arm at a budget, by seed.
Group = dict[int, dict]


def read(
    path: Path, split: str, steps: int | None, options: str
) -> dict[tuple[str, str], dict[tuple[str, str], Group]]:
    """Runs by (task, model type), then by (arm, budget)."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for line in path.read_text().splitlines():
        run = json.loads(line)
        if run["split"] == split and run["steps"] == steps and run["options"] in ("", options):
            found[run["task"], run["model_type"]][run["arm"], run["budget"]][run["seed"]] = run
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its confidence interval by Student's t."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    half = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


def difference(group: Group, base: Group) -> tuple[float, float]:
    """Of the accuracy to that of other training with the same seed, in points, with its interval."""
    return interval([100 * (run["accuracy"] - base[seed]["accuracy"]) for seed, run in group.items() if seed in base])


def shown(group: Group, base: Group | None) -> str:
    """A difference with its interval; bold where the interval leaves out zero."""
    if not base or group is base:
        return "-"
    mean, half = difference(group, base)
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text


def table(groups: dict[tuple[str, str], Group]) -> list[str]:
    vanilla = groups.get(("vanilla", "steps"))
    lines = [
        "| arm | budget | steps | arithmetic of the run | accuracy % (sd) | to vanilla | to stochastic depth "
        "| test loss | lowest accuracy % without one block | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        for budget in BUDGETS:
            group = groups.get((arm, budget))
            if not group:
                continue
            runs = list(group.values())
            accuracies = [100 * run["accuracy"] for run in runs]
            spread = f"{statistics.stdev(accuracies):.1f}" if len(runs) > 1 else "-"
            steps = statistics.fmean(run["trained_steps"] for run in runs)
            plain = TASKS[runs[0]["task"]].steps if runs[0]["steps"] is None else runs[0]["steps"]
            arithmetic = statistics.fmean(run["compute_share"] * run["trained_steps"] for run in runs) / plain
            cells = (
                NAMES[arm],
                "-" if arm == "vanilla" else BUDGET_NAMES[budget],
                f"{steps:.0f}",
                f"{arithmetic:.2f}",
                f"{statistics.fmean(accuracies):.1f} ({spread})",
                shown(group, vanilla),
                shown(group, groups.get(("stochastic_depth", budget))) if arm != "vanilla" else "-",
                f"{statistics.fmean(run['test_loss'] for run in runs):.3f}",
                f"{statistics.fmean(100 * min(run['accuracy_without_block']) for run in runs):.1f}",
                str(len(runs)),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def search_table(path: Path) -> list[str]:
    """Every setting tried on the validation part: difference to vanilla at equal arithmetic."""
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    runs = [run for run in runs if run["split"] == "validation"]
    vanilla = {(r["task"], r["model_type"], r["steps"], r["seed"]): r for r in runs if r["arm"] == "vanilla"}
    cells: dict = defaultdict(lambda: defaultdict(list))
    for run in runs:
        base = vanilla.get((run["task"], run["model_type"], run["steps"], run["seed"]))
        if base and run["budget"] == "arithmetic":
            row = (run["arm"], run["options"])
            cells[row][run["task"], run["model_type"]].append(100 * (run["accuracy"] - base["accuracy"]))
    columns = sorted({cell for row in cells.values() for cell in row}, key=order)
    lines = [
        f"| arm | options | {' | '.join(f'{task}, {MODEL_NAMES[model]}' for task, model in columns)} | mean |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    for (arm, options), row in sorted(cells.items()):
        known = [interval(row[cell]) if cell in row else None for cell in columns]
        texts = ["-" if value is None else f"{value[0]:+.1f} ± {value[1]:.1f}" for value in known]
        mean = "-" if None in known else f"{statistics.fmean(value[0] for value in known):+.1f}"
        lines.append(f"| {NAMES[arm]} | {options.replace(',', ', ') or 'defaults'} | {' | '.join(texts)} | {mean} |")
    return lines if cells else []


def plot(found: dict, path: Path) -> None:
    """Difference to vanilla of every arm, with its interval, a panel for every task and model."""
    cells = [cell for cell in sorted(found, key=order) if ("vanilla", "steps") in found[cell]]
    columns = min(len(cells), 3)
    rows = math.ceil(len(cells) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(cells) :]:
        axis.set_visible(False)
    for axis, cell in zip(axes, cells, strict=False):
        bars = [key for arm in reversed(ARMS) for key in ((arm, "arithmetic"), (arm, "steps")) if key in found[cell]]
        bars = [key for key in bars if key[0] != "vanilla"]
        for height, (arm, budget) in enumerate(bars):
            mean, half = difference(found[cell][arm, budget], found[cell]["vanilla", "steps"])
            filled = COLOURS[arm] if budget == "arithmetic" else "white"
            axis.errorbar(mean, height, xerr=half, fmt="o", color=COLOURS[arm], mfc=filled, capsize=3)
        axis.axvline(0, color="#666666", linewidth=1)
        axis.set_yticks(
            range(len(bars)), [f"{NAMES[arm]}{', equal steps' * (b == 'steps')}" for arm, b in bars], fontsize=8
        )
        axis.set_title(f"{cell[0]}, {MODEL_NAMES[cell[1]]}", fontsize=10)
        axis.set_xlabel("accuracy points over vanilla", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def order(cell: tuple[str, str]) -> tuple[int, int]:
    return list(TASKS).index(cell[0]), MODELS.index(cell[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--options", default="", help="Show the runs with these options of the arms that drop.")
    parser.add_argument("--print", action="store_true", help="Print the tables and leave the page as it is.")
    options = parser.parse_args()
    found = read(options.results, options.split, options.steps, options.options)
    parts = []
    for cell in sorted(found, key=order):
        seconds = statistics.fmean(run["seconds"] for group in found[cell].values() for run in group.values())
        parts += [f"### {cell[0]}, {MODEL_NAMES[cell[1]]}", "", *table(found[cell]), ""]
        parts += [f"Mean time of a run: {seconds:.0f} s.", ""]
    text = "\n".join(parts)
    if options.print:
        print(text)
        return
    if search := search_table(options.results):
        text += "\n".join(["", "### Settings tried on the validation part", "", *search, ""])
    plot(found, ROOT / "docs" / "images" / "accuracy.png")
    picture = "![Accuracy points over vanilla training, with 95 % intervals](images/accuracy.png)"
    write_between(PAGE, BEGIN, END, f"{picture}\n\n{text}")


if __name__ == "__main__":
    main()
