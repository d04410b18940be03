"""The folder of a report: JSON, plots on shared axes and a self-contained page."""

import base64
import html
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tiny_models import batch, build
from transformers import ViTConfig, ViTForImageClassification

from hf_featreuse.analysis import analyze_model, figures, report, write_report
from hf_featreuse.analysis.report import short_names
from hf_featreuse.errors import ConfigurationError
from hf_featreuse.plotting import empty_figure
from hf_featreuse.text import printable

pytest.importorskip("matplotlib", reason="plots need the extra `examples`")

FILES = {"analysis.json", "index.html", "cka.png", "features.png", "drop_one.png", "drop_many.png"}
BLUE, ORANGE, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)


def deep_vit(depth: int) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        num_labels=3,
    )
    return ViTForImageClassification(config)


def analysis(model, name: str):
    return analyze_model(model, [batch(8)], random_draws=2, name=name, disable_tqdm=True)


@pytest.fixture(scope="module")
def three():
    return [analysis(build("vit"), "runs/plain"), analysis(deep_vit(7), "runs/deep"), analysis(build("resnet"), "a<b")]


class Page(HTMLParser):
    """What a page links to, its images, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "action", "data", "srcset")]
        self.rows += [[]] if tag == "tr" else []
        self.inside = tag in ("td", "th")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1].append(data)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_folder_holds_everything(three, tmp_path, count):
    page = write_report(three[:count], tmp_path / "new" / "report", data={"data": "digits"})
    folder = page.parent
    assert {path.name for path in folder.iterdir()} == FILES
    content = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    assert content == {
        "data": {"data": "digits"},
        "models": [json.loads(json.dumps(a.to_dict())) for a in three[:count]],
    }
    for name in FILES - {"analysis.json", "index.html"}:
        with Image.open(folder / name) as image:
            assert (image.format, image.width) == ("PNG", 1200)


def test_page_is_self_contained_and_escaped(three, tmp_path):
    path = write_report(three, tmp_path, data={"data": "<script>"})
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.links) == 4
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    images = [base64.b64decode(link.partition(",")[2]) for link in page.links]
    assert images == [(tmp_path / name).read_bytes() for name in report_order()]
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text and "@import" not in text
    assert "a&lt;b" in text and "a<b" not in text


def report_order() -> list[str]:
    return [name for name, *_ in report.FIGURES]


def test_page_has_a_row_for_each_model_and_block(three, tmp_path):
    rows = Page(write_report(three, tmp_path).read_text(encoding="utf-8")).rows
    assert [row[0] for row in rows[1:4]] == ["plain", "deep", "a<b"]
    summary = rows[1]
    assert summary[3] == "4" and summary[4].startswith(f"{three[0].accuracy.value:.1%}")
    tables = rows[4:]
    assert len(tables) == sum(1 + len(a.blocks) for a in three)
    first_block = tables[1]
    assert first_block[1] == f"{three[0].blocks[0].residual_ratio:.3f}"
    assert first_block[3] == f"{three[0].blocks[0].accuracy_without.value:.1%}"
    assert first_block[4] == f"{three[0].early_exit[1].value:.1%}"


def test_notes_are_on_the_page(three, tmp_path):
    text = write_report(three, tmp_path).read_text(encoding="utf-8")
    assert text.count('class="note"') == sum(len(a.notes) for a in three) > 0


def colors(path) -> dict[tuple[int, int, int], int]:
    with Image.open(path) as image:
        return {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}


@pytest.mark.parametrize("name", ["features.png", "drop_one.png", "drop_many.png"])
def test_each_model_has_its_color_on_shared_axes(three, tmp_path, name):
    one, two = tmp_path / "one", tmp_path / "two"
    write_report(three[:1], one)
    write_report(three[:2], two)
    alone, both = colors(one / name), colors(two / name)
    assert alone[BLUE] > 200 and ORANGE not in alone
    assert both[BLUE] > 200 and both[ORANGE] > 200 and GREEN not in both


def test_maps_of_models_share_one_scale(tmp_path, three):
    """The diagonal, which is 1, has the lightest color of the scale in every map."""
    write_report(three[:2], tmp_path)
    with Image.open(tmp_path / "cka.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    brightest = np.abs(pixels - (253, 231, 36)).sum(axis=2) <= 3
    columns = np.flatnonzero(brightest.any(axis=0))
    assert columns.min() < 500 and 700 < columns[columns < 1000].max()


def test_models_without_values_can_be_drawn(tmp_path):
    alone = analyze_model(deep_vit(1), [batch(2)], random_draws=0, disable_tqdm=True)
    assert alone.cka == [[None]] and alone.random_drops == []
    page = write_report([alone], tmp_path).read_text(encoding="utf-8")
    assert "<td>-</td>" in page


def test_short_names():
    assert short_names(["outputs/a/", "outputs/b"]) == ["a", "b"]
    assert short_names(["x/vit", "y/vit"]) == ["x/vit", "y/vit"]
    assert short_names(["org/x/vit", "org/y/vit", "z"]) == ["x/vit", "y/vit", "z"]
    assert short_names(["ViT", "ViT", "ViT"]) == ["ViT", "ViT (2)", "ViT (3)"]


# Writing


def test_a_folder_that_is_not_empty_is_kept_by_default(three, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is not empty"):
        write_report(three[:1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    write_report(three[:1], tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"mine.txt"}
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_report_that_fails_leaves_no_files(three, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no page")

    monkeypatch.setattr(report, "render_page", fail)
    with pytest.raises(RuntimeError, match="no page"):
        write_report(three[:1], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unusable_folder_and_empty_list_are_refused(three, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        write_report(three[:1], tmp_path / "file" / "report")
    with pytest.raises(ConfigurationError, match="`analyses` is empty"):
        write_report([], tmp_path / "report")


def test_missing_matplotlib_is_reported_before_anything_is_written(three, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=re.escape('pip install "hf_featreuse[plot]"')):
        write_report(three[:1], tmp_path / "report")
    assert not (tmp_path / "report").exists()


# Names with a special meaning elsewhere


@pytest.mark.parametrize("name", ["a$b", "$x^2", "$\\frac{1}{2}$", "$_{$", "caf\udce9", "\x1b[31m", "_hidden"])
def test_a_name_is_drawn_and_written_unchanged(three, tmp_path, name):
    page = write_report([replace(three[0], model=name), three[1]], tmp_path, data={"data": name})
    text = page.read_text(encoding="utf-8")
    assert html.escape(printable(name)) in text and {path.name for path in tmp_path.iterdir()} == FILES


def test_models_whose_names_start_with_an_underscore_are_in_the_legend(three):
    axes = empty_figure(2).subplots()
    for index, name in enumerate(("_first", "_second")):
        figures._line(axes, index, range(2), [0.0, 1.0], name)
    assert [label.strip() for label in axes.get_legend_handles_labels()[1]] == ["_first", "_second"]


def test_a_report_that_fails_leaves_no_folder(three, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "render_page", fail)
    with pytest.raises(OSError, match="No space"):
        write_report(three[:1], tmp_path / "new" / "report")
    assert list(tmp_path.iterdir()) == []
