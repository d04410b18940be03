"""Write analyses to a folder: a JSON file, the plots, and a self-contained HTML page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_featreuse.analysis.figures import FIGURES
from hf_featreuse.analysis.page import render_page
from hf_featreuse.analysis.results import ModelAnalysis
from hf_featreuse.errors import ConfigurationError
from hf_featreuse.plotting.report_folder import PAGE_FILE, all_or_none, check_output_dir
from hf_featreuse.text import printable

JSON_FILE = "analysis.json"


def write_report(
    analyses: Sequence[ModelAnalysis],
    output_dir: str | os.PathLike[str],
    *,
    data: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one or more analyses, side by side, to a folder.

    The folder gets `analysis.json`, four PNG plots and `index.html`, which contains the plots and links to nothing.
    Either all files appear or none: they are written to a temporary folder and moved, the page last. Requires
    matplotlib, which is installed by `pip install "hf_featreuse[plot]"`.

    Args:
        analyses (`Sequence[ModelAnalysis]`): from [`analyze_model`], at least one; depths may differ.
        output_dir (`str` or `os.PathLike`): the folder; created if missing.
        data (`dict[str, Any]`, *optional*): what the models were measured on, by label, for the page and the JSON.
        overwrite (`bool`, defaults to `False`): whether to replace files of this name in a folder that is not empty.

    Returns:
        `pathlib.Path`: the page.

    Raises:
        ConfigurationError: there is no analysis, the folder is not empty or cannot be written, or matplotlib is
            missing.

    Example:
        >>> import tempfile, torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse.analysis import analyze_model, write_report
        >>> config = ViTConfig(
        ...     hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=32
        ... )
        >>> batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 0, 1])}
        >>> analysis = analyze_model(ViTForImageClassification(config), [batch])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report([analysis], folder).name
        'index.html'
    """
    if not analyses:
        raise ConfigurationError("`analyses` is empty. Pass at least one result of `analyze_model`.")
    check_output_dir(output_dir, overwrite)
    names = map(printable, short_names([analysis.model for analysis in analyses]))
    named = list(zip(names, analyses, strict=True))
    content = {"data": dict(data or {}), "models": [analysis.to_dict() for analysis in analyses]}
    with all_or_none(Path(output_dir)) as folder:
        _write(folder / JSON_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")
        plots = [draw(named, folder / name) for name, draw, *_ in FIGURES]
        _write(folder / PAGE_FILE, render_page(named, plots, data or {}))
    return Path(output_dir) / PAGE_FILE


def short_names(names: Sequence[str]) -> list[str]:
    """Return the last part of each path or Hub id, or as many parts as needed to tell them apart."""
    parts = [Path(name).parts for name in names]
    candidates = (["/".join(part[-length:]) for part in parts] for length in range(1, max(map(len, parts)) + 1))
    short = next((found for found in candidates if len(set(found)) == len(set(names))), list(names))
    seen: dict[str, int] = {}
    for index, name in enumerate(short):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            short[index] = f"{name} ({seen[name]})"
    return short


def _write(path: Path, text: str) -> None:
    # File names need not be UTF-8.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
