"""Classify image files, batch by batch, and write the predictions as they come."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_featreuse.data.evaluation import OpenModel, class_names
from hf_featreuse.data.images import ImageCollator, decode_image
from hf_featreuse.data.scanning import IMAGE_ENDINGS, scan
from hf_featreuse.data.transforms import EvalTransform
from hf_featreuse.errors import ConfigurationError, DataError
from hf_featreuse.method.dummy_forward import undisturbed
from hf_featreuse.text import joined, kind_and_text

Row = dict[str, Any]


@dataclass(frozen=True)
class Predicted:
    """What [`predict_files`] did.

    Args:
        output (`pathlib.Path`): the file with the predictions.
        count (`int`): images that were classified.
        unreadable (`list[str]`): files that could not be decoded, each with the reason.
    """

    output: Path
    count: int
    unreadable: list[str]


def predict_files(
    opened: OpenModel,
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    top_k: int = 1,
    batch_size: int = 64,
    overwrite: bool = False,
    disable_tqdm: bool | None = None,
) -> Predicted:
    """Classify image files and write one row per image: `file`, `label`, `score`, `label_2`, `score_2`, ...

    Files are decoded batch by batch, so memory does not grow with their number. A file that cannot be decoded gets no
    row and is named in the result. The output appears under its name when it is complete.

    Args:
        opened (`OpenModel`): from [`hf_featreuse.data.open_classifier`], on the device to run on.
        files (`Sequence[str]`): image files, and folders that are searched for images with all their subfolders.
        output (`str` or `os.PathLike`): a file that ends in .csv, .jsonl or .parquet.
        top_k (`int`, defaults to 1): how many classes per image, most probable first.
        batch_size (`int`, defaults to 64): images per batch.
        overwrite (`bool`, defaults to `False`): whether to replace an existing output.
        disable_tqdm (`bool`, *optional*): whether to hide the progress bar; by default it is shown unless
            transformers' log level is above warnings.

    Returns:
        `Predicted`: where the predictions are and which files could not be read.

    Raises:
        ConfigurationError: the output exists, has another ending or cannot be written, or `top_k` is out of range.
        DataError: there is no image, or none can be decoded.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil
        >>> from hf_featreuse.data import OpenModel
        >>> from hf_featreuse.evaluation import predict_files
        >>> config = ViTConfig(
        ...     hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32
        ... )
        >>> processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
        >>> opened = OpenModel("tiny", ViTForImageClassification(config).eval(), processor)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (40, 30)).save(f"{folder}/cat.png")
        ...     predict_files(opened, [folder], f"{folder}/predictions.csv").count
        1
    """
    names, output = class_names(opened.model.config), Path(output)
    if not 1 <= top_k <= len(names):
        raise ConfigurationError(
            f"`top_k={top_k}` (--top_k) is out of range: the model has {len(names)} classes. Pass 1 to {len(names)}."
        )
    if batch_size < 1:
        raise ConfigurationError(f"`batch_size={batch_size}` (--batch_size) is not positive. Pass 1 or more.")
    check_output(output, overwrite)
    found = image_files(files)
    preprocess = _preprocessing(opened)
    quiet = transformers.logging.get_verbosity() > logging.WARNING if disable_tqdm is None else disable_tqdm
    count, unreadable = 0, []
    with (
        writer(output) as write,
        tqdm(total=len(found), desc="Classifying", unit="image", disable=quiet) as progress,
        undisturbed(opened.model),
        torch.inference_mode(),
    ):
        for start in range(0, len(found), batch_size):
            batch = found[start : start + batch_size]
            images, failures = _decoded(batch)
            rows = classify(opened.model, preprocess(list(images.values())), images, names, top_k) if images else []
            write(rows)
            count, unreadable = count + len(rows), unreadable + failures
            progress.update(len(batch))
        if not count:
            raise DataError(f"None of the {len(found)} files can be decoded as an image; the first: {unreadable[0]}.")
    return Predicted(output, count, unreadable)


def image_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the files, and the images in the folders and their subfolders, in order.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = scan(str(path))
            inside.left_out.warn(str(path))
            images = sorted(image for images in inside.images.values() for image in images)
            if not images:
                raise DataError(
                    f"The folder `{path}` holds no image. Images end in {joined(sorted(IMAGE_ENDINGS), 'or')}; pass "
                    "other files by their names."
                )
            found += [path / image for image in images]
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"`{path}` is not a file or a directory. Pass image files or folders of images.")
    return found


def check_output(output: Path, overwrite: bool) -> None:
    """Check that predictions can be written to a file.

    Raises:
        ConfigurationError: it exists, has an unknown ending, or its folder does not exist.
    """
    if output.suffix not in _WRITERS:
        raise ConfigurationError(
            f"`output={str(output)!r}` (--output) does not end in {joined(list(_WRITERS), 'or')}. Pass a file with "
            "such an ending."
        )
    if output.is_dir() or (output.exists() and not overwrite):
        raise ConfigurationError(
            f"`output={str(output)!r}` (--output) exists. Pass another file, or pass `overwrite=True` (--overwrite) "
            "to replace it."
        )
    if not output.absolute().parent.is_dir():
        raise ConfigurationError(
            f"`output={str(output)!r}` (--output) is in a folder that does not exist. Create the folder first."
        )


def _preprocessing(opened: OpenModel) -> Callable[[Sequence[Image.Image]], torch.Tensor]:
    """Return a function from decoded images to the input of the model."""
    if opened.processor is None:
        raise ConfigurationError(f"`{opened.name}` has no image processor. Pass a model with one.")
    transform, collator = EvalTransform(opened.processor), ImageCollator.from_processor(opened.processor)

    def preprocess(images: Sequence[Image.Image]) -> torch.Tensor:
        return collator([{"pixel_values": transform(image), "labels": -100} for image in images])["pixel_values"]

    return preprocess


def _decoded(files: Sequence[Path]) -> tuple[dict[Path, Image.Image], list[str]]:
    """Return the images by file, and the files that cannot be decoded, each with the reason."""
    images, unreadable = {}, []
    for file in files:
        try:
            images[file] = decode_image({"bytes": None, "path": str(file)})
        except Exception as error:  # Decoders raise almost anything on broken files.
            unreadable.append(f"{file}: {kind_and_text(error)}")
    return images, unreadable


def classify(
    model: PreTrainedModel, pixels: torch.Tensor, files: Iterable[object], names: Sequence[str], top_k: int
) -> list[Row]:
    """Return one row per image."""
    scores, ids = model(pixel_values=pixels.to(model.device, model.dtype)).logits.float().softmax(-1).topk(top_k)
    rows = []
    for file, values, classes in zip(files, scores.tolist(), ids.tolist(), strict=True):
        row: Row = {"file": str(file)}
        for place, (value, index) in enumerate(zip(values, classes, strict=True), 1):
            ending = "" if place == 1 else f"_{place}"
            row |= {f"label{ending}": names[index], f"score{ending}": round(value, 6)}
        rows.append(row)
    return rows


@contextlib.contextmanager
def writer(output: Path) -> Iterator[Callable[[list[Row]], None]]:
    """Give a function that adds rows to a file, which gets its name at the end unless something fails."""
    partial = output.with_name(f".{output.name}.partial")
    try:
        with _WRITERS[output.suffix](partial) as write:
            yield write
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _csv(path: Path) -> Iterator[Callable[[list[Row]], None]]:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        columns: list[str] = []

        def write(rows: list[Row]) -> None:
            if rows and not columns:
                columns.extend(rows[0])
                table.writerow(columns)
            table.writerows(row.values() for row in rows)

        yield write


@contextlib.contextmanager
def _jsonl(path: Path) -> Iterator[Callable[[list[Row]], None]]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda rows: file.writelines(json.dumps(row) + "\n" for row in rows)


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Callable[[list[Row]], None]]:
    # datasets installs both; importing them takes a while.
    import pyarrow
    from pyarrow import parquet

    with contextlib.ExitStack() as stack:
        opened: list[Any] = []

        def write(rows: list[Row]) -> None:
            if not rows:
                return
            table = pyarrow.Table.from_pylist(rows)
            if not opened:
                opened.append(stack.enter_context(parquet.ParquetWriter(path, table.schema)))
            opened[0].write_table(table)

        yield write


_WRITERS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
