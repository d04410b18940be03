"""Quote foreign words in a model card: names and values may hold Markdown, HTML, formulas or line ends."""

from __future__ import annotations

import json
import re

from hf_featreuse.text import flat

# What Markdown, its tables, HTML and the Hub's formulas read; `_` only at the edge of a word.
_SPECIAL = re.compile(r"[\\`*\[\]<>|&~$#!]|(?<![^\W_])_|_(?![^\W_])")


def markdown_text(value: object) -> str:
    """A value as words of Markdown, in one line, that mean themselves."""
    return _SPECIAL.sub(lambda match: f"\\{match[0]}", flat(value))


def markdown_code(value: object, in_table: bool = False) -> str:
    """A value as code in a line, in a fence of backticks that it does not hold; a table reads its pipes first."""
    text = flat(value).replace("|", "\\|") if in_table else flat(value)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    edge = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def python_string(value: object) -> str:
    """A value as a string of Python in double quotes."""
    return json.dumps(flat(value), ensure_ascii=False)
