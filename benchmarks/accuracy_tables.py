"""Tables of the accuracy study, in Markdown, from the lines that benchmarks/accuracy.py wrote.

A line is one run. Results are the runs on test images with the recipe that was chosen for their arm
(`tasks.recipe_of`); options of the method that differ from the defaults are named. Runs on validation images are the
search. Differences are paired by seed: arms with the same seed have the same images, augmentation and initial weights.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from accuracy import ARMS, BUDGETS, PLAIN, resolved_method
from scipy.stats import t as student
from tasks import MODELS, TASKS, recipe_of

CONFIDENCE = 0.95
NAMES = {
    "vanilla": "plain training",
    "stochastic_depth": "stochastic depth",
    "stochastic_depth_then_plain": "stochastic depth, then a plain step",
    "masked_freeze": "masked freeze",
    "layer_drop_back": "masked freeze, then a plain step (LayerDropBack)",
    "feature_reuse": "feature reuse",
    "stochastic_depth_unscaled": "stochastic depth, unscaled",
    "feature_reuse_unscaled": "feature reuse, unscaled",
    "feature_reuse_sample": "feature reuse, per sample",
    "drop_path": "the model's own drop path, 0.2",
}
BUDGET_NAMES = {"steps": "equal steps", "arithmetic": "equal arithmetic", "arithmetic-65": "65 % of the arithmetic"}
MODEL_NAMES = {"vit": "ViT", "convnext": "ConvNeXt", "resnet": "ResNet"}
# Plain training, which is the same for every budget.
BASE = ("vanilla", "", "steps")

# One line of the results; the runs of one kind, by seed; groups by (arm, options that are not defaults, budget).
Line = dict[str, Any]
Group = dict[int, Line]
Cell = tuple[str, str]
Groups = dict[tuple[str, ...], Group]


# Reading


def read_unscaled(path: Path) -> dict[Cell, Groups]:
    """Return the runs with default options of the study before scaling, whose lines have another format."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [line for line in lines if line["split"] == "test" and line["steps"] is None and not line["options"]]
    return grouped(kept, lambda line: (line["arm"], "", line["budget"]))


def reported(lines: Iterable[Line], split: str = "test", steps: int | None = None) -> dict[Cell, Groups]:
    """Return the runs of a split with the chosen recipe."""
    kept = [line for line in lines if line["split"] == split and line["steps"] == steps and not other_recipe(line)]
    return grouped(kept, lambda line: (line["arm"], other_options(line), line["budget"]))


def grouped(lines: Iterable[Line], key: Callable[[Line], tuple]) -> dict[Cell, dict[tuple, Group]]:
    """Return the runs of each task and model type, grouped by a key, then by seed."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        found[line["task"], line["model_type"]][key(line)][line["seed"]] = line
    return {cell: found[cell] for cell in sorted(found, key=order)}


def order(cell: Cell) -> tuple[int, int]:
    return list(TASKS).index(cell[0]), MODELS.index(cell[1])


def row_order(key: tuple) -> tuple:
    """Return a sort key: arms and budgets in the order of their declaration, defaults before other options."""
    return list(ARMS).index(key[0]), *key[1:-1], list(BUDGETS).index(key[-1])


@cache
def _defaults(arm: str) -> dict[str, Any]:
    return json.loads(json.dumps(resolved_method(arm)))


def other_options(line: Line) -> str:
    """Return the options of the method that differ from the defaults of the arm."""
    return _changes(line["method"], _defaults(line["arm"]))


def other_recipe(line: Line) -> str:
    """Return the settings of the recipe that differ from the recipe chosen for the arm."""
    chosen = recipe_of(line["task"], line["model_type"], line["arm"], other_options(line))
    return _changes(line["recipe"], chosen)


def _changes(now: dict[str, Any], base: dict[str, Any]) -> str:
    names = [name for name in {**base, **now} if now.get(name) != base.get(name)]
    return ", ".join(f"{name}={now.get(name)}" for name in names)


# Statistics


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its confidence interval (Student's t); infinite for one value."""
    if len(values) < 2:
        return statistics.fmean(values), math.inf
    half = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


def differences(group: Group | None, base: Group | None) -> list[float]:
    """Return accuracy points over the base with the same seed and start model, for the seeds that both have."""
    pairs = [(run, base[seed]) for seed, run in (group or {}).items() if base and seed in base]
    same = [(run, other) for run, other in pairs if run.get("start_model") == other.get("start_model")]
    return [100 * (run["accuracy"] - other["accuracy"]) for run, other in same]


def shown(values: list[float], expected: int) -> str:
    """Return the mean with its interval, bold if it excludes zero; the number of seeds if it is not as expected."""
    if not values:
        return "-"
    mean, half = interval(values)
    text = f"{mean:+.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:+.1f}"
    text = f"**{text}**" if abs(mean) > half else text
    return text if len(values) == expected else f"{text} ({len(values)})"


def mean_of(group: Group, value: Callable[[Line], float]) -> float:
    return statistics.fmean(value(line) for line in group.values())


# Tables


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    columns = list(columns)
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def label(arm: str, options: str) -> str:
    return f"{NAMES[arm]} ({options})" if options else NAMES[arm]


def budget_name(arm: str, budget: str) -> str:
    return "-" if arm == "vanilla" else BUDGET_NAMES[budget]


def table(groups: Groups) -> list[str]:
    """Return accuracy, losses and recipe of every kind of training of one task and model."""
    plain = groups.get(BASE)
    rows = []
    for arm, options, budget in sorted(groups, key=row_order):
        group = groups[arm, options, budget]
        line = next(iter(group.values()))
        accuracies = [100 * run["accuracy"] for run in group.values()]
        spread = f" ({statistics.stdev(accuracies):.1f})" if len(group) > 1 else ""
        plain_steps = line["steps"] or TASKS[line["task"]].steps
        depth = groups.get(("stochastic_depth", "", budget))
        is_plain = arm == "vanilla"
        row = [label(arm, options), budget_name(arm, budget)]
        row += [f"{mean_of(group, lambda run: run['trained_steps']):.0f}"]
        row += [f"{mean_of(group, lambda run: run['compute_share'] * run['trained_steps']) / plain_steps:.2f}"]
        row += [f"{statistics.fmean(accuracies):.1f}{spread}"]
        row += ["-" if is_plain else shown(differences(group, plain), len(group))]
        row += ["-" if is_plain or group is depth else shown(differences(group, depth), len(group))]
        row += [f"{mean_of(group, lambda run: run['test_loss']):.2f}"]
        row += [f"{mean_of(group, lambda run: run['train_loss']):.2f}" if is_plain else "-"]
        rows.append([*row, f"{line['recipe']['learning_rate']:g}", str(len(group))])
    columns = ["training", "budget", "steps", "arithmetic", "accuracy % (sd)", "over plain training"]
    columns += ["over stochastic depth", "test loss", "training loss", "learning rate", "seeds"]
    return markdown(columns, rows)


def robustness_table(models: dict[str, Groups]) -> list[str]:
    """Return accuracy without blocks, of every kind of training of one task."""
    rows = []
    for model_type, groups in models.items():
        for arm, options, budget in sorted(groups, key=row_order):
            group = groups[arm, options, budget]
            measured = (
                mean_of(group, lambda run: run["accuracy_of_these_images"]),
                mean_of(group, lambda run: min(run["accuracy_without_block"])),
                mean_of(group, lambda run: run["accuracy_without_last_quarter"]),
                mean_of(group, lambda run: run["accuracy_without_last_half"]),
            )
            names = [MODEL_NAMES[model_type], label(arm, options), budget_name(arm, budget)]
            rows.append([*names, *(f"{100 * value:.1f}" for value in measured)])
    columns = ["model", "training", "budget", "whole network, %", "without its most important block"]
    return markdown([*columns, "without the last quarter", "without the last half"], rows)


# The comparisons of the summary: a kind of training and the base that it is compared with.
COMPARISONS = {
    "stochastic depth over plain": (("stochastic_depth", "arithmetic"), ("vanilla", "steps")),
    "feature reuse over plain": (("feature_reuse", "arithmetic"), ("vanilla", "steps")),
    "feature reuse over stochastic depth": (("feature_reuse", "arithmetic"), ("stochastic_depth", "arithmetic")),
    "feature reuse over stochastic depth, then plain": (
        ("feature_reuse", "arithmetic"),
        ("stochastic_depth_then_plain", "arithmetic"),
    ),
    "feature reuse at 65 % over plain": (("feature_reuse", "arithmetic-65"), ("vanilla", "steps")),
}
# The comparisons in the goal of the study.
GOAL = ("feature reuse over plain", "feature reuse over stochastic depth", "feature reuse at 65 % over plain")
# The two kinds of training in the table of gains.
RULED = ("stochastic depth", "feature reuse")


def compared(groups: Groups, options: str = "") -> dict[str, list[float]]:
    """Return the differences of each comparison, with these options on both sides, except for plain training."""

    def of(arm: str, budget: str) -> Group | None:
        return groups.get((arm, "" if arm in PLAIN else options, budget))

    return {name: differences(of(*new), of(*base)) for name, (new, base) in COMPARISONS.items()}


def options_of(groups: Groups) -> list[str]:
    """Return the options with which feature reuse or stochastic depth was run; the defaults are ""."""
    return sorted({options for arm, options, _ in groups if arm in ("feature_reuse", "stochastic_depth")}) or [""]


def summary(found: dict[Cell, Groups]) -> list[str]:
    """Return the comparisons of all tasks and models, in one table and then in words."""
    rows = []
    words: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = defaultdict(dict)
    for (task, model_type), groups in found.items():
        for options in options_of(groups):
            values, plain = compared(groups, options), groups.get(BASE)
            words[task, options][model_type] = values
            seeds = max([len(plain or {}), *map(len, values.values())])
            accuracy = f"{100 * mean_of(plain, lambda run: run['accuracy']):.1f}" if plain else "-"
            cells = [shown(differences, seeds) for differences in values.values()]
            rows.append([task, MODEL_NAMES[model_type], options or "defaults", accuracy, *cells, str(seeds)])
    lines = [*markdown(["task", "model", "options", "plain training, %", *COMPARISONS, "seeds"], rows), ""]
    for (task, options), models in words.items():
        texts = [f"{name}: {text}" for name in GOAL if (text := verdict(models, name))]
        lines += [f"- `{task}`, {options or 'defaults'}: {'; '.join(texts)}."] if texts else []
    return lines


def verdict(models: dict[str, dict[str, list[float]]], name: str) -> str:
    """Return on which models a difference is significant, in words, and the mean over the pairs of several models.

    It is empty if no model has two seeds.
    """
    found: dict[str, list[str]] = {
        "significantly better": [],
        "no significant difference": [],
        "significantly worse": [],
    }
    for model_type, values in models.items():
        if len(values[name]) > 1:
            mean, half = interval(values[name])
            better, neither, worse = found.values()
            (neither if abs(mean) <= half else better if mean > 0 else worse).append(MODEL_NAMES[model_type])
    text = ", ".join(f"{text} on {listed(names)}" for text, names in found.items() if names)
    pairs = [difference for values in models.values() for difference in values[name]]
    several = sum(map(len, found.values())) > 1
    return f"{text} ({shown(pairs, len(pairs))} over all {len(pairs)} pairs)" if several else text


def listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def rule_table(found: dict[Cell, Groups]) -> list[str]:
    """Return the gains, sorted by the ratio of plain training's final training loss to its test loss."""
    rows = []
    for (task, model_type), groups in found.items():
        plain = groups.get(BASE)
        if not plain:
            continue
        train, test = (mean_of(plain, lambda run, key=key: run[key]) for key in ("train_loss", "test_loss"))
        smoothed = " (smoothed labels)" if any(run["recipe"]["label_smoothing"] for run in plain.values()) else ""
        cells = [task, MODEL_NAMES[model_type], f"{train:.2f}{smoothed}", f"{test:.2f}", f"{train / test:.2f}"]
        for options in options_of(groups):
            values = compared(groups, options)
            gains = [shown(values[f"{name} over plain"], len(plain)) for name in RULED]
            rows.append((train / test, [*cells, options or "defaults", *gains, str(len(plain))]))
    columns = ["task", "model", "training loss", "test loss", "ratio", "options"]
    columns += [*(f"{name} over plain" for name in RULED), "seeds"]
    return markdown(columns, [row for _, row in sorted(rows)])


def unscaled_table(found: dict[Cell, Groups]) -> list[str]:
    """Return the study before scaling, at equal arithmetic."""
    rows = []
    for (task, model_type), groups in found.items():
        values, plain = compared(groups), groups[BASE]
        names = [*(f"{name} over plain" for name in RULED), "feature reuse over stochastic depth"]
        cells = [task, MODEL_NAMES[model_type], f"{100 * mean_of(plain, lambda run: run['accuracy']):.1f}"]
        rows.append([*cells, *(shown(values[name], len(plain)) for name in names), str(len(plain))])
    columns = ["task", "model", "plain training, %", *(f"{name} over plain" for name in RULED)]
    return markdown([*columns, "feature reuse over stochastic depth", "seeds"], rows)


# The search


def search(lines: list[Line], steps: int | None = None) -> list[str]:
    """Return all settings tried on validation images: for each task a table of learning rates and one of the rest."""
    tried = [line for line in lines if line["split"] == "validation" and line["steps"] == steps]
    by_setting = grouped(tried, lambda line: (line["arm"], other_options(line), other_recipe(line), line["budget"]))
    parts = []
    for task in dict.fromkeys(task for task, _ in by_setting):
        models = {model: groups for (name, model), groups in by_setting.items() if name == task}
        parts += [f"### {task}, on validation images", "", *rate_table([t for t in tried if t["task"] == task]), ""]
        parts += [*settings_table(models), ""]
    return parts


def settings_table(models: dict[str, Groups]) -> list[str]:
    """Return accuracy points over plain training with its chosen recipe; learning rates have a separate table."""
    base = ("vanilla", "", "", "steps")
    keys = {key for groups in models.values() for key in groups if key != base and (key[1] or not only_rate(key[2]))}
    rows = []
    for arm, options, recipe, budget in sorted(keys, key=row_order):
        values = [
            differences(groups.get((arm, options, recipe, budget)), groups.get(base)) for groups in models.values()
        ]
        mean = f"{statistics.fmean(map(statistics.fmean, values)):+.1f}" if all(values) else "-"
        changed = ", ".join(filter(None, (options, recipe))) or "defaults"
        rows.append([NAMES[arm], changed, budget_name(arm, budget), *(shown(v, 0) for v in values), mean])
    columns = ["training", "options", "budget", *(f"{MODEL_NAMES[model]} (seeds)" for model in models), "mean"]
    return markdown(columns, rows) if rows else []


def rate_table(lines: list[Line]) -> list[str]:
    """Return accuracy at each learning rate with all other options as chosen; the chosen rate is bold."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for line in lines:
        recipe = other_recipe(line)
        if not other_options(line) and (not recipe or only_rate(recipe)):
            row = (line["arm"], line["model_type"], line["budget"])
            found[row][line["recipe"]["learning_rate"]].append(100 * line["accuracy"])
    rates = sorted({rate for row in found.values() for rate in row})
    rows = []
    for arm, model_type, budget in sorted(found, key=lambda key: (MODELS.index(key[1]), row_order(key))):
        chosen = recipe_of(lines[0]["task"], model_type, arm)["learning_rate"]
        cells = []
        for rate in rates:
            values = found[arm, model_type, budget].get(rate)
            text = f"{statistics.fmean(values):.1f} ({len(values)})" if values else "-"
            cells.append(f"**{text}**" if values and rate == chosen else text)
        rows.append([MODEL_NAMES[model_type], NAMES[arm], budget_name(arm, budget), *cells])
    columns = ["model", "training", "budget", *(f"learning rate {rate:g}" for rate in rates)]
    return markdown(columns, rows) if rows else []


def only_rate(changes: str) -> bool:
    """Return whether a recipe differs only in its learning rate."""
    return changes.startswith("learning_rate=") and ", " not in changes
