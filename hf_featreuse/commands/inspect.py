"""The verb `featreuse inspect`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, get_args

from hf_featreuse.method.schedule import DropRateSchedule, TrainTrunk

if TYPE_CHECKING:
    from hf_featreuse.inspection import Timing

# Defaults of the options that only --measure uses.
_DEFAULTS = {"device": "cpu", "batch_size": 8, "bf16": False, "compile": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a local checkpoint folder, a model type of transformers' image classifiers, such as vit (with its "
        "default configuration), or a Hub id",
    )
    parser.add_argument("--drop_rate", type=float, default=0.5, help="highest probability of dropping a block")
    parser.add_argument(
        "--drop_rate_schedule",
        choices=get_args(DropRateSchedule),
        default="linear",
        help="drop rates that increase linearly with depth, or the same for all blocks",
    )
    parser.add_argument(
        "--stochastic_depth_steps", type=int, default=3, help="optimizer steps of stochastic depth per cycle"
    )
    parser.add_argument(
        "--masked_freeze_steps", type=int, default=1, help="optimizer steps of masked freeze per cycle"
    )
    parser.add_argument(
        "--vanilla_steps", type=int, default=0, help="plain optimizer steps at the start of each cycle"
    )
    parser.add_argument(
        "--train_trunk",
        choices=get_args(TrainTrunk),
        default="all",
        help="which parameters outside the blocks train in masked-freeze steps: all, only the head after the last "
        "block, or none",
    )
    parser.add_argument(
        "--target_blocks",
        nargs="+",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="which blocks to use; by default all. One value is a regular expression that must match the whole name; "
        "several are names or dotted suffixes of names",
    )
    parser.add_argument(
        "--measure", action="store_true", help="also time each block, and predict the time of each kind of step"
    )
    parser.add_argument("--device", default=_DEFAULTS["device"], help="for --measure: the device, such as cuda")
    parser.add_argument(
        "--batch_size", type=int, default=_DEFAULTS["batch_size"], help="for --measure: images in the batch"
    )
    parser.add_argument("--bf16", action="store_true", help="for --measure: autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="for --measure: compile the blocks")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, whose `blocks` is the list in forward order"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        default=argparse.SUPPRESS,
        help="also plot survival probability and arithmetic over depth (needs matplotlib)",
    )


def run(options: argparse.Namespace) -> str:
    """Inspect a model and return the report."""
    from hf_featreuse.inspection import inspect_model, plot_inspection

    targets = getattr(options, "target_blocks", None)
    report = inspect_model(
        options.model,
        target_blocks=targets[0] if targets and len(targets) == 1 else targets,
        drop_rate=options.drop_rate,
        drop_rate_schedule=options.drop_rate_schedule,
        stochastic_depth_steps=options.stochastic_depth_steps,
        masked_freeze_steps=options.masked_freeze_steps,
        vanilla_steps=options.vanilla_steps,
        train_trunk=options.train_trunk,
        timing=_timing(options),
    )
    if "plot" in options:
        plot_inspection(report, options.plot)
    return json.dumps(report.to_dict(), indent=2) if options.json else str(report)


def _timing(options: argparse.Namespace) -> Timing | None:
    """Return what to time, or `None` without `--measure`."""
    from hf_featreuse.errors import ConfigurationError
    from hf_featreuse.inspection import Timing

    if options.measure:
        return Timing(options.device, options.batch_size, options.bf16, options.compile)
    given = [
        f"--{name}"
        for name in ("device", "batch_size", "bf16", "compile")
        if getattr(options, name) != _DEFAULTS[name]
    ]
    if given:
        raise ConfigurationError(f"`{given[0]}` has no effect without `--measure`. Add `--measure`, or leave it out.")
    return None
