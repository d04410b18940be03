"""Render the parts of a self-contained HTML page: the frame, tables, pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; margin-bottom: .2em; } h2 { font-size: 1.2em; margin: 2em 0 .3em; } h3 { font-size: 1em; }
p { max-width: 100ch; margin: .4em 0; } .quiet { color: #555; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6em 0; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, .word { text-align: left; } th { border-bottom: 2px solid #888; font-weight: 600; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
.scroll { overflow-x: auto; } .tall { max-height: 70vh; overflow-y: auto; }
.side { display: flex; flex-wrap: wrap; gap: 0 3em; }
.note { border-left: 3px solid #D55E00; padding-left: .8em; }
.gallery { display: flex; flex-wrap: wrap; gap: 1em; } .gallery figure { width: 9em; margin: 0; }
.gallery img { width: 9em; height: 9em; object-fit: contain; background: #f2f2f2; image-rendering: pixelated; }
figcaption { font-size: .9em; overflow-wrap: anywhere; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Return the whole page.

    Args:
        title (`str`): plain text.
        parts (`Iterable[str]`): HTML, in order; empty ones are left out.
    """
    body = "\n".join([f"<h1>{escape(title)}</h1>", *filter(None, parts)])
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(heading: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, tall: bool = False) -> str:
    """Return a table that scrolls by itself, with its first column fixed.

    Args:
        heading (`Sequence[str]`): plain text.
        rows (`Iterable[Sequence[str]]`): plain text.
        words (`int`, defaults to 1): how many of the first columns hold words, aligned to the left.
        tall (`bool`, defaults to `False`): whether it may have more rows than fit on a screen.
    """

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [f"{tag} class=word" if index < words else tag for index in range(len(cells))]
        return "".join(f"<{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>\n" for cells in rows)
    kind = "scroll tall" if tall else "scroll"
    return f'<div class="{kind}"><table>\n<tr>{row(heading, "th")}</tr>\n{body}</table></div>'


def section(heading: str, text: str = "", *parts: str) -> str:
    """Return a heading, a paragraph of plain text, and HTML."""
    return "\n".join([f"<h2>{escape(heading)}</h2>", *([f"<p>{escape(text)}</p>"] if text else []), *parts])


def picture(file: Path, description: str) -> str:
    """Return the HTML of a PNG file, embedded in the page."""
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{encoded(file.read_bytes())}">'


def encoded(data: bytes) -> str:
    """Return bytes as text for a `data:` address."""
    return base64.b64encode(data).decode("ascii")


def note(text: str, about: str = "") -> str:
    """Return a highlighted paragraph."""
    start = f"<b>{escape(about)}</b>: " if about else ""
    return f'<p class="note">{start}{escape(text)}</p>'


def quiet(text: str) -> str:
    """Return a paragraph in gray."""
    return f'<p class="quiet">{escape(text)}</p>' if text else ""
