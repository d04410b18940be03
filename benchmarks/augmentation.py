"""Time Mixup, CutMix, RandAugment and the weight average on the CPU, and print a table of medians.

OMP_NUM_THREADS=1 python benchmarks/augmentation.py
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_featreuse import BatchMixer, WeightAverage
from hf_featreuse.data import RandAugment, TrainTransform
from hf_featreuse.small_models import small_config


def median_ms(function: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call in milliseconds, after a warm-up call."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[1:])


def time_images(size: int, repeats: int) -> dict[str, float]:
    """Return the milliseconds of each operation on images of this size in pixels, by name."""
    batch, steps = torch.rand(64, 3, size, size), iter(range(10**6))
    noise = np.random.default_rng(0).integers(0, 256, (16, size, size, 3), dtype=np.uint8)
    images, rows = [Image.fromarray(pixels) for pixels in noise], np.arange(16)
    mixup, cutmix = BatchMixer(mixup_alpha=0.8), BatchMixer(cutmix_alpha=1.0)
    crop, augment = TrainTransform((size, size)), RandAugment()
    return {
        f"Mixup, 64 images of {size}": median_ms(lambda: mixup(batch, next(steps)), repeats),
        f"CutMix, 64 images of {size}": median_ms(lambda: cutmix(batch, next(steps)), repeats),
        f"crop and flip, an image of {size}": median_ms(lambda: crop.batch(images, rows, next(steps)), repeats) / 16,
        f"RandAugment, an image of {size}": median_ms(lambda: augment(images, rows, next(steps)), repeats) / 16,
    }


def time_average(repeats: int) -> dict[str, float]:
    """Return the milliseconds of updating a weight average of a ViT, by name."""
    overrides = "hidden_size=384,num_hidden_layers=12,num_attention_heads=6,intermediate_size=1536"
    config = small_config("vit", 32, 10, [str(label) for label in range(10)], overrides)
    model = AutoModelForImageClassification.from_config(config)
    average = WeightAverage(model, 0.999)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return {f"average of {millions:.1f} million weights, per step": median_ms(average.update, repeats)}


def measure(repeats: int = 20) -> dict[str, float]:
    """Return the milliseconds of each operation, by name."""
    return {**time_images(32, repeats), **time_images(224, repeats), **time_average(repeats)}


def main(repeats: int = 20) -> None:
    print("| what | ms |\n|---|---|")
    for name, milliseconds in measure(repeats).items():
        print(f"| {name} | {milliseconds:.2f} |")


if __name__ == "__main__":
    main()
