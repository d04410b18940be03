"""The console command `featreuse`: a table of verbs; each has a module of the same name in `hf_featreuse.commands`.

Results go to stdout. Errors go to stderr, in one line, and the exit code is 1, or 2 if the command line cannot be
parsed. Dashes and underscores are equivalent in the names of flags. Control characters in names of files and in text
from models and servers are escaped in both outputs. An unexpected error is one line too;
`python -X dev -m hf_featreuse ...` shows its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from hf_featreuse.errors import ConfigurationError, FeatureReuseError, torchvision_misfit
from hf_featreuse.text import flat, kind_and_text, printable, with_underscores


@dataclass(frozen=True)
class Verb:
    """One verb of the command.

    Args:
        name (`str`): what the user types after `featreuse`, and the name of the module. The module defines
            `add_arguments(parser)` and `run(options)`, which is called with stdout redirected to stderr and returns
            the text for stdout. The module of a program defines `run_program(argv)`, which parses its own flags,
            prints while it runs and returns the exit code.
        summary (`str`): one line for `featreuse --help`.
        description (`str`): for `featreuse NAME --help`.
        is_program (`bool`, defaults to `False`): whether the module defines `run_program`.
    """

    name: str
    summary: str
    description: str
    is_program: bool = False


VERBS = (
    Verb(
        name="train",
        summary="train or fine-tune an image classifier with feature reuse",
        description="Train an image classifier from scratch, or fine-tune a checkpoint, with every option of the "
        "method and of Trainer; then evaluate it and write model, metrics, report, plot and model card to a folder.",
        is_program=True,
    ),
    Verb(
        name="inspect",
        summary="show a model's residual blocks and what training them costs",
        description="Show the residual blocks of an image classifier in forward order, with their parameters, their "
        "share of the arithmetic of a step and their survival probability; the expected cost of each kind of step "
        "relative to a vanilla step; and which modules cannot be skipped, and why. Reads only the configuration.",
    ),
    Verb(
        name="evaluate",
        summary="report accuracy by class, calibration and mistakes of a trained model",
        description="Evaluate a trained image classifier on labeled images: accuracy with its 95 % confidence "
        "interval, precision, recall and F1 of each class, confusion matrix, calibration, and the most confident "
        "mistakes. "
        "Writes evaluation.json, plots and one self-contained index.html to a folder.",
    ),
    Verb(
        name="predict",
        summary="classify image files and write the predictions to a file",
        description="Classify image files, and the images in folders, with a trained image classifier, and write one "
        "row per image to a CSV, JSON lines or Parquet file. Files that cannot be decoded are listed and left out.",
    ),
    Verb(
        name="analyze",
        summary="compare what the residual blocks of trained models do",
        description="Compare trained image classifiers side by side: linear CKA between their blocks, the norm of "
        "each block's residual branch, accuracy without each block, without the last or random blocks, and after each "
        "depth. "
        "Writes analysis.json, plots and one self-contained index.html to a folder.",
    ),
    Verb(
        name="prune",
        summary="remove residual blocks and save a shallower model",
        description="Remove residual blocks of a trained image classifier, either named or chosen so that accuracy on "
        "validation data drops least, and save an ordinary checkpoint of the same class. Its logits equal those of "
        "the model with the blocks skipped; a choice that the configuration cannot express is an error.",
    ),
    Verb(
        name="export",
        summary="write a trained model for another runtime and check its logits",
        description="Export a trained image classifier to ONNX, OpenVINO, ExecuTorch or a program of torch.export, "
        "for any batch size. The export is loaded again, its logits are compared with those of the model, and both "
        "are timed.",
    ),
    Verb(
        name="push",
        summary="publish a finished run or a saved model on the Hub",
        description="Push model, image processor, configuration, plot, results and model card of a folder to a "
        "repository on the Hub; a push that failed can be repeated. Everything is checked first, nothing in the "
        "folder changes, and optimizer states are not pushed unless --checkpoints is given.",
    ),
    Verb(
        name="env",
        summary="list versions and devices for a bug report",
        description="List the versions of Python, of this package and of its dependencies, the platform and the "
        "devices.",
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
    arguments = with_underscores(sys.argv[1:] if arguments is None else arguments)
    if verb := next((verb for verb in VERBS if verb.is_program and arguments[:1] == [verb.name]), None):
        module = importlib.import_module(f"hf_featreuse.commands.{verb.name}")
        return _guarded(lambda: module.run_program(arguments[1:]))
    options = _parser(arguments).parse_args(arguments)
    return _guarded(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    """Run a verb and print what it returns."""
    _check_words(options)
    with _quiet():
        text = options.run(options)
    try:
        print(_encodable(printable(text, keep="\n")), flush=True)
    except BrokenPipeError:
        # The reader, such as `head`, closed the pipe; Python would report the same error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _guarded(action: Callable[[], int]) -> int:
    """Run an action and return its exit code; an error becomes one line on stderr."""
    try:
        return action()
    except (FeatureReuseError, OSError) as error:
        return _fail(flat(error) or type(error).__name__, code=getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C.", code=130)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        if explained := torchvision_misfit(error):
            return _fail(str(explained))
        return _fail(
            f"unexpected error: {kind_and_text(error)}. `python -X dev -m hf_featreuse` with the same arguments shows "
            "the traceback."
        )


def _check_words(options: argparse.Namespace) -> None:
    """Raise for empty arguments, as from a shell variable that is not set: as a path it is the working directory."""
    for name, value in vars(options).items():
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and (not word.strip() or "\0" in word):
                raise ConfigurationError(
                    f"`{name}={word!r}` {'is empty' if not word.strip() else 'contains a null character'}. Pass a "
                    "value, or leave it out."
                )


def _fail(message: str, code: int = 1) -> int:
    print(f"featreuse: {message}", file=sys.stderr)
    return code


def _encodable(text: str) -> str:
    """Return the text with characters escaped that the encoding of stdout lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class _Parser(argparse.ArgumentParser):
    """A parser whose error messages escape control characters."""

    def error(self, message: str) -> NoReturn:
        super().error(flat(message))


class _Version(argparse.Action):
    """Print the version, which only this option imports."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from hf_featreuse import __version__

        print(f"featreuse {__version__}")
        parser.exit()


def _parser(named: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser, with arguments only of the verbs on the command line: their imports take time."""
    parser = _Parser(prog="featreuse", description="Train residual image classifiers with feature reuse.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb_parser = verbs.add_parser(
            verb.name,
            help=verb.summary,
            description=verb.description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if verb.name in named and not verb.is_program:
            module = importlib.import_module(f"hf_featreuse.commands.{verb.name}")
            module.add_arguments(verb_parser)
            verb_parser.set_defaults(run=module.run)
    return parser


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Redirect stdout, and show only errors of libraries, while a verb runs."""
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
