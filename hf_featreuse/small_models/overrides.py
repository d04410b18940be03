"""Read, check and set the options of a configuration that a user overrides."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from transformers import PreTrainedConfig

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.text import did_you_mean

Settings = dict[str, Any]

_NOT_OPTIONS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "transformers_version",
}


_ARGUMENTS = {"image_size": "image_size", "num_labels": "num_labels", "id2label": "label_names"}


_WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_overrides(overrides: str | Mapping[str, Any] | None) -> Settings:
    """Read the options in `"name=value,name=value"`; a mapping is returned as a dict.

    Args:
        overrides (`str` or `Mapping[str, Any]`, *optional*): values are numbers, `true`, `false`, `none`, words,
            quoted text and lists, tuples or dicts of these.

    Returns:
        `dict[str, Any]`: value of each option.

    Raises:
        ConfigurationError: an entry has no `=`, a value cannot be parsed, or a name appears twice.

    Example:
        >>> from hf_featreuse.small_models import parse_overrides
        >>> parse_overrides("depths=[2,2],hidden_act=relu,qkv_bias=false,layer_norm_eps=1e-6")
        {'depths': [2, 2], 'hidden_act': 'relu', 'qkv_bias': False, 'layer_norm_eps': 1e-06}
    """
    if overrides is None:
        return {}
    if not isinstance(overrides, str):
        return dict(overrides)
    parsed: Settings = {}
    for entry in _split_at_commas(overrides):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not name or not equals:
            raise ConfigurationError(
                f"`overrides={overrides!r}` has the entry {entry.strip()!r}, which is not `name=value`. Write entries "
                'as in "hidden_size=192,depths=[2,2]".'
            )
        if name in parsed:
            raise ConfigurationError(f"`overrides={overrides!r}` sets `{name}` twice. Keep one of them.")
        parsed[name] = _parse_value(name, value)
    return parsed


def _split_at_commas(text: str) -> Iterator[str]:
    """Split at the commas outside of brackets and quotes."""
    start, depth, quote = 0, 0, ""
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    if text[start:].strip():
        yield text[start:]


class _WordsToConstants(ast.NodeTransformer):
    """Turn bare words into true, false, none or text, so that `[relu, true]` reads as a literal."""

    def visit_Name(self, node: ast.Name) -> ast.Constant:
        return ast.copy_location(ast.Constant(_WORDS.get(node.id.lower(), node.id)), node)


def _parse_value(name: str, text: str) -> Any:
    """Read one value."""
    try:
        return ast.literal_eval(_WordsToConstants().visit(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"The value of `{name}` in `overrides` does not parse: {text!r}. Write a number, true, false, none, a "
            "word, text in quotes, or a list such as [32,64] with its brackets closed."
        ) from error


def _option_names(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the names that can be overridden, nested ones dotted."""
    names: list[str] = []
    for name, value in options.items():
        if name in _NOT_OPTIONS:
            continue
        names.append(prefix + name)
        if isinstance(value, dict):
            names += _option_names(value, f"{prefix}{name}.")
    return names


def as_option(name: str, value: Any, default: PreTrainedConfig) -> Any:
    """Check that an option exists, and convert the value to the type of the default if nothing is lost."""
    if name in _ARGUMENTS:
        raise ConfigurationError(
            f"`overrides` sets `{name}`, which is an argument. Pass the argument `{_ARGUMENTS[name]}` instead."
        )
    names = [*_option_names(default.to_dict()), *default.attribute_map]
    if name not in names:
        raise ConfigurationError(
            f"`overrides` sets `{name}`, which `{default.model_type}` does not have.{did_you_mean(name, names)} "
            f"Its options are: {', '.join(sorted(names))}."
        )
    before = get_nested(default, name)
    if isinstance(before, bool):
        words = {"1": True, "y": True, "yes": True, "true": True, "0": False, "n": False, "no": False, "false": False}
        if str(value).lower() not in words:
            raise ConfigurationError(
                f"`overrides` sets `{name}={value!r}`, which is not a boolean. Pass true or false."
            )
        return words[str(value).lower()]
    if isinstance(before, int) and (isinstance(value, bool) or not isinstance(value, int | type(None))):
        raise ConfigurationError(
            f"`overrides` sets `{name}={value!r}`, which is not an integer. Pass a whole number, like the default "
            f"{before}."
        )
    if isinstance(before, float) and is_whole(value):
        return float(value)
    return value


def get_nested(config: Any, name: str) -> Any:
    """Read a dotted option."""
    for part in name.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def set_nested(settings: Settings, name: str, value: Any, config: Any) -> None:
    """Set a dotted option, keeping what a nested plain dict holds by default."""
    head, _, rest = name.partition(".")
    if not rest:
        merge = isinstance(value, dict) and isinstance(settings.get(head), dict)
        settings[head] = {**settings[head], **value} if merge else value
        return
    inner = get_nested(config, head)
    known = {} if isinstance(inner, PreTrainedConfig) else dict(inner)
    settings[head] = {**known, **settings.get(head, {})}
    set_nested(settings[head], rest, value, inner)


def check_taken(config: PreTrainedConfig, given: Settings) -> None:
    """Refuse overrides that the configuration replaced by values computed from other options."""
    for name, value in given.items():
        found = get_nested(config, name)
        if found != value and not isinstance(found, PreTrainedConfig):
            raise ConfigurationError(
                f"`overrides` sets `{name}={value!r}`, but `{config.model_type}` computes it from other options and "
                f"has {found!r}. Set those options instead."
            )


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number; `True` is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(options: Mapping[str, Any]) -> str:
    """Format options as `name=value`."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "no overrides"


def last_line(error: Exception) -> str:
    """Return the last line of an error, which names the problem, without the class of the error."""
    line = re.sub(r"^\w*(Error|Exception): ", "", str(error).strip().splitlines()[-1].strip())
    return line if line.endswith(".") else line + "."
