"""From a command line, and a file of options, to the options of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from hf_featreuse.errors import ConfigurationError, FeatureReuseError
from hf_featreuse.program.arguments import (
    DEFAULT_CHECKPOINT,
    DIGITS,
    FINE_TUNING,
    FROM_SCRATCH,
    DataArguments,
    ModelArguments,
    Options,
    RunArguments,
)
from hf_featreuse.program.checks import check_values, set_early_stopping
from hf_featreuse.program.config_file import ENDINGS, read_options, worth_saving
from hf_featreuse.program.help import help_text
from hf_featreuse.text import did_you_mean, flat, one_line, with_underscores
from hf_featreuse.trainer.arguments import FeatureReuseConfig

_Arguments = TypeVar("_Arguments")


class UsageError(ConfigurationError):
    """The command line cannot be read."""

    exit_code = 2


class _Parser(HfArgumentParser):
    """Complains in one line; argparse prints the usage of all flags first."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"The options cannot be read: {flat(message)}. `--help` lists them.")


def make_parser() -> HfArgumentParser:
    """The parser of every option: of the method, the data, the model, the run, and of `TrainingArguments`."""
    types: Any = (ModelArguments, DataArguments, RunArguments, FeatureReuseConfig)
    return _Parser(types, allow_abbrev=False, add_help=False)


def parse_arguments(argv: Sequence[str]) -> Options:
    """Read the options of a run from flags, or from a file with flags that override it.

    What is trained decides the defaults of training: the digits, a model from scratch, or a checkpoint.

    Args:
        argv (`Sequence[str]`): the command line without the program's name. `--config FILE`, or one word that ends in
            .json, .yaml or .yml, names a file of options. Dashes in names of flags count as underscores.

    Returns:
        `Options`: the options.

    Raises:
        ConfigurationError: an option is unknown or has a value that cannot be used.
        SystemExit: with `--help` or `--help_all`, after printing it.

    Example:
        >>> from hf_featreuse.program import parse_arguments
        >>> options = parse_arguments(["--use-cpu", "--model-type", "convnext", "--drop-rate=0.2"])
        >>> options.model.model_type, options.training.drop_rate, options.training.learning_rate
        ('convnext', 0.2, 0.001)
    """
    argv = with_underscores(argv)
    parser = make_parser()
    if {"-h", "--help", "--help_all"} & set(argv):
        print(help_text(parser, everything="--help_all" in argv))
        raise SystemExit(0)
    argv, given = _with_file(argv)
    # A first look at the few flags that decide; what argparse makes of the rest follows below.
    named = {word[2:].split("=")[0] for word in argv if word[:2] == "--"}
    named |= {name for name, value in given.items() if value is not None}
    has_data = bool({"dataset_name", "train_dir", "validation_dir"} & named)
    has_checkpoint = "model_name_or_path" in named or (has_data and not {"model_type", "config_name"} & named)
    blank = vars(parser.parse_known_args([])[0])
    parser.set_defaults(**(FINE_TUNING if has_checkpoint else FROM_SCRATCH if has_data else DIGITS), **given)
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        known = [option for action in parser._actions for option in action.option_strings if "-" not in option[2:]]
        hint = did_you_mean(rest[0], known) or " `--help` lists the flags."
        raise UsageError(f"`{flat(' '.join(rest))}` is not a flag.{hint}")
    values = vars(namespace)
    if has_checkpoint and values["model_name_or_path"] is None:
        values["model_name_or_path"] = DEFAULT_CHECKPOINT
    _check_model(values)
    set_early_stopping(values, named)
    # An evaluation strategy sets do_eval by itself, so the flags are asked.
    if not {"do_train", "do_eval", "do_predict"} & named:
        values["do_train"] = values["do_eval"] = True
    return _as_options(values, worth_saving(values, blank))


def _with_file(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The flags behind those of the file that they name, and what of the file no flag can express."""
    if len(argv) == 1 and argv[0].endswith(ENDINGS):
        return read_options(argv[0])
    finder = _Parser([], allow_abbrev=False, add_help=False)
    finder.add_argument("--config", default=None)
    found, others = finder.parse_known_args(argv)
    if found.config is None:
        return argv, {}
    flags, given = read_options(found.config)
    return [*flags, *others], given


def _check_model(values: dict[str, Any]) -> None:
    if values["model_name_or_path"] and values["model_type"]:
        raise ConfigurationError(
            f"`--model_name_or_path {values['model_name_or_path']}` fine-tunes and `--model_type "
            f"{values['model_type']}` trains from scratch. Pass one of them."
        )


def _as_options(values: dict[str, Any], saved: dict[str, Any]) -> Options:
    data, model, run = _made(DataArguments, values), _made(ModelArguments, values), _made(RunArguments, values)
    try:
        training = _made(FeatureReuseConfig, values)
    except FeatureReuseError:
        raise
    except Exception as error:  # Of TrainingArguments, which raises what it likes.
        raise ConfigurationError(f"The options cannot be used: {one_line(error)} `--help` lists them.") from error
    check_values(model, data, run, training)
    return Options(data, model, run, training, saved)


def _made(kind: type[_Arguments], values: dict[str, Any]) -> _Arguments:
    """The dataclass with its share of the values."""
    fields: Any = kind
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(fields) if field.init})
