"""Measure images per second from JPEG files to training steps: of each stage, and of plain and feature-reuse training.

    OMP_NUM_THREADS=2 python benchmarks/images.py --json benchmarks/results/images_vit_cpu.json

Writes JPEG files of 500 x 375 pixels, smooth noise at quality 90, and reads them as the training example does: decode,
random crop to 224 pixels and flip, collate. Each stage is timed separately on one core; then Trainer and
FeatureReuseTrainer train in turn on the files, and on one batch in memory, which shows the cost of reading.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from speed import described, timed_arguments, timed_training
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_featreuse import FeatureReuseConfig, FeatureReuseTrainer
from hf_featreuse.data import ImageCollator, ImageSplit, TrainTransform, load_image_data
from hf_featreuse.small_models import small_config, small_image_processor

SIZE = 224
# Seconds per timed stage.
SECONDS = 2.0
# One step of each kind per cycle, as in benchmarks/speed.py.
UNIFORM = {"drop_rate": 0.5, "drop_rate_schedule": "uniform", "stochastic_depth_steps": 1}
ARMS = {
    "Trainer": (Trainer, TrainingArguments, {}),
    "FeatureReuseTrainer": (FeatureReuseTrainer, FeatureReuseConfig, UNIFORM),
}


def write_images(folder: Path, count: int) -> None:
    """Write an image folder of two classes."""
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def rate(stage: Callable[[], object], images: int) -> float:
    """Return the images per second of a stage that processes `images` images per call."""
    stage()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        stage()
        calls += 1
    return calls * images / (time.perf_counter() - started)


def measure_stages(files: list[Path], split: ImageSplit, collator: ImageCollator) -> dict[str, float]:
    """Return the images per second of each stage before the model, timed separately on one core."""
    count, transform = len(files), TrainTransform((SIZE, SIZE), seed=0)
    encoded = [file.read_bytes() for file in files]
    decoded = [decode(data) for data in encoded]
    read = split.with_transform(transform)
    examples = read.__getitems__(range(count))
    return {
        "decode": rate(lambda: [decode(data) for data in encoded], count),
        "crop, resize, flip": rate(lambda: transform.batch(decoded, np.arange(count), 0), count),
        "collate and normalize": rate(lambda: collator(examples), count),
        "all of these": rate(lambda: collator(read.__getitems__(range(count))), count),
    }


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def measure_training(split: ImageSplit, collator: ImageCollator, options: argparse.Namespace) -> dict[str, dict]:
    """Return the seconds of the steps of each trainer: from files with and without workers, and from memory."""
    torch.manual_seed(0)
    config = small_config("vit", SIZE, num_labels=2, overrides=options.config_overrides)
    weights = AutoModelForImageClassification.from_config(config).state_dict()
    from_files = split.with_transform(TrainTransform((SIZE, SIZE), seed=0))
    from_memory = [from_files[index] for index in range(options.batch_size)]
    sources = {"memory": (from_memory, 0)} | {f"files, {n} workers": (from_files, n) for n in options.workers}
    seconds: dict[str, dict] = {source: defaultdict(list) for source in sources}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.rounds):
            for source, (data, workers) in sources.items():
                for name in [*ARMS][:: 1 if index % 2 == 0 else -1]:
                    trainer_class, config_class, reuse = ARMS[name]
                    args = timed_arguments(
                        config_class,
                        folder,
                        options,
                        index,
                        dataloader_num_workers=workers,
                        bf16=torch.cuda.is_available(),
                        **reuse,
                    )
                    model = AutoModelForImageClassification.from_config(config)
                    model.load_state_dict(weights)
                    trainer = trainer_class(model, args, train_dataset=data, data_collator=collator)
                    seconds[source][name] += timed_training(trainer, warm_up=2).values()
            print(f"round {index + 1} of {options.rounds}", flush=True)
    return seconds


def tables(found: dict) -> str:
    """Return the figures as two Markdown tables."""
    lines = ["| stage, on one core | images a second |", "|---|---|"]
    lines += [f"| {stage} | {value:,.0f} |" for stage, value in found["stages"].items()]
    lines += ["", "| images from | Trainer, images a second | FeatureReuseTrainer | time of a step, ratio |"]
    lines.append("|---|---|---|---|")
    batch = found["settings"]["batch_size"]
    for source, seconds in found["seconds"].items():
        means = {name: statistics.fmean(seconds[name]) for name in ARMS}
        rates = " | ".join(f"{batch / mean:.1f}" for mean in means.values())
        lines.append(f"| {source} | {rates} | {means['FeatureReuseTrainer'] / means['Trainer']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="JPEG files to write.")
    parser.add_argument(
        "--config_overrides",
        default="hidden_size=384,num_hidden_layers=12,num_attention_heads=6,intermediate_size=1536",
        help="Configuration of the ViT at 224 pixels.",
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="Numbers of data workers to time.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="Optimizer steps per round; the first two are warm-up.")
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.images)
        split = load_image_data(train_dir=folder, train_val_split=None, splits=("train",)).splits["train"]
        files = sorted(Path(folder).rglob("*.jpg"))[: options.batch_size * 4]
        processor = small_image_processor("vit", SIZE)
        collator = ImageCollator.from_processor(processor)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        stages = measure_stages(files, split, collator)
        torch.set_num_threads(threads)
        seconds = measure_training(split, collator, options)
    found = {**described(options), "stages": stages, "seconds": seconds}
    print(f"{found['device']}, {found['threads']} threads, {found['versions']}\n\n{tables(found)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
