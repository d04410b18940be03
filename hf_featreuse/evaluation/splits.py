"""Reports and predictions for a split of a data set: what `featreuse evaluate` and the end of training write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from hf_featreuse.data.evaluation import OpenModel, class_names, class_notes, evaluation_loader
from hf_featreuse.data.image_split import ImageSplit
from hf_featreuse.evaluation.evaluating import evaluate_model
from hf_featreuse.evaluation.page import write_evaluation
from hf_featreuse.evaluation.predicting import classify, writer
from hf_featreuse.evaluation.results import Evaluation
from hf_featreuse.method.dummy_forward import undisturbed


def report_on_split(
    opened: OpenModel,
    split: ImageSplit,
    label_names: Sequence[str],
    output_dir: str | Path,
    *,
    about: Mapping[str, object],
    batch_size: int,
    seed: int,
    max_samples: int | None = None,
    num_workers: int = 0,
    num_mistakes: int = 24,
    overwrite: bool = False,
    disable_tqdm: bool | None = None,
) -> tuple[Evaluation, Path]:
    """Evaluate a classifier on a split and write the report with a gallery of mistakes.

    Args:
        opened (`OpenModel`): the classifier, on the device to run on.
        split (`ImageSplit`): the images.
        label_names (`Sequence[str]`): names of the split's classes, in the order of their ids.
        output_dir (`str` or `Path`): folder for the report.
        about (`dict[str, object]`): facts on the data for the page, by label; the number of images is added.
        batch_size (`int`): images per batch.
        seed (`int`): seed of the choice of images and of their order.
        max_samples (`int`, *optional*): maximum number of images; by default all.
        num_workers (`int`, defaults to 0): processes that decode images.
        num_mistakes (`int`, defaults to 24): mistakes to show.
        overwrite (`bool`, defaults to `False`): whether to replace the report in a folder that is not empty.
        disable_tqdm (`bool`, *optional*): as for [`evaluate_model`].

    Returns:
        `tuple[Evaluation, Path]`: the results, and the page.
    """
    loader = evaluation_loader(
        opened,
        split,
        label_names,
        batch_size=batch_size,
        max_samples=len(split) if max_samples is None else max_samples,
        seed=seed,
        num_workers=num_workers,
    )
    evaluation = evaluate_model(
        opened.model,
        loader,
        class_names(opened.model.config),
        num_mistakes=num_mistakes,
        name=opened.name,
        notes=class_notes(opened, label_names),
        disable_tqdm=disable_tqdm,
    )
    originals, order = split.with_transform(None), list(loader.sampler)

    def image(index: int) -> Image.Image:
        return Image.fromarray(originals[order[index]]["pixel_values"].permute(1, 2, 0).numpy())

    about = {**about, "images": evaluation.accuracy.total}
    return evaluation, write_evaluation(evaluation, output_dir, image=image, data=about, overwrite=overwrite)


def predict_split(
    opened: OpenModel,
    split: ImageSplit,
    label_names: Sequence[str],
    output: str | Path,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    disable_tqdm: bool | None = None,
) -> int:
    """Classify the images of a split in their order and write one row per image, as [`predict_files`] does.

    An image without its own file is named by its row. An existing output is replaced when the new one is complete.

    Args:
        opened (`OpenModel`): the classifier, on the device to run on.
        split (`ImageSplit`): the images.
        label_names (`Sequence[str]`): names of the split's classes, in the order of their ids.
        output (`str` or `Path`): a file that ends in .csv, .jsonl or .parquet.
        batch_size (`int`, defaults to 64): images per batch.
        num_workers (`int`, defaults to 0): processes that decode images.
        disable_tqdm (`bool`, *optional*): whether to show no progress bar.

    Returns:
        `int`: the number of images.
    """
    loader = evaluation_loader(
        opened,
        split,
        label_names,
        batch_size=batch_size,
        max_samples=len(split),
        seed=0,
        num_workers=num_workers,
        shuffle=False,
    )
    names, done = class_names(opened.model.config), 0
    with writer(Path(output)) as write, undisturbed(opened.model), torch.inference_mode():
        for batch in tqdm(loader, desc="Classifying", unit="batch", disable=disable_tqdm):
            pixels = batch["pixel_values"]
            files = split.file_names(range(done, done + len(pixels)))
            write(classify(opened.model, pixels, files, names, 1))
            done += len(pixels)
    return done
