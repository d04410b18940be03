"""Parse a command line and a file of options into the options of a run."""

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
from hf_featreuse.program.checks import check_values, set_best_model, set_early_stopping
from hf_featreuse.program.config_file import ENDINGS, read_options, worth_saving
from hf_featreuse.program.help import help_text
from hf_featreuse.text import did_you_mean, flat, one_line, with_underscores
from hf_featreuse.trainer.arguments import FeatureReuseConfig

_Arguments = TypeVar("_Arguments")


class UsageError(ConfigurationError):
    """The command line cannot be parsed."""

    exit_code = 2


class _Parser(HfArgumentParser):
    """A parser whose errors are one line; that of argparse also prints the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"The options cannot be parsed: {flat(message)}. `--help` lists them.")


def make_parser() -> HfArgumentParser:
    """Return the parser of all options: method, data, model, run, and `TrainingArguments`."""
    types: Any = (ModelArguments, DataArguments, RunArguments, FeatureReuseConfig)
    return _Parser(types, allow_abbrev=False, add_help=False)


def parse_arguments(argv: Sequence[str]) -> Options:
    """Read the options of a run from flags, or from a file and flags that override it.

    The training defaults depend on what is trained: the digits, a model from scratch, or a checkpoint.

    Args:
        argv (`Sequence[str]`): the command line without the name of the program. `--config FILE`, or a single
            argument that ends in .json, .yaml or .yml, names a file of options. Dashes in names of flags are read as
            underscores.

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
    # The few flags that select the defaults are read first; argparse parses everything below.
    named = {word[2:].split("=")[0] for word in argv if word[:2] == "--"}
    named |= {name for name, value in given.items() if value is not None}
    has_data = bool({"dataset_name", "train_dir", "validation_dir"} & named)
    has_checkpoint = "model_name_or_path" in named or (has_data and not {"model_type", "config_name"} & named)
    blank = vars(parser.parse_known_args([])[0])
    trains = "do_train" in named or not {"do_eval", "do_predict"} & named
    fine_tuning = FINE_TUNING if trains else {}
    parser.set_defaults(**(fine_tuning if has_checkpoint else FROM_SCRATCH if has_data else DIGITS), **given)
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        known = [option for action in parser._actions for option in action.option_strings if "-" not in option[2:]]
        hint = did_you_mean(rest[0], known) or " `--help` lists the flags."
        raise UsageError(f"`{flat(' '.join(rest))}` is not a flag.{hint}")
    values = vars(namespace)
    if has_checkpoint and values["model_name_or_path"] is None:
        values["model_name_or_path"] = DEFAULT_CHECKPOINT
    _check_model(values)
    set_best_model(values, named)
    set_early_stopping(values, named)
    # An evaluation strategy sets do_eval, so look at the flags, not at the values.
    if not {"do_train", "do_eval", "do_predict"} & named:
        values["do_train"] = values["do_eval"] = True
    return _as_options(values, worth_saving(values, blank))


def _with_file(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the flags of the file followed by those of the command line, and the options without a flag form."""
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
    except Exception as error:  # TrainingArguments raises several types.
        raise ConfigurationError(f"The options cannot be used: {one_line(error)} `--help` lists them.") from error
    check_values(model, data, run, training)
    return Options(data, model, run, training, saved)


def _made(kind: type[_Arguments], values: dict[str, Any]) -> _Arguments:
    """Return the dataclass with its fields from the values."""
    fields: Any = kind
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(fields) if field.init})
