"""Describe the run of a benchmark, and write its tables into a page of the docs."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers


def versions() -> str:
    """Return the versions of torch, transformers and Python."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between two markers of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
