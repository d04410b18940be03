"""Write the files of a report to a folder: all of them or none."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.folders import new_folder
from hf_featreuse.plotting.figure import empty_figure
from hf_featreuse.text import one_line

PAGE_FILE = "index.html"


def check_output_dir(output_dir: str | os.PathLike[str], overwrite: bool) -> None:
    """Check that a report can be written to a folder, before anything is computed; leave nothing behind.

    Raises:
        ConfigurationError: the folder is not empty or cannot be written, or matplotlib is missing.
    """
    empty_figure(1)
    folder = Path(output_dir)
    try:
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise ConfigurationError(
                f"`output_dir={str(folder)!r}` (--output_dir) is not empty. Pass another folder, or pass "
                "`overwrite=True` (--overwrite_output_dir) to replace the report in it."
            )
        with all_or_none(folder, keep=False):
            pass
    except (OSError, ValueError) as error:  # `ValueError` for a null character.
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"`output_dir={str(folder)!r}` (--output_dir) cannot be written: {one_line(error)} Pass another folder."
        ) from None


@contextlib.contextmanager
def all_or_none(folder: Path, keep: bool = True) -> Iterator[Path]:
    """Give a temporary folder whose files move to `folder` at the end, the page last, unless something fails."""
    with new_folder(folder, keep), tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as temporary:
        yield Path(temporary)
        if keep:
            for file in sorted(Path(temporary).iterdir(), key=lambda path: path.name == PAGE_FILE):
                os.replace(file, folder / file.name)
