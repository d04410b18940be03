"""Count the graphs that a test compiles."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Begin each test of a module that imports this without compiled code, and leave none behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs made since the test began."""
    return counters["stats"]["unique_graphs"]
