"""The verb `featreuse export`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_featreuse.evaluation.exporting import Exported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a local checkpoint folder of an image classifier, or a Hub id")
    parser.add_argument(
        "--format",
        required=True,
        choices=("onnx", "dynamo", "openvino", "executorch"),
        help="format to write; dynamo is a program of torch.export and needs no other package",
    )
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="a new or empty folder for the export")
    parser.add_argument(
        "--batch_size", type=int, metavar="N", default=1, help="images per batch when latency is measured"
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N", default=20, help="timed runs of model and export, in alternation"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> str:
    """Export a model, compare logits, and return the report."""
    from hf_featreuse.data.evaluation import open_classifier
    from hf_featreuse.evaluation.exporting import check_format, check_least, export_model
    from hf_featreuse.pruning.saving import check_folder

    # Before anything is loaded.
    check_format(options.format)
    check_least(batch_size=options.batch_size, repeats=options.repeats)
    check_folder(options.output_dir)
    opened = open_classifier(options.model, needs_processor=False)
    exported = export_model(
        opened.model,
        options.format,
        options.output_dir,
        processor=opened.processor,
        batch_size=options.batch_size,
        repeats=options.repeats,
    )
    if options.json:
        report = {"model": options.model, "format": options.format, **dataclasses.asdict(exported)}
        return json.dumps({**report, "folder": str(exported.folder)}, indent=2)
    lines = _report(opened.model, exported)
    if opened.processor is None:
        lines.append(f"{options.model} has no image processor; none was saved.")
    return "\n".join(lines)


def _report(model: PreTrainedModel, exported: Exported) -> list[str]:
    files = ", ".join(f"{name} ({size / 1024:,.0f} kB)" for name, size in exported.files.items() if "model" in name)
    images = "1 image" if exported.batch_size == 1 else f"{exported.batch_size} images"
    threads = "1 thread" if exported.threads == 1 else f"{exported.threads} threads"
    return [
        f"{type(model).__name__}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters",
        f"saved in {exported.folder}: {files}",
        f"logits differ by at most {exported.difference:.1e}; the largest is {exported.largest_logit:.1f}",
        f"latency of {images}: {exported.model_ms:.2f} ms before, {exported.export_ms:.2f} ms after",
        f"  (medians of {exported.repeats} alternating runs each, on {threads})",
    ]
