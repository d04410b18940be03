"""Write an evaluation to a folder: JSON, plots, and a self-contained HTML page."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from hf_featreuse.evaluation.figures import MOST_CLASSES, plot_confusion, plot_reliability
from hf_featreuse.evaluation.results import SCORE_COLUMNS, Evaluation, Mistake, score_cells
from hf_featreuse.plotting.page import encoded, note, page, picture, quiet, section, table
from hf_featreuse.plotting.report_folder import PAGE_FILE, all_or_none, check_output_dir

JSON_FILE = "evaluation.json"
_THUMBNAIL = 144


def write_evaluation(
    evaluation: Evaluation,
    output_dir: str | os.PathLike[str],
    *,
    image: Callable[[int], Image.Image] | None = None,
    data: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an evaluation to a folder.

    The folder gets `evaluation.json`, `reliability.png`, `confusion.png` (up to 40 classes), and `index.html`, which
    contains the plots, the scores of each class and a gallery of the most confident mistakes. Either all files appear
    or none. Requires matplotlib.

    Args:
        evaluation (`Evaluation`): from [`evaluate_model`].
        output_dir (`str` or `os.PathLike`): the folder; created if missing.
        image (`Callable[[int], PIL.Image.Image]`, *optional*): returns the image at a position among the evaluated
            ones, for the gallery; by default the gallery is left out.
        data (`dict[str, Any]`, *optional*): what the model was evaluated on, by label, for the page and the JSON.
        overwrite (`bool`, defaults to `False`): whether to replace files of this name in a folder that is not empty.

    Returns:
        `pathlib.Path`: the page.

    Raises:
        ConfigurationError: the folder is not empty or cannot be written, or matplotlib is missing.

    Example:
        >>> import tempfile, torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse.evaluation import evaluate_model, write_evaluation
        >>> config = ViTConfig(
        ...     hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32
        ... )
        >>> batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 0, 1])}
        >>> evaluation = evaluate_model(ViTForImageClassification(config), [batch], ["cat", "dog"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_evaluation(evaluation, folder).name
        'index.html'
    """
    check_output_dir(output_dir, overwrite)
    about = dict(data or {})
    content = {"data": about, **evaluation.to_dict()}
    with all_or_none(Path(output_dir)) as folder:
        (folder / JSON_FILE).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        plots = {"reliability": plot_reliability(evaluation, folder / "reliability.png")}
        if len(evaluation.classes) <= MOST_CLASSES:
            plots["confusion"] = plot_confusion(evaluation, folder / "confusion.png")
        gallery = [] if image is None else [_mistake(one, image(one.index)) for one in evaluation.mistakes]
        (folder / PAGE_FILE).write_text(_page(evaluation, plots, gallery, about), encoding="utf-8")
    return Path(output_dir) / PAGE_FILE


def _page(evaluation: Evaluation, plots: Mapping[str, Path], gallery: list[str], about: Mapping[str, Any]) -> str:
    name = evaluation.model
    what = "" if name == evaluation.architecture else f"{evaluation.architecture}, "
    confused = [[label, predicted, str(count)] for label, predicted, count in evaluation.most_confused()]
    scores = [[one.name, *score_cells(one)] for one in evaluation.classes]
    parts = [
        quiet("; ".join([f"{what}{evaluation.parameters:,} parameters", *(f"{k}: {v}" for k, v in about.items())])),
        table(("score", "value"), evaluation.summary().items(), words=2),
        *(note(text) for text in evaluation.notes),
        section(
            "Classes",
            "Precision: of the images predicted as the class, the share that belongs to it. Recall: of the images of "
            "the class, the share that was predicted as it. F1 is their harmonic mean.",
            table(("class", *SCORE_COLUMNS), scores, tall=True),
        ),
    ]
    if "confusion" in plots:
        text = "Rows are classes, columns are predictions; colors are shares of the row, numbers are images."
        parts.append(section("Confusion matrix", text, picture(plots["confusion"], "Confusion matrix")))
    if confused:
        parts.append(
            section("Most frequent confusions", "", table(("class", "predicted class", "images"), confused, words=2))
        )
    parts.append(
        section(
            "Calibration",
            f"A calibrated model that is 80 % confident is right 8 times in 10. Bars above the dashed line mean that "
            f"the model is too cautious; bars below it, that the model is too confident. Expected calibration error: "
            f"{evaluation.calibration_error:.3f}.",
            picture(plots["reliability"], "Reliability diagram"),
        )
    )
    if gallery:
        text = "The mistakes with the highest confidence. Some of them may be wrong labels."
        parts.append(section("Most confident mistakes", text, f'<div class="gallery">{"".join(gallery)}</div>'))
    return page(f"Evaluation of {name}", parts)


def _mistake(mistake: Mistake, image: Image.Image) -> str:
    """Return the HTML of a thumbnail with its caption."""
    image = image.copy()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG")
    caption = (
        f"image {mistake.index}: {escape(mistake.label)} ({mistake.label_probability:.0%}), predicted as "
        f"<b>{escape(mistake.predicted)}</b> ({mistake.confidence:.0%})"
    )
    source = f"data:image/png;base64,{encoded(file.getvalue())}"
    return f'<figure><img alt="{escape(mistake.label)}" src="{source}"><figcaption>{caption}</figcaption></figure>'
