"""Render one or more analyses as one HTML page that contains the plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hf_featreuse.analysis.figures import FIGURES, Named
from hf_featreuse.analysis.results import BLOCK_COLUMNS, ModelAnalysis, block_cells, number, percent
from hf_featreuse.plotting.page import note, page, picture, quiet, section, table
from hf_featreuse.text import common_prefix


def render_page(analyses: Named, plots: Sequence[Path], data: Mapping[str, Any]) -> str:
    """Return the page as text.

    Args:
        analyses (`Sequence[tuple[str, ModelAnalysis]]`): each with its name on the page.
        plots (`Sequence[Path]`): the PNG files of `FIGURES`, in that order.
        data (`dict[str, Any]`): what the models were measured on, by label.
    """
    names = [name for name, _ in analyses]
    title = f"Analysis of {names[0] if len(names) == 1 else f'{len(names)} models'}"
    figures = [
        section(heading, text, picture(path, heading))
        for path, (_, _, heading, text) in zip(plots, FIGURES, strict=True)
    ]
    about = "; ".join(f"{key}: {value}" for key, value in data.items())
    parts = [
        quiet(about),
        _summary(analyses),
        *(note(text, about=name) for name, analysis in analyses for text in analysis.notes),
        *figures,
        section(
            "Each block",
            "Blocks in forward order. Accuracy without: only this block is dropped. Exit after it: all later blocks "
            "are skipped. A dash: not defined, or the block cannot be skipped exactly.",
            f'<div class="side">{"".join(_blocks(name, analysis) for name, analysis in analyses)}</div>',
        ),
    ]
    return page(title, parts)


def _summary(analyses: Named) -> str:
    """Return a table with one row per model that summarizes the figures."""
    heading = ("model", "class", "parameters", "blocks", "accuracy (95 % interval)", "lowest, one dropped",
               "mean, half dropped", "mean |f(x)|/|x|")  # fmt: skip
    rows = []
    for name, analysis in analyses:
        ratios = [block.residual_ratio for block in analysis.blocks if block.residual_ratio is not None]
        accuracy = analysis.accuracy
        rows.append(
            [
                name,
                analysis.architecture,
                f"{analysis.parameters:,}",
                str(len(analysis.blocks)),
                f"{percent(accuracy)} ({accuracy.low:.1%} to {accuracy.high:.1%})",
                _lowest(analysis),
                _half(analysis),
                number(sum(ratios) / len(ratios) if ratios else None),
            ]
        )
    return table(heading, rows, words=2)


def _lowest(analysis: ModelAnalysis) -> str:
    """Return the lowest accuracy with one block dropped, and the block."""
    found = [(block.accuracy_without, block.index) for block in analysis.blocks if block.accuracy_without]
    if not found:
        return "-"
    accuracy, index = min(found, key=lambda pair: pair[0].value)
    return f"{percent(accuracy)} (block {index})"


def _half(analysis: ModelAnalysis) -> str:
    """Return the mean accuracy with half the blocks dropped, or the nearest number of them that was measured."""
    half = len(analysis.blocks) / 2
    drop = min(analysis.random_drops, key=lambda drop: abs(drop.num_dropped - half), default=None)
    return "-" if drop is None else f"{drop.mean:.1%} ({drop.num_dropped} of {len(analysis.blocks)})"


def _blocks(name: str, analysis: ModelAnalysis) -> str:
    prefix = common_prefix([block.name for block in analysis.blocks])
    heading = (f"block of {prefix[:-1]}" if prefix else "block", *BLOCK_COLUMNS)
    rows = [[block.name.removeprefix(prefix), *block_cells(analysis, block)] for block in analysis.blocks]
    return f"<div><h3>{escape(name)}</h3>{table(heading, rows, words=1)}</div>"
