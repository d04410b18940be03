"""Create the folders of a command, and remove them if it fails."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(folder: str | Path, keep: bool = True) -> Iterator[Path]:
    """Make a folder and its parents; on an error, or if not `keep`, remove those that were made and are empty."""
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


@contextlib.contextmanager
def finished_folder(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write to that gets its name, which is free or that of an empty folder, if nothing fails."""
    folder = Path(os.path.abspath(folder))
    with (
        new_folder(folder.parent),
        tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as temporary,
    ):
        written = Path(temporary) / "folder"
        written.mkdir()
        yield written
        if folder.is_dir() and os.name == "nt":
            folder.rmdir()
        # Replaces an empty folder, except on Windows; on one file system it happens at once.
        written.replace(folder)
