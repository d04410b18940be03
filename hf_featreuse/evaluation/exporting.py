"""Export a trained classifier for another runtime, and compare what the runtime gives with the model's logits.

The exporters are those of transformers (`transformers.exporters`). This module adds a batch of any size, the
comparison and the times.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import BaseImageProcessor, PreTrainedModel

from hf_featreuse.errors import CheckpointError, ConfigurationError, IncompatibleVersionError
from hf_featreuse.folders import finished_folder
from hf_featreuse.method.dummy_forward import dummy_inputs, model_device, undisturbed
from hf_featreuse.pruning.saving import check_folder
from hf_featreuse.text import did_you_mean, joined, kind_and_text

# What writing and running each format needs in addition to torch. The extra `export` installs it for ONNX and
# OpenVINO, not for ExecuTorch: it brings twenty packages, one of which (torchao) transformers loads at each start.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "dynamo": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
}
# The first release whose exporters can save a model and run what they saved.
_OLDEST_TRANSFORMERS = "5.23"
# Numbers of images that are compared. The export is traced with two.
_BATCHES = (1, 2, 5)
_TRACED_BATCH = 2
# ExecuTorch plans its memory ahead.
_LARGEST_EXECUTORCH_BATCH = 64
# Runtimes sum in another order; in float32 the logits then differ by about 1e-6 of the largest.
_TOLERANCE = 1e-3
_WARM_UP = 3

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """What [`export_model`] wrote and measured.

    Args:
        folder (`pathlib.Path`): where the export is.
        files (`dict[str, int]`): its files with their sizes in bytes.
        difference (`float`): largest difference between the logits of the model and of the export.
        largest_logit (`float`): largest absolute logit, to compare the difference with.
        batch_size (`int`): images per batch of the two times below.
        model_ms (`float`): milliseconds for one batch with the model in eager PyTorch; the median of all runs.
        export_ms (`float`): the same with the export.
        repeats (`int`): runs of each, which were taken in turns.
        threads (`int`): threads that each could use.
    """

    folder: Path
    files: dict[str, int]
    difference: float
    largest_logit: float
    batch_size: int
    model_ms: float
    export_ms: float
    repeats: int
    threads: int


def export_model(
    model: PreTrainedModel,
    format: str,
    folder: str | Path,
    *,
    processor: BaseImageProcessor | None = None,
    batch_size: int = 1,
    repeats: int = 20,
) -> Exported:
    """Export an image classifier for any batch size, and check that the export gives the model's logits.

    What was saved is loaded again and compared with the model on noise, in batches of 1, 2 and 5 images. Only then
    does the folder get its name. The model stays as it is.

    Args:
        model (`PreTrainedModel`): a trained image classifier, on the CPU and in float32.
        format (`str`): `"dynamo"` (a program of `torch.export`), `"onnx"`, `"openvino"` or `"executorch"`. ExecuTorch
            takes batches of up to 64 images.
        folder (`str` or `pathlib.Path`): a new or empty folder for the export.
        processor (`BaseImageProcessor`, *optional*): saved with the export.
        batch_size (`int`, defaults to 1): images per batch when the times are measured.
        repeats (`int`, defaults to 20): runs of model and export, taken in turns, whose median is reported.

    Returns:
        `Exported`: files, difference of the logits and times.

    Raises:
        ConfigurationError: there is no such format, its packages are not installed, it cannot express the model, or
            the folder holds something.
        IncompatibleVersionError: the installed transformers has no such exporters.
        CheckpointError: the export does not give the model's logits.

    Example:
        >>> import tempfile
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse.evaluation import export_model
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=8, patch_size=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = export_model(ViTForImageClassification(config), "dynamo", folder, repeats=1)
        >>> sorted(exported.files), exported.difference < 1e-5
        (['config.json', 'export.json', 'model.pt2'], True)
    """
    check_format(format)
    check_least(batch_size=batch_size, repeats=repeats)
    if format == "executorch" and batch_size > _LARGEST_EXECUTORCH_BATCH:
        raise ConfigurationError(
            f"`batch_size={batch_size}` is more than an ExecuTorch export takes. Pass {_LARGEST_EXECUTORCH_BATCH} or "
            "less."
        )
    check_folder(folder)
    if model_device(model).type != "cpu":
        raise ConfigurationError(
            f"The model is on {model_device(model)}, and the export is compared on the CPU. Pass `model.cpu()`."
        )
    with finished_folder(folder) as written, _quiet(), undisturbed(model), torch.no_grad():
        _write(model, format, written)
        if processor is not None:
            processor.save_pretrained(written)
        run, threads = _loaded(format, written), torch.get_num_threads()
        difference, largest = _compare(model, run, format)
        model_ms, export_ms = _times(model, run, _batch(model, batch_size), repeats)
        files = {path.name: path.stat().st_size for path in sorted(written.iterdir())}
        # An open file keeps its folder from being renamed on Windows.
        del run
    return Exported(Path(folder), files, difference, largest, batch_size, model_ms, export_ms, repeats, threads)


def check_format(format: str) -> None:
    """Raise unless a format exists and what it needs is installed."""
    if format not in FORMATS:
        raise ConfigurationError(
            f"`format={format!r}` is not one of {joined(list(FORMATS), 'and')}.{did_you_mean(format, list(FORMATS))}"
        )
    if Version(transformers.__version__) < Version(_OLDEST_TRANSFORMERS):
        raise IncompatibleVersionError(
            f"Exporting needs transformers {_OLDEST_TRANSFORMERS} or newer, and {transformers.__version__} is "
            f'installed. Run `pip install "transformers>={_OLDEST_TRANSFORMERS}"`.'
        )
    missing = [name for name in FORMATS[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"`format={format!r}` (--format) needs packages that are not installed: {', '.join(missing)}. Run "
            f"`pip install {' '.join(missing)}`"
            + (", or install hf_featreuse with its extra `export`." if format != "executorch" else ".")
        )


def check_least(**values: int) -> None:
    """Raise `ConfigurationError` if a number is below 1."""
    for name, value in values.items():
        if value < 1:
            raise ConfigurationError(f"`{name}={value}` (--{name}) is below 1. Pass 1 or more.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters to their errors: they print their progress and warn of operators that no model here has."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _write(model: PreTrainedModel, format: str, folder: Path) -> None:
    """Trace the model with a batch whose size may change, and save the program."""
    from transformers.exporters.auto import AutoExportConfig, AutoHfExporter

    inputs = _batch(model, _TRACED_BATCH)
    size: Any = torch.export.Dim.DYNAMIC
    if format == "executorch":
        size = torch.export.Dim("batch", min=1, max=_LARGEST_EXECUTORCH_BATCH)
    options = {"export_format": format, "dynamic_shapes": {name: {0: size} for name in inputs}}
    try:
        config = AutoExportConfig.from_dict(options)
        AutoHfExporter.from_config(config).export(model, inputs, config).save_pretrained(folder)
    except Exception as error:
        raise ConfigurationError(
            f"{type(model).__name__} cannot be exported to {format}: {kind_and_text(error)} Choose another format."
        ) from error


def _loaded(format: str, folder: Path) -> Callable[[Inputs], torch.Tensor]:
    """A function from a batch to the logits of the saved export, on as many threads as PyTorch uses."""
    from transformers.exporters.base import ExportedModel

    options: dict[str, Any] = {}
    if format == "onnx":
        import onnxruntime  # pyright: ignore[reportMissingImports]

        options["session_options"] = onnxruntime.SessionOptions()
        options["session_options"].intra_op_num_threads = torch.get_num_threads()
    elif format == "openvino":
        # By default OpenVINO computes in bfloat16 if the processor can.
        options["config"] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    # A program of torch.export is a pickle; this one was written a moment ago.
    exported = ExportedModel.from_pretrained(folder, device="cpu", trust_remote_code=True, **options)
    return lambda inputs: exported(**inputs)[0]


def _compare(model: PreTrainedModel, run: Callable[[Inputs], torch.Tensor], format: str) -> tuple[float, float]:
    """The largest difference of the logits, and the largest logit."""
    difference = largest = 0.0
    for size in _BATCHES:
        inputs = _batch(model, size)
        expected = model(**inputs)[0]
        try:
            found = run(inputs)
        except Exception as error:
            raise CheckpointError(
                f"The {format} export of {type(model).__name__} does not run on a batch of {size}: "
                f"{kind_and_text(error)} Nothing was saved. Choose another format."
            ) from error
        largest = max(largest, expected.abs().max().item())
        apart = (expected - found).abs().max().item() if found.shape == expected.shape else float("nan")
        # Also if it is not a number.
        if not apart <= _TOLERANCE * expected.abs().max().item():
            raise CheckpointError(
                f"The {format} export of {type(model).__name__} does not give the model's logits on a batch of "
                f"{size}: they differ by {apart:.2g}, and the largest is {largest:.2g}. Nothing was saved. Choose "
                "another format."
            )
        difference = max(difference, apart)
    return difference, largest


def _times(
    model: PreTrainedModel, run: Callable[[Inputs], torch.Tensor], inputs: Inputs, repeats: int
) -> tuple[float, float]:
    """Medians in milliseconds of model and export, which run in turns, so that both meet the same disturbances."""
    runs: tuple[Callable[[Inputs], Any], ...] = (lambda inputs: model(**inputs), run)
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(-_WARM_UP, repeats):
        for function, measured in zip(runs, times, strict=True):
            start = time.perf_counter()
            function(inputs)
            if repeat >= 0:
                measured.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def _batch(model: PreTrainedModel, size: int) -> Inputs:
    """A batch of noise as the model takes it."""
    generator = torch.Generator().manual_seed(size)

    def noise(value: torch.Tensor) -> torch.Tensor:
        shape = (size, *value.shape[1:])
        if value.is_floating_point():
            return torch.randn(shape, generator=generator).to(value)
        return torch.randint(2, shape, generator=generator).to(value)

    return {name: noise(value) for name, value in dummy_inputs(model).items()}
