"""Options in files: read from YAML or JSON, and saved as the `run.yaml` that repeats a run."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
import transformers
import yaml

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.program.arguments import DIGITS, FINE_TUNING, DataArguments, ModelArguments, Options, RunArguments
from hf_featreuse.text import did_you_mean, flat, one_line
from hf_featreuse.trainer.arguments import FeatureReuseArguments, FeatureReuseConfig, RecipeArguments

RUN_FILE = "run.yaml"
ENDINGS = (".json", ".yaml", ".yml")
# Only on the command line: where options come from, and how many processes to launch.
_NOT_IN_FILES = ("config", "launch")
_NOT_SAVED = (*_NOT_IN_FILES, "overwrite_output_dir", "resume_from_checkpoint", "local_rank")
_HINTS = {
    name: get_args(hint) or (hint,)
    for options in (ModelArguments, DataArguments, RunArguments, FeatureReuseConfig)
    for name, hint in get_type_hints(options).items()
}


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans: `eval_strategy: no` is a word, as on the command line."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|false|False)$"), "tTfF")


def read_options(name: str) -> tuple[list[str], dict[str, Any]]:
    """Return the options of a file as flags, which argparse checks, and those without a flag form: null and lists."""
    content = _read(name)
    argv, given = [], {}
    for key, value in content.items():
        option = str(key).replace("-", "_")
        if option not in _HINTS or option in _NOT_IN_FILES:
            hint = did_you_mean(option, list(_HINTS)) or " `--help_all` lists the options; write them without dashes."
            if option in _NOT_IN_FILES:
                hint = " Pass it on the command line."
            raise ConfigurationError(f"`{flat(key)}` in `{flat(name)}` is not an option for a file.{hint}")
        kinds = {get_origin(hint) or hint for hint in _HINTS[option]}
        if isinstance(value, (list, dict, type(None))) and type(value) not in kinds:
            raise ConfigurationError(
                f"`{option}` is {json.dumps(value, default=str)[:80]} in `{flat(name)}`. Pass a value of another "
                "type, or leave it out."
            )
        if value is None or isinstance(value, list):
            given[option] = value
        else:
            argv.append(f"--{option}={json.dumps(value) if isinstance(value, (dict, bool)) else value}")
    return argv, given


def _read(name: str) -> dict[Any, Any]:
    if not name.endswith(ENDINGS):
        raise ConfigurationError(f"`--config {flat(name)}` does not end in .yaml, .yml or .json. Pass such a file.")
    kind = "JSON" if name.endswith(".json") else "YAML"
    try:
        text = Path(name).read_text(encoding="utf-8")
        content = json.loads(text) if kind == "JSON" else yaml.load(text, _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigurationError(
            f"`{flat(name)}` cannot be read as {kind}: {one_line(error)} Fix the file."
        ) from error
    if not isinstance(content, dict):
        what = "nothing" if content is None and kind == "YAML" else f"a {type(content).__name__}"
        raise ConfigurationError(
            f"`{flat(name)}` contains {what}. Pass a file of options by name, such as `drop_rate: 0.3`."
        )
    return content


@contextlib.contextmanager
def saved_options(options: Options) -> Iterator[None]:
    """Save the options as `run.yaml` before training; remove it if the run fails before its first checkpoint."""
    args = options.training
    file = Path(str(args.output_dir)) / RUN_FILE
    if not args.should_save:
        yield
        return
    before = file.read_bytes() if file.is_file() else None
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_yaml(options), encoding="utf-8")
    try:
        yield
    except BaseException:
        if not any(file.parent.glob("checkpoint-*")):
            file.unlink(missing_ok=True)
            if before is not None:
                file.write_bytes(before)
        raise


def as_yaml(options: Options) -> str:
    """Return the options as the text of a file that repeats the run, without tokens."""
    from hf_featreuse import __version__

    values = dict(options.resolved)
    lines = [
        f"# featreuse train --config {RUN_FILE} --output_dir OTHER_FOLDER repeats this run. Flags override the file.",
        f"# Written with hf_featreuse {__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {options.training.world_size} process"
        f"{'es' if options.training.world_size > 1 else ''}.",
    ]
    for title, names in sections().items():
        chosen = {name: _plain(values.pop(name)) for name in names if name in values}
        if chosen:
            text = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, width=1000)
            lines += ["", f"# {title}", text.rstrip()]
    return "\n".join(lines) + "\n"


def sections() -> dict[str, list[str]]:
    """Return the names of all options by topic."""
    found = {
        "method": [field.name for field in dataclasses.fields(FeatureReuseArguments)],
        "data": [field.name for field in dataclasses.fields(DataArguments)],
        "model": [field.name for field in dataclasses.fields(ModelArguments)],
        "recipe": [field.name for field in dataclasses.fields(RecipeArguments)],
        "run": [field.name for field in dataclasses.fields(RunArguments)],
    }
    taken = {name for names in found.values() for name in names}
    found["training"] = [field.name for field in dataclasses.fields(FeatureReuseConfig) if field.name not in taken]
    return found


def worth_saving(values: dict[str, Any], blank: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a file needs to repeat and to describe the run; no tokens.

    Args:
        values (`dict[str, Any]`): all options of a run by name.
        blank (`dict[str, Any]`): all options as they are without flags and without defaults by what is trained.
    """
    always = {name for title, names in sections().items() if title != "training" for name in names}
    always |= {*DIGITS, *FINE_TUNING}
    return {
        name: value
        for name, value in values.items()
        if not (name in _NOT_SAVED or name.endswith("token"))
        if value != blank[name] or (name in always and (value is not None or name in DIGITS))
    }


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


DEFAULTS = {
    field.name: _default(field)
    for options in (DataArguments, ModelArguments, RunArguments, FeatureReuseConfig)
    for field in dataclasses.fields(options)
}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, float) and value.is_integer():
        return int(value)  # Some of our own defaults are written as 1.0.
    return list(value) if isinstance(value, tuple) else value
