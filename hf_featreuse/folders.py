"""Folders that a command makes: they are gone again if it fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(folder: str | Path, keep: bool = True) -> Iterator[Path]:
    """Make a folder with its parents; remove those that were made, if they are empty, on an error or if not `keep`."""
    folder = Path(os.path.abspath(folder))
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    done = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        done = keep
    finally:
        if not done:
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
