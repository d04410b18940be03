"""Let only one process at a time train into an output folder."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from hf_featreuse.errors import CheckpointError

logger = logging.get_logger(__name__)

# Hidden, so that it is never pushed.
LOCK_NAME = ".training.lock"


@contextlib.contextmanager
def output_lock(folder: str | Path) -> Iterator[None]:
    """Lock an output folder while training into it; other trainers of this process, and readers, are not blocked.

    The system releases the lock when the process ends, however it ends.

    Raises:
        CheckpointError: another process trains into the folder.
    """
    # A process has one lock object per path, which counts its holders.
    path = Path(os.path.realpath(folder), LOCK_NAME)
    lock = FileLock(path, timeout=0, thread_local=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"`output_dir={str(folder)!r}` is in use: {_holder(path)} trains into it, and two runs would overwrite "
            "each other's checkpoints. Pass another `output_dir`, or wait until that run ends."
        ) from error
    except (OSError, NotImplementedError) as error:  # The second on a system without locks.
        logger.warning(
            f"{folder} cannot be locked ({error}), so a second process that trains into it would not be noticed."
        )
        yield
        return
    try:
        with contextlib.suppress(OSError):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:
            # While the lock is held: a process that opens the path meanwhile notices that the file changed.
            with contextlib.suppress(OSError):
                path.unlink()
        lock.release()


def _holder(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        text = ""
    return "".join(letter for letter in text if letter.isprintable()) or "another process"
