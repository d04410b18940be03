"""One HTML page for one or more analyses, with the plots inside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hf_featreuse.analysis.figures import FIGURES, Named
from hf_featreuse.analysis.results import BLOCK_COLUMNS, ModelAnalysis, block_cells, number, percent
from hf_featreuse.text import common_prefix

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; margin-bottom: .2em; } h2 { font-size: 1.2em; margin: 2em 0 .3em; } h3 { font-size: 1em; }
p { max-width: 100ch; margin: .4em 0; } .quiet { color: #555; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6em 0; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, .word { text-align: left; } th { border-bottom: 2px solid #888; font-weight: 600; }
.scroll { overflow-x: auto; } .side { display: flex; flex-wrap: wrap; gap: 0 3em; }
.note { border-left: 3px solid #D55E00; padding-left: .8em; }
"""


def render_page(analyses: Named, plots: Sequence[Path], data: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        analyses (`Sequence[tuple[str, ModelAnalysis]]`): each with its name on the page.
        plots (`Sequence[Path]`): the PNG files of `FIGURES`, in that order.
        data (`dict[str, Any]`): what the models were measured on.
    """
    names = [name for name, _ in analyses]
    title = f"Analysis of {names[0] if len(names) == 1 else f'{len(names)} models'}"
    figures = [_figure(path, heading, text) for path, (_, _, heading, text) in zip(plots, FIGURES, strict=True)]
    about = "; ".join(f"{key}: {value}" for key, value in data.items())
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(about)}</p>' if about else "",
        _summary(analyses),
        *_notes(analyses),
        *figures,
        "<h2>Each block</h2>",
        "<p>Blocks in forward order. <i>accuracy without</i>: this block alone dropped; <i>exit after it</i>: all "
        "later blocks skipped. A dash: not defined, or the block cannot be skipped exactly.</p>",
        f'<div class="side">{"".join(_blocks(name, analysis) for name, analysis in analyses)}</div>',
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _summary(analyses: Named) -> str:
    """One row a model: what the figures come to."""
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
    return _table(heading, rows, words=2)


def _lowest(analysis: ModelAnalysis) -> str:
    """The lowest accuracy with one block dropped, and the block."""
    found = [(block.accuracy_without, block.index) for block in analysis.blocks if block.accuracy_without]
    if not found:
        return "-"
    accuracy, index = min(found, key=lambda pair: pair[0].value)
    return f"{percent(accuracy)} (block {index})"


def _half(analysis: ModelAnalysis) -> str:
    """The mean accuracy with half the blocks dropped, or the nearest number of them that was measured."""
    half = len(analysis.blocks) / 2
    drop = min(analysis.random_drops, key=lambda drop: abs(drop.num_dropped - half), default=None)
    return "-" if drop is None else f"{drop.mean:.1%} ({drop.num_dropped} of {len(analysis.blocks)})"


def _notes(analyses: Named) -> list[str]:
    return [
        f'<p class="note"><b>{escape(name)}</b>: {escape(note)}</p>'
        for name, analysis in analyses
        for note in analysis.notes
    ]


def _figure(path: Path, heading: str, text: str) -> str:
    image = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f"<h2>{escape(heading)}</h2>\n<p>{escape(text)}</p>\n"
        f'<img alt="{escape(heading)}" src="data:image/png;base64,{image}">'
    )


def _blocks(name: str, analysis: ModelAnalysis) -> str:
    prefix = common_prefix([block.name for block in analysis.blocks])
    heading = (f"block of {prefix[:-1]}" if prefix else "block", *BLOCK_COLUMNS)
    rows = [[block.name.removeprefix(prefix), *block_cells(analysis, block)] for block in analysis.blocks]
    return f"<div><h3>{escape(name)}</h3>{_table(heading, rows, words=1)}</div>"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A table whose first columns are words."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [f"{tag} class=word" if index < words else tag for index in range(len(cells))]
        return "".join(f"<{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>\n" for cells in rows)
    return f'<div class="scroll"><table>\n<tr>{row(heading, "th")}</tr>\n{body}</table></div>'
