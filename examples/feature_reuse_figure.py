"""Draw the distribution of features over depth: plain training, stochastic depth and feature reuse side by side.

    python examples/feature_reuse_figure.py

uses the setting of Figure 1 of ResidualDroppath (arXiv 2411.09475): a residual network of linear layers, depth 32,
hidden dimension 32. All that is known of that figure is that it shows the feature distribution over depth. The data,
the ReLU before each linear layer, initialization, optimizer, rate and schedule are choices of this example.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits, make_moons
from sklearn.model_selection import train_test_split
from torch import nn

from hf_featreuse import FeatureReuse, FeatureReuseSchedule, find_residual_blocks, skip_blocks

# Steps of stochastic depth and of masked freeze per cycle.
METHODS = {"plain training": (0, 0), "stochastic depth": (1, 0), "feature reuse": (1, 1)}
DATA = {"digits": "handwritten digits", "moons": "two moons"}
COLORS = [
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"),
    *("#56B4E9", "#F0E442", "#666666", "#000000", "#882255"),
]


class Block(nn.Module):
    """x + W relu(x) + b."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(torch.relu(x))


class Network(nn.Module):
    """A linear stem, residual blocks of one linear layer each, a linear head."""

    def __init__(self, inputs: int, classes: int, depth: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)
        # The sum of all branches, not each branch, has the scale of the stream.
        for block in self.blocks:
            nn.init.normal_(block.linear.weight, std=(2 / (width * depth)) ** 0.5)
            nn.init.zeros_(block.linear.bias)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the stream before the first block and after each, of shape (depth + 1, samples, width)."""
        stream = [self.stem(x)]
        for block in self.blocks:
            stream.append(block(stream[-1]))
        return torch.stack(stream)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass
class Split:
    """Centered and scaled training and test samples."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


def load(name: str, seed: int) -> Split:
    x, y = load_digits(return_X_y=True) if name == "digits" else make_moons(1500, noise=0.2, random_state=seed)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.3, stratify=y, random_state=seed)
    # One scale for all inputs, because some pixels of the digits hardly vary.
    mean, std = train_x.mean(0), train_x.std()
    pixels = [torch.tensor((part - mean) / std, dtype=torch.float32) for part in (train_x, test_x)]
    return Split(pixels[0], torch.tensor(train_y), pixels[1], torch.tensor(test_y))


def train(data: Split, method: str, options: argparse.Namespace) -> Network:
    """Train one network; all methods start from the same weights and use the same batches."""
    torch.manual_seed(options.seed)
    model = Network(data.train_x.shape[1], int(data.train_y.max()) + 1, options.depth, options.width)
    blocks = find_residual_blocks(model, data.train_x[:1])
    depth_steps, freeze_steps = METHODS[method]
    schedule = FeatureReuseSchedule(
        len(blocks),
        drop_rate=options.drop_rate,
        drop_rate_schedule=options.drop_rate_schedule,
        stochastic_depth_steps=depth_steps,
        masked_freeze_steps=freeze_steps,
        seed=options.seed,
    )
    reuse = FeatureReuse(model, blocks, schedule, train_trunk=options.train_trunk)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    order = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        rows = torch.randint(len(data.train_x), (options.batch_size,), generator=order)
        with reuse.step(step):
            nn.functional.cross_entropy(model(data.train_x[rows]), data.train_y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        annealing.step()
    return model.eval()


@torch.no_grad()
def describe(model: Network, data: Split) -> dict[str, float]:
    """Return accuracy, of the whole network and without one block, and the similarity of features at adjacent depths.

    The distance is the 1-Wasserstein distance of all feature values, standardized at each depth to compare shapes.
    """

    def accuracy() -> float:
        return (model(data.test_x).argmax(-1) == data.test_y).float().mean().item()

    blocks = find_residual_blocks(model, data.test_x[:1])
    without = []
    for block in blocks:
        with skip_blocks([block]):
            without.append(accuracy())
    features = model.features(data.test_x)
    ordered = features.flatten(1).sort(-1).values
    ordered = (ordered - ordered.mean(-1, keepdim=True)) / ordered.std(-1, keepdim=True)
    return {
        "accuracy": accuracy(),
        "lowest without one block": min(without),
        "cosine of consecutive features": nn.functional.cosine_similarity(features[1:], features[:-1], -1)
        .mean()
        .item(),
        "distance of neighboring distributions": (ordered[1:] - ordered[:-1]).abs().mean().item(),
        "spread, last depth / first": (features[-1].std() / features[0].std()).item(),
    }


@torch.no_grad()
def draw(name: str, data: Split, models: dict[str, Network], figures: dict[str, dict], path: Path) -> None:
    """Draw one column per method: the density of features over depth, and samples in the plane at some depths."""
    depth = len(next(iter(models.values())).blocks)
    shown = [round(depth * part / 4) for part in range(5)]
    figure = Figure(figsize=(13, 8.2), layout="constrained")
    figure.suptitle(
        f"Features over depth, residual network of {depth} linear layers, {DATA[name]} (test samples)", fontsize=13
    )
    outer = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    densities = outer[0].subplots(1, len(models), sharey=True)
    planes = outer[1].subplots(len(models), len(shown), squeeze=False)
    features = {method: model.features(data.test_x) for method, model in models.items()}
    limit = max(float(np.quantile(np.abs(values.numpy()), 0.99)) for values in features.values())
    for column, (method, values) in enumerate(features.items()):
        draw_density(densities[column], values, limit)
        told = figures[method]
        densities[column].set_title(
            f"{method}: accuracy {told['accuracy']:.1%}\nlowest without one block: "
            f"{told['lowest without one block']:.1%}",
            fontsize=10,
        )
        draw_planes(planes[column], values, data.test_y, shown)
        planes[column][0].set_ylabel(method.replace(" ", "\n"), fontsize=9)
    densities[0].set_ylabel("feature value")
    for axis, at in zip(planes[0], shown, strict=True):
        axis.set_title(f"depth {at}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_density(axis: Any, values: torch.Tensor, limit: float) -> None:
    """Draw the histogram of all feature values at each depth as color, with the median and two bands."""
    # Values grow with depth by orders of magnitude, so the scale is linear near zero and logarithmic beyond.
    bins = np.sinh(np.linspace(-np.arcsinh(limit), np.arcsinh(limit), 121))
    counts = np.stack([np.histogram(at.numpy(), bins)[0] for at in values])
    # Each depth is scaled by its peak; otherwise the widest ones would fade.
    shade = counts / counts.max(1, keepdims=True)
    axis.pcolormesh(np.arange(len(values) + 1) - 0.5, bins, shade.T, cmap="Blues", vmax=1.3, rasterized=True)
    axis.set_yscale("asinh", linear_width=1.0)
    ticks = [0, *(sign * 10**power for sign in (-1, 1) for power in range(5) if 10**power < limit)]
    axis.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
    axis.yaxis.minorticks_off()
    quantiles = np.quantile(values.flatten(1).numpy(), (0.05, 0.25, 0.5, 0.75, 0.95), axis=1)
    for line, style in zip(quantiles, (":", "--", "-", "--", ":"), strict=True):
        axis.plot(line, style, color="#D55E00", linewidth=1.2)
    axis.set_xlabel("depth in blocks (lines: 5, 25, 50, 75, 95 %)", fontsize=9)
    axis.set_ylim(-limit, limit)


def draw_planes(axes: Any, values: torch.Tensor, labels: torch.Tensor, shown: list[int]) -> None:
    """Draw samples by class on the first two principal axes of the features of all depths, one plane per method."""
    centered = values[shown] - values[shown].mean(1, keepdim=True)
    # The same spread at every depth, so that one plane shows the arrangement at all of them.
    centered = centered / centered.square().mean((1, 2), keepdim=True).sqrt()
    _, _, directions = torch.linalg.svd(centered.flatten(0, 1), full_matrices=False)
    flat = centered @ directions[:2].T
    reach = flat.abs().flatten(0, 1).quantile(0.995, 0).mul(1.1).tolist()
    colors = [COLORS[int(label)] for label in labels]
    for axis, points in zip(axes, flat, strict=True):
        axis.scatter(points[:, 0], points[:, 1], c=colors, s=4, alpha=0.7, linewidths=0)
        axis.set(xlim=(-reach[0], reach[0]), ylim=(-reach[1], reach[1]), xticks=[], yticks=[])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=tuple(DATA), default=list(DATA))
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=800, help="Optimizer steps per method.")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--drop_rate", type=float, default=0.5)
    parser.add_argument("--drop_rate_schedule", choices=("linear", "uniform"), default="uniform")
    parser.add_argument(
        "--train_trunk",
        choices=("all", "head", "none"),
        default="all",
        help="In masked-freeze steps, train stem and head too (all), only the head, or none of them.",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/figure"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    options = parse(arguments)
    torch.set_num_threads(1)
    results = {}
    for name in options.data:
        data = load(name, options.seed)
        models = {method: train(data, method, options) for method in METHODS}
        results[name] = {method: describe(model, data) for method, model in models.items()}
        path = options.output_dir / f"feature_distribution_{name}.png"
        draw(name, data, models, results[name], path)
        print(f"{path}\n{json.dumps(results[name], indent=1)}", flush=True)
    return results


if __name__ == "__main__":
    main()
