"""Format text for messages and tables: shortened lists, one-line errors, close matches, aligned columns."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def did_you_mean(name: object, names: Sequence[str]) -> str:
    """Name the close matches, if any, as a sentence that follows another."""
    close = difflib.get_close_matches(str(name), names, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def first_few(names: Sequence[str], count: int = 4) -> str:
    """Return the first `count` names, with dots if there are more."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def joined(names: Sequence[str], last: str = "and") -> str:
    """Return the names as `a, b and c`, shortened after six."""
    if len(names) > 6:
        return f"{', '.join(names[:6])}, ... ({len(names)} in all)"
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def printable(text: str, keep: str = "") -> str:
    """Escape what a terminal would obey in a text: control and direction characters, broken UTF-8."""
    return "".join(
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in text
    )


def flat(text: object) -> str:
    """Return a text on one line that is safe to print."""
    return printable(" ".join(str(text).split()))


def one_line(error: BaseException) -> str:
    """Return the message of an error as sentences on one line."""
    text = flat(error) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of the message of an error."""
    return one_line(error).partition(". ")[0].rstrip(".") + "."


def kind_and_text(error: BaseException, length: int = 200) -> str:
    """Return the class of an error and the start of its message, on one line."""
    text = flat(error)
    return f"{type(error).__name__}: {text[:length]}" if text else type(error).__name__


def common_prefix(names: Sequence[str]) -> str:
    """Return the dotted prefix that all names share, with its last dot; empty if they share none."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared) + "." if shared else ""


def aligned(rows: list[list[str]]) -> list[str]:
    """Align the columns of a table: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = {index for index, heading in enumerate(rows[0]) if heading.startswith(("block", "class"))}
    return [
        "  ".join(
            cell.ljust(width) if index in words else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def with_underscores(words: Sequence[str]) -> list[str]:
    """Replace the dashes inside the names of flags by underscores: `--drop-rate=0.2` becomes `--drop_rate=0.2`."""
    words, end = list(words), list(words).index("--") if "--" in words else len(words)
    flags = [word.partition("=") if word.startswith("--") else (word, "", "") for word in words[:end]]
    names = [f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name for name, _, _ in flags]
    return [*(f"{name}{sign}{value}" for name, (_, sign, value) in zip(names, flags, strict=True)), *words[end:]]
