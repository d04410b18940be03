"""Export a trained classifier for another runtime, and compare its logits with those of the model.

The exporters are those of transformers (`transformers.exporters`). This module adds a dynamic batch size, the
comparison and the latencies.
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

# Packages that each format needs in addition to torch. The extra `export` installs those of ONNX and OpenVINO, not
# ExecuTorch: it brings twenty packages, one of which (torchao) transformers imports at each start.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "dynamo": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
}
# The first release whose exporters can save a model and run the saved one.
_OLDEST_TRANSFORMERS = "5.23"
# Batch sizes that are compared. The export is traced with two.
_BATCHES = (1, 2, 5)
_TRACED_BATCH = 2
# ExecuTorch plans its memory ahead.
_LARGEST_EXECUTORCH_BATCH = 64
# Runtimes sum in another order; in float32 logits differ by about 1e-6 of the largest.
_TOLERANCE = 1e-3
_WARM_UP = 3

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """The result of [`export_model`].

    Args:
        folder (`pathlib.Path`): the folder of the export.
        files (`dict[str, int]`): its files with their sizes in bytes.
        difference (`float`): largest difference between the logits of the model and of the export.
        largest_logit (`float`): largest absolute logit, as a scale for the difference.
        batch_size (`int`): images per batch of the two latencies below.
        model_ms (`float`): median latency of the model in eager PyTorch, in milliseconds per batch.
        export_ms (`float`): the same for the export.
        repeats (`int`): timed runs of each, in alternation.
        threads (`int`): number of threads of each.
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
    """Export an image classifier for any batch size, and check the logits of the export.

    The saved export is loaded again and compared with the model on noise, in batches of 1, 2 and 5 images. The folder
    appears only if they agree. The model is not changed.

    Args:
        model (`PreTrainedModel`): a trained image classifier, on the CPU and in float32.
        format (`str`): `"dynamo"` (a program of `torch.export`), `"onnx"`, `"openvino"` or `"executorch"`. ExecuTorch
            takes batches of up to 64 images.
        folder (`str` or `pathlib.Path`): a new or empty folder for the export.
        processor (`BaseImageProcessor`, *optional*): saved with the export.
        batch_size (`int`, defaults to 1): images per batch when latency is measured.
        repeats (`int`, defaults to 20): timed runs of model and export, in alternation; the median is reported.

    Returns:
        `Exported`: files, difference of the logits and latencies.

    Raises:
        ConfigurationError: the format is unknown, its packages are not installed, it cannot express the model, or
            the folder is not empty.
        IncompatibleVersionError: the installed transformers has no such exporters.
        CheckpointError: the logits of the export differ from those of the model.

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
            f"`batch_size={batch_size}` is too large for an ExecuTorch export. Pass at most "
            f"{_LARGEST_EXECUTORCH_BATCH}."
        )
    check_folder(folder)
    if model_device(model).type != "cpu":
        raise ConfigurationError(
            f"The model is on {model_device(model)}, but the export is compared on the CPU. Pass `model.cpu()`."
        )
    with finished_folder(folder) as written, _quiet(), undisturbed(model), torch.no_grad():
        _write(model, format, written)
        if processor is not None:
            processor.save_pretrained(written)
        run, threads = _loaded(format, written), torch.get_num_threads()
        difference, largest = _compare(model, run, format)
        model_ms, export_ms = _times(model, run, _batch(model, batch_size), repeats)
        files = {path.name: path.stat().st_size for path in sorted(written.iterdir())}
        # On Windows a folder with an open file cannot be renamed.
        del run
    return Exported(Path(folder), files, difference, largest, batch_size, model_ms, export_ms, repeats, threads)


def check_format(format: str) -> None:
    """Raise unless the format is known and its packages are installed."""
    if format not in FORMATS:
        raise ConfigurationError(
            f"`format={format!r}` is not one of {joined(list(FORMATS), 'and')}.{did_you_mean(format, list(FORMATS))}"
        )
    if Version(transformers.__version__) < Version(_OLDEST_TRANSFORMERS):
        raise IncompatibleVersionError(
            f"Exporting needs transformers {_OLDEST_TRANSFORMERS} or newer, but {transformers.__version__} is "
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
    """Silence exporters, which print progress and warn about operators that these models do not have."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _write(model: PreTrainedModel, format: str, folder: Path) -> None:
    """Trace the model with a dynamic batch size, and save the program."""
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
    """Return a function from a batch to the logits of the saved export, with as many threads as PyTorch."""
    from transformers.exporters.base import ExportedModel

    options: dict[str, Any] = {}
    if format == "onnx":
        import onnxruntime  # pyright: ignore[reportMissingImports]

        options["session_options"] = onnxruntime.SessionOptions()
        options["session_options"].intra_op_num_threads = torch.get_num_threads()
    elif format == "openvino":
        # By default OpenVINO computes in bfloat16 if the processor supports it.
        options["config"] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    # A program of torch.export is a pickle; this one was just written by this process.
    exported = ExportedModel.from_pretrained(folder, device="cpu", trust_remote_code=True, **options)
    return lambda inputs: exported(**inputs)[0]


def _compare(model: PreTrainedModel, run: Callable[[Inputs], torch.Tensor], format: str) -> tuple[float, float]:
    """Return the largest difference of the logits, and the largest logit."""
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
        # `not <=` also catches NaN.
        if not apart <= _TOLERANCE * expected.abs().max().item():
            raise CheckpointError(
                f"The logits of the {format} export of {type(model).__name__} differ from those of the model by "
                f"{apart:.2g} on a batch of {size}; the largest logit is {largest:.2g}. Nothing was saved. Choose "
                "another format."
            )
        difference = max(difference, apart)
    return difference, largest


def _times(
    model: PreTrainedModel, run: Callable[[Inputs], torch.Tensor], inputs: Inputs, repeats: int
) -> tuple[float, float]:
    """Return medians in milliseconds of model and export, which alternate so that noise affects both."""
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
    """Return a batch of noise in the shape of the model's input."""
    generator = torch.Generator().manual_seed(size)

    def noise(value: torch.Tensor) -> torch.Tensor:
        shape = (size, *value.shape[1:])
        if value.is_floating_point():
            return torch.randn(shape, generator=generator).to(value)
        return torch.randint(2, shape, generator=generator).to(value)

    return {name: noise(value) for name, value in dummy_inputs(model).items()}
