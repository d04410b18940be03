"""The console command `featreuse`: a table of verbs; each has a module of its name in `hf_featreuse.commands`.

Results go to stdout. What went wrong goes to stderr, in one line, and the exit code is 1; argparse's own complaints
exit with 2.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hf_featreuse.errors import FeatureReuseError


@dataclass(frozen=True)
class Verb:
    """One verb of the command.

    Args:
        name (`str`): what the user types after `featreuse`; also of its module, which has `add_arguments(parser)` and
            `run(options)`, called with stdout diverted to stderr, which returns the text for stdout.
        summary (`str`): one line for `featreuse --help`.
        description (`str`): for `featreuse NAME --help`.
    """

    name: str
    summary: str
    description: str


VERBS = (
    Verb(
        name="inspect",
        summary="show a model's residual blocks and what training them costs",
        description="Show the residual blocks of an image classifier in forward order, with their parameters, their "
        "share of the arithmetic of a step and their survival probability; the expected cost of each kind of step "
        "against a vanilla step; and which modules cannot be skipped, and why. Reads the configuration alone.",
    ),
    Verb(
        name="analyze",
        summary="compare what the residual blocks of trained models do",
        description="Compare trained image classifiers side by side: linear CKA between their blocks, the length of "
        "what each block adds, accuracy without each block, without the last or random blocks, and after each depth. "
        "Writes analysis.json, plots and one self-contained index.html to a folder.",
    ),
    Verb(
        name="prune",
        summary="remove residual blocks and save a shallower model",
        description="Remove residual blocks of a trained image classifier, named, or chosen by what the accuracy on "
        "validation data misses least, and save an ordinary checkpoint of the same class. Its logits equal those of "
        "the model that skips the blocks; what the configuration cannot express is refused.",
    ),
    Verb(
        name="push",
        summary="publish a finished run or a saved model on the Hub",
        description="Push model, image processor, configuration, plot, results and model card of a folder to a "
        "repository on the Hub, also again after a push that failed. Everything is checked first, nothing in the "
        "folder changes, and optimizer states stay here unless --checkpoints is given.",
    ),
)


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
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(arguments).parse_args(arguments)
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


def _parser(named: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of those verbs that are named: what they import takes time."""
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
        if verb.name in named:
            module = importlib.import_module(f"hf_featreuse.commands.{verb.name}")
            module.add_arguments(verb_parser)
            verb_parser.set_defaults(run=module.run)
    return parser


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep stdout clean, and libraries to their errors, while a verb runs."""
    import huggingface_hub.utils
    import transformers

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
