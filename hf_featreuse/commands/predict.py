"""The command `featreuse predict`."""

from __future__ import annotations

import argparse
import sys

from hf_featreuse.commands.data_options import add_device_arguments, chosen_device, progress_bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to the command's parser."""
    parser.add_argument("model", metavar="MODEL", help="a local checkpoint folder of an image classifier, or a Hub id")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="image files, and folders that are searched for images"
    )
    parser.add_argument(
        "--output",
        default="predictions.csv",
        metavar="FILE",
        help="where to write the predictions: a file that ends in .csv, .jsonl or .parquet",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("--top_k", type=int, default=1, help="classes per image, most probable first")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch")
    add_device_arguments(parser)


def run(options: argparse.Namespace) -> str:
    """Classify the images and return where the predictions are."""
    from pathlib import Path

    from torch import nn

    from hf_featreuse.data.evaluation import open_classifier
    from hf_featreuse.evaluation.predicting import check_output, image_files, predict_files
    from hf_featreuse.text import flat

    device = chosen_device(options)
    check_output(Path(options.output), options.overwrite)
    image_files(options.images)
    with progress_bars(not options.disable_tqdm):
        opened = open_classifier(options.model)
        nn.Module.to(opened.model, device)
        predicted = predict_files(
            opened,
            options.images,
            options.output,
            top_k=options.top_k,
            batch_size=options.batch_size,
            overwrite=options.overwrite,
            disable_tqdm=options.disable_tqdm,
        )
    for line in predicted.unreadable:
        print(f"not an image: {flat(line)}", file=sys.stderr)
    left_out = f"; {len(predicted.unreadable)} could not be decoded" if predicted.unreadable else ""
    return f"{predicted.count} images classified{left_out}. Predictions: {predicted.output}"
