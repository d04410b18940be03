"""The benchmark behind the table of docs/recipes.md runs, and has the rows of the table."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_rows_are_those_of_the_page():
    spec = importlib.util.spec_from_file_location("augmentation_benchmark", ROOT / "benchmarks" / "augmentation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.measure(repeats=1)
    assert all(milliseconds > 0 for milliseconds in found.values())
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in found if f"| {name} |" not in page] == []
