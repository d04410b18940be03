"""The verb `featreuse analyze`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from hf_featreuse.data import ImageData

DIGITS = "digits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the verb's parser its arguments."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="trained image classifiers to compare: local checkpoint folders or Hub ids",
    )
    parser.add_argument(
        "--data",
        default=DIGITS,
        metavar="NAME",
        help=f"`{DIGITS}`, scikit-learn's handwritten digits; the name of a data set on the Hub; or a local folder of "
        "parquet, arrow or images",
    )
    parser.add_argument(
        "--data_config", metavar="NAME", default=argparse.SUPPRESS, help="configuration of the data set"
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        default="validation",
        help="which images; without a validation split, 15 %% of the training images chosen by the seed, as in the "
        "example",
    )
    parser.add_argument("--max_samples", type=int, default=1000, help="most images to take, drawn by the seed")
    parser.add_argument(
        "--image_column_name", default=argparse.SUPPRESS, help="column of the images, where the usual names fail"
    )
    parser.add_argument(
        "--label_column_name", default=argparse.SUPPRESS, help="column of the labels, where the usual names fail"
    )
    parser.add_argument("--output_dir", default="outputs/analysis", metavar="DIR", help="folder for the report")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace the report in a folder that is not empty"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch, at least 4; CKA compares these")
    parser.add_argument(
        "--random_draws", type=int, default=10, help="sets of random blocks for each number of blocks; 0 for none"
    )
    parser.add_argument("--seed", type=int, default=42, help="decides the images, their order and the random sets")
    parser.add_argument(
        "--target_blocks",
        nargs="+",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="look at these blocks alone. One value is a regular expression that must match the whole name, several "
        "are names or dotted endings of names",
    )
    parser.add_argument(
        "--allow_inexact_skip",
        action="store_true",
        help="drop blocks too whose shortcut is no identity, such as GELU after the addition",
    )
    parser.add_argument(
        "--device", default=argparse.SUPPRESS, help="where to run, such as cpu or cuda:0; by default CUDA if there is"
    )
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--disable_tqdm", action="store_true", help="show no progress bars")


def run(options: argparse.Namespace) -> str:
    """Analyse the models, write the report, and give the tables as text."""
    from torch import nn

    from hf_featreuse.analysis.analyzing import analyze_model
    from hf_featreuse.analysis.report import write_report
    from hf_featreuse.data.evaluation import class_notes, evaluation_loader, open_classifier
    from hf_featreuse.method.blocks import find_residual_blocks

    _check(options)
    targets = getattr(options, "target_blocks", None)
    with _progress_bars(not options.disable_tqdm):
        data = _load_data(options)
        split = data.splits[options.split]
        target = targets[0] if targets and len(targets) == 1 else targets
        opened = [open_classifier(name) for name in options.models]
        blocks = [find_residual_blocks(one.model, target_blocks=target) for one in opened]
        loaders = [
            evaluation_loader(
                one,
                split,
                data.label_names,
                batch_size=options.batch_size,
                max_samples=options.max_samples,
                seed=options.seed,
                num_workers=options.num_workers,
            )
            for one in opened
        ]
        analyses = []
        for one, found, loader in zip(opened, blocks, loaders, strict=True):
            nn.Module.to(one.model, _device(options))
            analysis = analyze_model(
                one.model,
                loader,
                found,
                random_draws=options.random_draws,
                seed=options.seed,
                allow_inexact_skip=options.allow_inexact_skip,
                name=one.name,
                disable_tqdm=options.disable_tqdm,
            )
            notes = [*analysis.notes, *class_notes(one, data.label_names)]
            analyses.append(dataclasses.replace(analysis, notes=notes))
            nn.Module.to(one.model, "cpu")
    about = {
        "data": options.data if data.name is None else data.name,
        "split": options.split,
        "images": analyses[0].num_samples,
        "batch size": options.batch_size,
        "random draws": options.random_draws,
        "seed": options.seed,
    }
    page = write_report(analyses, options.output_dir, data=about, overwrite=options.overwrite_output_dir)
    return "\n\n".join([*map(str, analyses), f"Report: {page}"])


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be refused without loading anything."""
    from hf_featreuse.analysis.analyzing import check_options
    from hf_featreuse.analysis.similarity import SMALLEST_BATCH
    from hf_featreuse.commands.data_options import check_least
    from hf_featreuse.errors import ConfigurationError
    from hf_featreuse.plotting.report_folder import check_output_dir

    check_options(options.random_draws, options.seed)
    check_least(options, batch_size=SMALLEST_BATCH, max_samples=SMALLEST_BATCH, num_workers=0, seed=0)
    doubled = {name for name in options.models if options.models.count(name) > 1}
    if doubled:
        raise ConfigurationError(f"`{sorted(doubled)[0]}` is named twice. Pass each model once.")
    _device(options)
    check_output_dir(options.output_dir, options.overwrite_output_dir)


def _device(options: argparse.Namespace) -> torch.device:
    import torch

    from hf_featreuse.errors import ConfigurationError

    name = getattr(options, "device", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:
        raise ConfigurationError(
            f"`device={name!r}` (--device) cannot be used: {str(error).splitlines()[0]} Pass cpu, or a device of this "
            "machine."
        ) from None
    return device


def _load_data(options: argparse.Namespace) -> ImageData:
    """Load the one split that is asked for."""
    from hf_featreuse.data import load_image_data

    return load_image_data(
        None if options.data == DIGITS else options.data,
        getattr(options, "data_config", None),
        image_column_name=getattr(options, "image_column_name", None),
        label_column_name=getattr(options, "label_column_name", None),
        seed=options.seed,
        splits=(options.split,),
    )


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide the bars of transformers and datasets until the exit."""
    import datasets
    import transformers

    was_shown = transformers.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    if not shown:
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown and was_shown[0]:
            transformers.logging.enable_progress_bar()
        if not shown and not was_shown[1]:
            datasets.enable_progress_bars()
