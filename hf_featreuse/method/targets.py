"""The grammar of `target_blocks`: a regular expression that must match a whole name, or names and endings of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from hf_featreuse.errors import BlockError

MEND = "Pass names or endings of names in a list, or a regular expression as a string."


def target_entries(target_blocks: str | Sequence[str], candidates: str) -> list[tuple[str, Callable[[str], bool]]]:
    """Each entry of a target with the test that it puts to a name; `candidates` goes into the errors."""
    if isinstance(target_blocks, str):
        try:
            pattern = re.compile(target_blocks)
        except re.error as error:
            raise BlockError(
                f"`target_blocks={target_blocks!r}` is no regular expression: {error}. {candidates}"
            ) from None
        return [(target_blocks, lambda name: pattern.fullmatch(name) is not None)]
    return [(entry, lambda name, entry=entry: name == entry or name.endswith(f".{entry}")) for entry in target_blocks]


def match_targets(names: Sequence[str], target_blocks: str | Sequence[str], model_name: str) -> set[str]:
    """The names that a target selects; `BlockError` with the candidates where an entry selects none."""
    candidates = listed(names)
    found: set[str] = set()
    for entry, matches in target_entries(target_blocks, candidates):
        selected = {name for name in names if matches(name)}
        if not selected:
            raise no_match(entry, model_name, candidates)
        found |= selected
    return found


def no_match(target: object, model_name: str, candidates: str, why: str = "") -> BlockError:
    """The error of an entry that selects no block."""
    return BlockError(f"`target_blocks={target!r}` matches no residual block of {model_name}{why}. {candidates}")


def listed(names: Sequence[str]) -> str:
    """The candidates that an error names."""
    if not names:
        return f"None is found by structure. Name modules that return their input plus a branch. {MEND}"
    shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    return f"Candidates: {shown}. {MEND}"
