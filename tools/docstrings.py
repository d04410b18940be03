"""Convert docstrings in the style of transformers for mkdocstrings; a griffe extension, named in zensical.toml.

transformers writes the type of an argument in backticks, followed by its default, and a reference as [`Name`]. griffe
supports neither, and shows the default from the signature anyway.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

API = Path(__file__).parents[1] / "docs" / "api"
# Every name on an API page, by its last part.
DOCUMENTED = {
    path.rpartition(".")[2]: path
    for page in sorted(API.glob("*.md"))
    for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}
# `name (`type` or `other`, defaults to `x`): text`, as a line of "Args:".
ARGUMENT = re.compile(r"^(\s+\w+) \((`.+?`(?: or `.+?`)*)(?:, (?:defaults to .+?|\*optional\*))?\):", re.MULTILINE)
# `type`: text, as the first line of "Returns:" or "Yields:".
RETURNED = re.compile(r"^((?:Returns|Yields):\n\s+)`([^`]+)`:", re.MULTILINE)
REFERENCE = re.compile(r"\[`(\w+)((?:\.\w+)?)`\](?!\[|\()")


def adapt(text: str, path: str) -> str:
    """Return a docstring for griffe's parser of the Google style.

    Args:
        text (`str`): the docstring.
        path (`str`): path of the object, such as `"hf_featreuse.method.feature_reuse.FeatureReuse.step"`.
    """
    text = ARGUMENT.sub(lambda found: f"{found[1]} ({found[2].replace('`', '').replace(' or ', ' | ')}):", text)
    text = RETURNED.sub(r"\1\2:", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return REFERENCE.sub(lambda found: _reference(found[1], found[2], path), text)


def _reference(name: str, attribute: str, path: str) -> str:
    """Return a link to the API page of a name, or of a method of the class that mentions it."""
    owner = next((part for part in path.split(".") if part[0].isupper()), None)
    target = DOCUMENTED.get(name)
    if target is None and owner is not None and name.islower():
        target = f"{DOCUMENTED.get(owner, owner)}.{name}"
    return f"[`{name}{attribute}`][{target or name}{attribute}]"


class TransformersDocstrings(griffe.Extension):
    """Adapts every docstring as griffe loads it."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Adapt the docstring of one module, class, function or attribute."""
        if obj.docstring is not None and "." in obj.path:
            obj.docstring.value = adapt(obj.docstring.value, obj.path)
