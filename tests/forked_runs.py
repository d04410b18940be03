"""Processes forked from one that has imported everything and computed nothing."""

import multiprocessing
import os
from pathlib import Path
from types import ModuleType

import pytest

# Windows starts each process afresh.
FORKS = "forkserver" in multiprocessing.get_all_start_methods()
context = multiprocessing.get_context("forkserver" if FORKS else "spawn")


def warm_forkserver(module: ModuleType) -> None:
    """Start the process that others are forked from, with a module of the tests imported."""
    if not FORKS:
        return
    # Python 3.11 does not pass its path on to the server.
    paths = [str(Path(str(module.__file__)).parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        context.set_forkserver_preload([module.__name__])
        process = context.Process(target=int)
        process.start()
        process.join()
