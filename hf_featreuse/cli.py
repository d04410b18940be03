"""The console command `featreuse`: a table of verbs, each with its arguments and what it runs.

Results go to stdout. What went wrong goes to stderr, in one line, and the exit code is 1; argparse's own complaints
exit with 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import huggingface_hub.utils
import transformers

from hf_featreuse.analysis import command as analysis_command
from hf_featreuse.errors import FeatureReuseError
from hf_featreuse.method.freezing import TrainTrunk
from hf_featreuse.commands.push import add_push_arguments, push
from hf_featreuse.inspection import inspect_model
from hf_featreuse.commands.prune import add_prune_arguments, prune
from hf_featreuse.method.schedule import DropRateSchedule


@dataclass(frozen=True)
class Verb:
    """One verb of the command.

    Args:
        name (`str`): what the user types after `featreuse`.
        summary (`str`): one line for `featreuse --help`.
        description (`str`): for `featreuse NAME --help`.
        add_arguments (`Callable`): gives the verb's parser its arguments.
        run (`Callable`): does the work with stdout diverted to stderr, and returns the text for stdout.
    """

    name: str
    summary: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments (`Sequence[str]`, *optional*): by default those of the process.

    Example:
        >>> from hf_featreuse.cli import main
        >>> main(["inspect", "vit"])  # doctest: +ELLIPSIS
        vit: ViTForImageClassification, ... parameters
        12 residual blocks of class ViTLayer, ...
        0
    """
    options = _parser().parse_args(arguments)
    try:
        with _quiet():
            text = options.run(options)
    except (FeatureReuseError, OSError) as error:
        print(f"featreuse: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python would complain of the rest once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="featreuse", description="Train residual image classifiers whose layers reuse features."
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb_parser = verbs.add_parser(
            verb.name,
            help=verb.summary,
            description=verb.description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        verb.add_arguments(verb_parser)
        verb_parser.set_defaults(run=verb.run)
    return parser


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep stdout clean, and libraries to their errors, while a verb runs."""
    transformers_logging, hub_logging = transformers.utils.logging, huggingface_hub.utils.logging
    before = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers_logging.set_verbosity(before[0])
        hub_logging.set_verbosity(before[1])
        if had_bars:
            transformers_logging.enable_progress_bar()


# inspect


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a local checkpoint folder, a model type of transformers' image classifiers, such as vit, meaning its "
        "default configuration, or a Hub id",
    )
    parser.add_argument("--drop_rate", type=float, default=0.5, help="highest probability of dropping a block")
    parser.add_argument(
        "--drop_rate_schedule",
        choices=get_args(DropRateSchedule),
        default="linear",
        help="drop rates that rise with depth, or the same for all blocks",
    )
    parser.add_argument(
        "--stochastic_depth_steps", type=int, default=1, help="optimizer steps of stochastic depth in a cycle"
    )
    parser.add_argument(
        "--masked_freeze_steps", type=int, default=1, help="optimizer steps of masked freeze in a cycle"
    )
    parser.add_argument(
        "--vanilla_steps", type=int, default=0, help="plain optimizer steps at the start of each cycle"
    )
    parser.add_argument(
        "--train_trunk",
        choices=get_args(TrainTrunk),
        default="all",
        help="what outside the blocks trains in masked-freeze steps: all, only the head after the last block, or none",
    )
    parser.add_argument(
        "--target_blocks",
        nargs="+",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="which blocks take part; by default all. One value is a regular expression that must match the whole "
        "name, several are names or dotted endings of names",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, whose `blocks` is the list in order"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        default=argparse.SUPPRESS,
        help="also draw survival probability and arithmetic over depth (needs matplotlib)",
    )


def _inspect(options: argparse.Namespace) -> str:
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
    )
    if "plot" in options:
        from hf_featreuse.plotting import plot_inspection

        plot_inspection(report, options.plot)
    return json.dumps(report.to_dict(), indent=2) if options.json else str(report)


VERBS = (
    Verb(
        name="inspect",
        summary="show a model's residual blocks and what training them costs",
        description="Show the residual blocks of an image classifier in forward order, with their parameters, their "
        "share of the arithmetic of a step and their survival probability; the expected cost of each kind of step "
        "against a vanilla step; and which modules cannot be skipped, and why. Reads the configuration alone.",
        add_arguments=_add_inspect_arguments,
        run=_inspect,
    ),
    Verb(
        name="analyze",
        summary="compare what the residual blocks of trained models do",
        description="Compare trained image classifiers side by side: linear CKA between their blocks, the length of "
        "what each block adds, accuracy without each block, without the last or random blocks, and after each depth. "
        "Writes analysis.json, plots and one self-contained index.html to a folder.",
        add_arguments=analysis_command.add_arguments,
        run=analysis_command.run,
    ),
    Verb(
        name="prune",
        summary="remove residual blocks and save a shallower model",
        description="Remove residual blocks of a trained image classifier, named, or chosen by what the accuracy on "
        "validation data misses least, and save an ordinary checkpoint of the same class. Its logits equal those of "
        "the model that skips the blocks; what the configuration cannot express is refused.",
        add_arguments=add_prune_arguments,
        run=prune,
    ),
    Verb(
        name="push",
        summary="publish a finished run or a saved model on the Hub",
        description="Push model, image processor, configuration, plot, results and model card of a folder to a "
        "repository on the Hub, also again after a push that failed. Everything is checked first, nothing in the "
        "folder changes, and optimizer states stay here unless --checkpoints is given.",
        add_arguments=add_push_arguments,
        run=push,
    ),
)
