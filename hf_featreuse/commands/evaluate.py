"""The command `featreuse evaluate`."""

from __future__ import annotations

import argparse

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
    parser.add_argument("model", metavar="MODEL", help="a local checkpoint folder of an image classifier, or a Hub id")
    add_data_arguments(parser)
    parser.add_argument(
        "--max_samples",
        type=int,
        default=argparse.SUPPRESS,
        help="maximum number of images, drawn with the seed; by default all",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch")
    parser.add_argument("--num_mistakes", type=int, default=24, help="mistakes to show; 0 for none")
    parser.add_argument("--output_dir", default="outputs/evaluation", metavar="DIR", help="folder for the report")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace the report in a folder that is not empty"
    )
    add_device_arguments(parser)


def run(options: argparse.Namespace) -> str:
    """Evaluate the model, write the report, and return it as text."""
    from torch import nn

    from hf_featreuse.data.evaluation import open_classifier
    from hf_featreuse.evaluation.splits import report_on_split
    from hf_featreuse.plotting.report_folder import check_output_dir

    check_least(options, batch_size=1, num_workers=0, num_mistakes=0, seed=0)
    if "max_samples" in options:
        check_least(options, max_samples=1)
    device = chosen_device(options)
    check_output_dir(options.output_dir, options.overwrite_output_dir)
    with progress_bars(not options.disable_tqdm):
        data = load_data(options)
        opened = open_classifier(options.model)
        nn.Module.to(opened.model, device)
        evaluation, page = report_on_split(
            opened,
            data.splits[options.split],
            data.label_names,
            options.output_dir,
            about={"data": options.data if data.name is None else data.name, "split": options.split},
            batch_size=options.batch_size,
            seed=options.seed,
            max_samples=getattr(options, "max_samples", None),
            num_workers=options.num_workers,
            num_mistakes=options.num_mistakes,
            overwrite=options.overwrite_output_dir,
            disable_tqdm=options.disable_tqdm,
        )
    return f"{evaluation}\n\nReport: {page}"
