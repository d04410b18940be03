"""The console command `featreuse`: a table of verbs; each has a module of its name in `hf_featreuse.commands`.

Results go to stdout. What went wrong goes to stderr, in one line, and the exit code is 1, or 2 if the command line
cannot be read. Dashes and underscores are the same in the name of a flag. What either output holds of file names,
models and servers is escaped where a terminal would obey it. An error that nobody foresaw is one line too;
`python -X dev -m hf_featreuse ...` shows where it happened.
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
        name (`str`): what the user types after `featreuse`; also of its module, which has `add_arguments(parser)` and
            `run(options)`, called with stdout diverted to stderr, which returns the text for stdout. The module of a
            program has `run_program(argv)`, which reads its own flags, prints as it runs and returns the exit code.
        summary (`str`): one line for `featreuse --help`.
        description (`str`): for `featreuse NAME --help`.
        is_program (`bool`, defaults to `False`): whether the module has `run_program`.
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
        "against a vanilla step; and which modules cannot be skipped, and why. Reads the configuration alone.",
    ),
    Verb(
        name="evaluate",
        summary="report accuracy by class, calibration and mistakes of a trained model",
        description="Evaluate a trained image classifier on labelled images: accuracy with its 95 % interval, "
        "precision, recall and F1 of each class, confusion matrix, calibration, and the most confident mistakes. "
        "Writes evaluation.json, plots and one self-contained index.html to a folder.",
    ),
    Verb(
        name="predict",
        summary="classify image files and write the predictions to a file",
        description="Classify image files, and the images in folders, with a trained image classifier, and write one "
        "row per image to a CSV, JSON lines or Parquet file. Files that cannot be decoded are named and left out.",
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
        name="export",
        summary="write a trained model for another runtime and check its logits",
        description="Export a trained image classifier to ONNX, OpenVINO, ExecuTorch or a program of torch.export, "
        "for any batch size. The saved export is loaded again; its logits are compared with those of the model, and "
        "both are timed.",
    ),
    Verb(
        name="push",
        summary="publish a finished run or a saved model on the Hub",
        description="Push model, image processor, configuration, plot, results and model card of a folder to a "
        "repository on the Hub, also again after a push that failed. Everything is checked first, nothing in the "
        "folder changes, and optimizer states stay here unless --checkpoints is given.",
    ),
    Verb(
        name="env",
        summary="list versions and devices for a bug report",
        description="List the versions of Python, of this package and of what it uses, the platform and the devices.",
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
        # The reader, such as `head`, has seen enough; Python would complain of the rest once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _guarded(action: Callable[[], int]) -> int:
    """The exit code of an action; an error becomes one line on stderr."""
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
            f"an error that was not foreseen: {kind_and_text(error)}. `python -X dev -m hf_featreuse` with the same "
            "arguments shows where."
        )


def _check_words(options: argparse.Namespace) -> None:
    """Refuse empty arguments, which a shell makes of variables that are not set: as a path one is the folder here."""
    for name, value in vars(options).items():
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and (not word.strip() or "\0" in word):
                raise ConfigurationError(
                    f"`{name}={word!r}` is {'empty' if not word.strip() else 'not a text'}. Pass a value, or leave it "
                    "out."
                )


def _fail(message: str, code: int = 1) -> int:
    print(f"featreuse: {message}", file=sys.stderr)
    return code


def _encodable(text: str) -> str:
    """The text with escapes for what the encoding of stdout lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints quote no control characters."""

    def error(self, message: str) -> NoReturn:
        super().error(flat(message))


class _Version(argparse.Action):
    """Prints the version, which only this option needs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from hf_featreuse import __version__

        print(f"featreuse {__version__}")
        parser.exit()


def _parser(named: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of those verbs that are named: what they import takes time."""
    parser = _Parser(prog="featreuse", description="Train residual image classifiers whose layers reuse features.")
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
