"""Words for messages and tables: lists that are cut, lines of errors, close matches, aligned columns."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def did_you_mean(name: object, names: Sequence[str]) -> str:
    """Name the close matches, if any, as a sentence that follows another."""
    close = difflib.get_close_matches(str(name), names, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def first_few(names: Sequence[str], count: int = 4) -> str:
    """The first names, and dots if there are more."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def joined(names: Sequence[str], last: str = "and") -> str:
    """The names as `a, b and c`, cut after six."""
    if len(names) > 6:
        return f"{', '.join(names[:6])}, ... ({len(names)} in all)"
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def printable(text: str, keep: str = "") -> str:
    """The text with escapes for what a terminal would obey: control and direction characters, broken UTF-8."""
    return "".join(
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in text
    )


def flat(text: object) -> str:
    """A text in one line that is safe to print."""
    return printable(" ".join(str(text).split()))


def one_line(error: BaseException) -> str:
    """What an error says, as sentences in one line."""
    text = flat(error) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def first_sentence(error: BaseException) -> str:
    """The first sentence of what an error says."""
    return one_line(error).partition(". ")[0].rstrip(".") + "."


def kind_and_text(error: BaseException, length: int = 200) -> str:
    """The class of an error and the beginning of what it says, in one line."""
    text = flat(error)
    return f"{type(error).__name__}: {text[:length]}" if text else type(error).__name__


def common_prefix(names: Sequence[str]) -> str:
    """Give the dotted prefix that all names share, with its last dot; empty if they share none."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared) + "." if shared else ""


def aligned(rows: list[list[str]]) -> list[str]:
    """Pad every column of a table; those of words to the right, those of numbers to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = {index for index, heading in enumerate(rows[0]) if heading.startswith(("block", "class"))}
    return [
        "  ".join(
            cell.ljust(width) if index in words else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
