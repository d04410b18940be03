"""Escape text in a model card: names and values may hold Markdown, HTML, formulas or line breaks."""

from __future__ import annotations

import json
import re

from hf_featreuse.text import flat

# Characters with a meaning in Markdown, its tables, HTML and the Hub's formulas; `_` only at the edge of a word.
_SPECIAL = re.compile(r"[\\`*\[\]<>|&~$#!]|(?<![^\W_])_|_(?![^\W_])")


def markdown_text(value: object) -> str:
    """Return a value as plain text in Markdown, on one line."""
    return _SPECIAL.sub(lambda match: f"\\{match[0]}", flat(value))


def markdown_code(value: object, in_table: bool = False) -> str:
    """Return a value as inline code, with a fence of backticks that it does not hold; a table needs escaped pipes."""
    text = flat(value).replace("|", "\\|") if in_table else flat(value)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    edge = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def python_string(value: object) -> str:
    """Return a value as a Python string in double quotes."""
    return json.dumps(flat(value), ensure_ascii=False)
