"""The command `featreuse analyze`."""

from __future__ import annotations

import argparse
import dataclasses

from hf_featreuse.commands.data_options import (
    add_data_arguments,
    add_device_arguments,
    check_least,
    chosen_device,
    load_data,
    progress_bars,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to the command's parser."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="trained image classifiers to compare: local checkpoint folders or Hub ids",
    )
    add_data_arguments(parser)
    parser.add_argument("--max_samples", type=int, default=1000, help="maximum number of images, drawn with the seed")
    parser.add_argument("--output_dir", default="outputs/analysis", metavar="DIR", help="folder for the report")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace the report in a folder that is not empty"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch, at least 4, which CKA compares")
    parser.add_argument(
        "--random_draws", type=int, default=10, help="sets of random blocks for each number of blocks; 0 for none"
    )
    parser.add_argument(
        "--target_blocks",
        nargs="+",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="analyze only these blocks. One value is a regular expression that must match the whole name, several "
        "are names or dotted endings of names",
    )
    parser.add_argument(
        "--allow_inexact_skip",
        action="store_true",
        help="also drop blocks whose shortcut is not an identity, such as GELU after the addition",
    )
    add_device_arguments(parser)


def run(options: argparse.Namespace) -> str:
    """Analyze the models, write the report, and return the tables as text."""
    from torch import nn

    from hf_featreuse.analysis.analyzing import analyze_model
    from hf_featreuse.analysis.report import write_report
    from hf_featreuse.data.evaluation import class_notes, evaluation_loader, open_classifier
    from hf_featreuse.method.blocks import find_residual_blocks

    _check(options)
    targets = getattr(options, "target_blocks", None)
    with progress_bars(not options.disable_tqdm):
        data = load_data(options)
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
            nn.Module.to(one.model, chosen_device(options))
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
    """Check what can be checked without loading anything."""
    from hf_featreuse.analysis.analyzing import check_options
    from hf_featreuse.analysis.similarity import SMALLEST_BATCH
    from hf_featreuse.errors import ConfigurationError
    from hf_featreuse.plotting.report_folder import check_output_dir

    check_options(options.random_draws, options.seed)
    check_least(options, batch_size=SMALLEST_BATCH, max_samples=SMALLEST_BATCH, num_workers=0, seed=0)
    doubled = {name for name in options.models if options.models.count(name) > 1}
    if doubled:
        raise ConfigurationError(f"`{sorted(doubled)[0]}` is named twice. Pass each model once.")
    chosen_device(options)
    check_output_dir(options.output_dir, options.overwrite_output_dir)
