"""Match `target_blocks`: a regular expression for the whole name, or a list of names and endings of names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import regex

from hf_featreuse.errors import BlockError
from hf_featreuse.text import flat

FIX = "Pass names or endings of names in a list, or a regular expression as a string."


# Matching a name of a few dozen characters takes microseconds.
_TIMEOUT_SECONDS = 1.0
# `regex` expands counted repeats, and repeats inside repeats multiply.
_REPEATS, _MOST_REPEATS = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}", re.ASCII), 10_000


def target_entries(target_blocks: str | Sequence[str], candidates: str) -> list[tuple[str, Callable[[str], bool]]]:
    """Return each entry of a target with its test of a name; `candidates` is for the errors."""
    if isinstance(target_blocks, str):
        return [(target_blocks, _expression(target_blocks, candidates))]
    return [(entry, lambda name, entry=entry: name == entry or name.endswith(f".{entry}")) for entry in target_blocks]


def _expression(text: str, candidates: str) -> Callable[[str], bool]:
    """Return the test of a Python regular expression; only `regex` has a timeout for one that would take years."""
    try:
        re.compile(text)
        counts = [int(count or 1) for pair in _REPEATS.findall(text) for count in pair]
        if math.prod(max(count, 1) for count in counts) > _MOST_REPEATS:
            raise regex.error("it repeats its parts too often")
        pattern = regex.compile(text)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise BlockError(
            f"`target_blocks={flat(text)[:200]!r}` is not a regular expression: {flat(error)}. {candidates}"
        ) from None

    def matches(name: str) -> bool:
        try:
            return pattern.fullmatch(name, timeout=_TIMEOUT_SECONDS) is not None
        except (TimeoutError, MemoryError):
            raise BlockError(
                f"`target_blocks={flat(text)[:200]!r}` takes too long: matching {name} took more than "
                f"{_TIMEOUT_SECONDS:g} s. Pass an expression without repeats inside repeats. {candidates}"
            ) from None

    return matches


def match_targets(names: Sequence[str], target_blocks: str | Sequence[str], model_name: str) -> set[str]:
    """Return the names that a target selects; raise `BlockError` with the candidates if an entry selects none."""
    candidates = listed(names)
    found: set[str] = set()
    for entry, matches in target_entries(target_blocks, candidates):
        selected = {name for name in names if matches(name)}
        if not selected:
            raise no_match(entry, model_name, candidates)
        found |= selected
    return found


def no_match(target: object, model_name: str, candidates: str, why: str = "") -> BlockError:
    """Return the error for an entry that selects no block."""
    return BlockError(f"`target_blocks={target!r}` matches no residual block of {model_name}{why}. {candidates}")


def listed(names: Sequence[str]) -> str:
    """Return the sentence of an error that lists the candidates."""
    if not names:
        return f"None is found by structure. Name modules that return their input plus a branch. {FIX}"
    shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    return f"Candidates: {shown}. {FIX}"
