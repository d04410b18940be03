"""Docstrings in the style of transformers, made readable for mkdocstrings; a griffe extension, named in zensical.toml.

transformers writes the type of an argument in backticks with its default behind it, and a reference as [`Name`].
griffe knows neither, and shows the default from the signature anyway.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

INIT = Path(__file__).parents[1] / "hf_featreuse" / "__init__.py"
# Read, not imported: importing the package takes longer than building the site.
EXPORTED = next(
    ast.literal_eval(node.value)
    for node in ast.parse(INIT.read_text(encoding="utf-8")).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
)
# `name (`type` or `other`, defaults to `x`): text`, as a line of "Args:".
ARGUMENT = re.compile(r"^(\s+\w+) \((`.+?`(?: or `.+?`)*)(?:, (?:defaults to .+?|\*optional\*))?\):", re.MULTILINE)
# `type`: text, as the first line of "Returns:" or "Yields:".
RETURNED = re.compile(r"^((?:Returns|Yields):\n\s+)`([^`]+)`:", re.MULTILINE)
REFERENCE = re.compile(r"\[`(\w+)((?:\.\w+)?)`\](?!\[|\()")


def adapt(text: str, path: str) -> str:
    """A docstring as griffe's parser of the Google style takes it.

    Args:
        text (`str`): the docstring.
        path (`str`): of the object, such as `"hf_featreuse.method.feature_reuse.FeatureReuse.step"`.
    """
    text = ARGUMENT.sub(lambda found: f"{found[1]} ({found[2].replace('`', '').replace(' or ', ' | ')}):", text)
    text = RETURNED.sub(r"\1\2:", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return REFERENCE.sub(lambda found: _reference(found[1], found[2], path), text)


def _reference(name: str, attribute: str, path: str) -> str:
    """A link to where the API pages document the name: at the package, at the class or at the public module."""
    _, module, *inside = path.split(".")
    if name in EXPORTED:
        home = "hf_featreuse"
    elif len(inside) > 1 and inside[-2][0].isupper() and name.islower():  # Another method of the class.
        home = f"hf_featreuse.{inside[-2]}" if inside[-2] in EXPORTED else f"hf_featreuse.{module}.{inside[-2]}"
    else:
        home = f"hf_featreuse.{module}"
    return f"[`{name}{attribute}`][{home}.{name}{attribute}]"


class TransformersDocstrings(griffe.Extension):
    """Adapts every docstring as griffe loads it."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Adapt the docstring of one module, class, function or attribute."""
        if obj.docstring is not None and "." in obj.path:
            obj.docstring.value = adapt(obj.docstring.value, obj.path)
