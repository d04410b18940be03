"""Options of the commands that read trained models and data: which images, which device, progress bars."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from hf_featreuse.data import ImageData

DIGITS = "digits"
_MOST = 2**32 - 1


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the images."""
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
        help="which images; without a validation split, 15 %% of the training images, drawn with the seed as in "
        "training",
    )
    parser.add_argument(
        "--image_column_name", default=argparse.SUPPRESS, help="column of the images, if it has an unusual name"
    )
    parser.add_argument(
        "--label_column_name", default=argparse.SUPPRESS, help="column of the labels, if it has an unusual name"
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of everything that is drawn, such as images")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the device and the progress bars."""
    parser.add_argument(
        "--device", default=argparse.SUPPRESS, help="device, such as cpu or cuda:0; by default CUDA if available"
    )
    parser.add_argument("--disable_tqdm", action="store_true", help="show no progress bars")


def load_data(options: argparse.Namespace) -> ImageData:
    """Load the requested split."""
    from hf_featreuse.data import load_image_data

    return load_image_data(
        None if options.data == DIGITS else options.data,
        getattr(options, "data_config", None),
        image_column_name=getattr(options, "image_column_name", None),
        label_column_name=getattr(options, "label_column_name", None),
        seed=options.seed,
        splits=(options.split,),
    )


def check_least(options: argparse.Namespace, **least: int) -> None:
    """Refuse options below a bound, such as `batch_size=1`, or above what libraries accept as a seed or a count."""
    from hf_featreuse.errors import ConfigurationError

    for option, bound in least.items():
        value = getattr(options, option)
        if value < bound:
            raise ConfigurationError(f"`{option}={value}` (--{option}) is below {bound}. Pass {bound} or more.")
        if value > _MOST:
            raise ConfigurationError(f"`{option}={value}` (--{option}) is too large. Pass {_MOST} or less.")


def chosen_device(options: argparse.Namespace) -> torch.device:
    """Return the requested device.

    Raises:
        ConfigurationError: it cannot be used.
    """
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


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
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
