"""Measure speed on two architectures at several drop rates, and write tables and plot of docs/performance.md.

    OMP_NUM_THREADS=2 python benchmarks/performance.py

Each of `CASES` is one interleaved run of benchmarks/speed.py, saved in benchmarks/results; a saved case is run again
only with --again. `--report` only replaces the text between the markers of the page, and prints the full tables.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import images
import speed
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from reporting import write_between

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
IMAGES = RESULTS / "images_vit_cpu.json"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- begin: benchmarks/performance.py -->", "<!-- end -->"
_VIT = ["--batch_size", "64"]
_CONVNEXT = ["--model_type", "convnext", "--image_size", "64", "--config_overrides"]
_CONVNEXT += ["patch_size=4,depths=[3,3,9,3],hidden_sizes=[96,192,384,768]", "--batch_size"]
_BOTH = ["--granularity", "batch", "sample", "--peers", "--rounds", "4", "--steps", "7"]
# Title, and arguments of benchmarks/speed.py, by name of the file of results.
CASES = {
    "speed_vit_0.2": ("ViT-S layers on 65 tokens, rate 0.2", [*_VIT, *_BOTH, "--drop_rate", "0.2"]),
    "speed_vit_0.5": ("ViT-S layers on 65 tokens, rate 0.5", [*_VIT, *_BOTH, "--drop_rate", "0.5"]),
    "speed_convnext_0.2": ("ConvNeXt-T at 64 pixels, rate 0.2", [*_CONVNEXT, "64", *_BOTH, "--drop_rate", "0.2"]),
    "speed_convnext_0.5": ("ConvNeXt-T at 64 pixels, rate 0.5", [*_CONVNEXT, "64", *_BOTH, "--drop_rate", "0.5"]),
    "speed_convnext_16": ("ConvNeXt-T, 16 images, rate 0.5", [*_CONVNEXT, "16", *_BOTH, "--drop_rate", "0.5"]),
    "speed_vit_0.05": (
        "ViT-S layers on 65 tokens, rate 0.05",
        [*_VIT, "--drop_rate", "0.05", "--rounds", "4", "--steps", "7"],
    ),
}
SHOWN = {
    "transformers DropPath": "drop path",
    "FeatureReuseTrainer": "feature reuse",
    "FeatureReuseTrainer by sample": "by sample",
}
_COLUMNS = 3
COLORS = dict(zip(SHOWN, ("#CC79A7", "#009E73", "#56B4E9"), strict=True))


def load() -> dict[str, dict]:
    """Return the results of the cases that were run, by name."""
    found = {name: RESULTS / f"{name}.json" for name in CASES}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.exists()}


def plot(found: dict[str, dict], path: Path) -> None:
    """Plot the mean step time relative to the stock Trainer's and the share of arithmetic, a panel for each case."""
    rows = math.ceil(len(found) / _COLUMNS)
    figure = Figure(figsize=(3 * _COLUMNS, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axis in panels.flat[len(found) :]:
        axis.axis("off")
    for axis, (name, record) in zip(panels.flat, found.items(), strict=False):
        base = statistics.fmean(record["seconds"]["Trainer"])
        shown = [row for row in SHOWN if row in record["seconds"]]
        ratios = [statistics.fmean(record["seconds"][row]) / base for row in shown]
        bounds = [statistics.fmean(record["bounds"].get(row) or [1.0]) for row in shown]
        axis.bar([SHOWN[row] for row in shown], ratios, color=[COLORS[row] for row in shown])
        axis.set_xlim(-0.6, len(SHOWN) - 0.4)
        for place, bound in enumerate(bounds):
            axis.plot([place - 0.4, place + 0.4], [bound, bound], color="black", linewidth=2)
        axis.axhline(1, color="#666666", linewidth=1, linestyle="--")
        axis.set_ylim(0, 1.25)
        axis.set_title("\n".join(CASES[name][0].rsplit(", ", 1)), fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.tick_params(axis="y", labelsize=8)
    for axis in panels[:, 0]:
        axis.set_ylabel("time of a step, Trainer = 1", fontsize=9)
    figure.supxlabel("black line: share of arithmetic", fontsize=8, x=0.99, ha="right")
    figure.savefig(path, dpi=110)


def summary(found: dict[str, dict]) -> str:
    """Return a table of the time of each kind of step relative to the stock Trainer's, and its share of arithmetic."""
    headings = [CASES[name][0].replace(" layers on 65 tokens", "").replace(" at 64 pixels", "") for name in found]
    lines = [["step", *headings], ["---"] * (1 + len(found))]
    seconds = [case["seconds"] for case in found.values()]
    means = [{row: statistics.fmean(times) for row, times in case.items() if times} for case in seconds]
    for row in [row for row in speed.ROWS if any(row in times for times in means)]:
        cells = []
        for case, times in zip(found.values(), means, strict=True):
            share = statistics.fmean(case["bounds"].get(row) or [1.0])
            ratio = f"{times[row] / times['Trainer']:.2f} / {share:.2f}" if row in times else "-"
            cells.append(f"{times[row]:.2f} s" if row == "Trainer" else ratio)
        lines.append([row.replace("_", " "), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(found: dict[str, dict]) -> str:
    """Return the text between the markers."""
    alternative = "Time of a mean step against the stock Trainer's, with the share of arithmetic"
    parts = [f"![{alternative}](images/performance.png)", "", summary(found), ""]
    where = sorted({f"{case['device']}, {case['threads']} threads, {case['versions']}." for case in found.values()})
    overhead = [value for case in found.values() for value in case["overhead ms"].values()]
    parts += [*where, f"Own overhead: {min(overhead):.2f} to {max(overhead):.2f} ms per step.", ""]
    if IMAGES.exists():
        parts += ["### From JPEG files at 224 pixels", ""]
        parts += [images.tables(json.loads(IMAGES.read_text(encoding="utf-8"))), ""]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="Also run the saved cases again.")
    parser.add_argument("--report", action="store_true", help="Only write the page and print the tables.")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    for name, (title, arguments) in [] if options.report else CASES.items():
        path = RESULTS / f"{name}.json"
        if path.exists() and not options.again:
            continue
        print(title, flush=True)
        settings = speed.make_parser().parse_args(arguments)
        found = {**speed.described(settings), **speed.measure(settings)}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(speed.table(found), flush=True)
    found = load()
    for name, record in found.items() if options.report else ():
        print(f"{CASES[name][0]}\n\n{speed.table(record)}\n")
    plot(found, ROOT / "docs" / "images" / "performance.png")
    write_between(PAGE, BEGIN, END, page(found))


if __name__ == "__main__":
    main()
