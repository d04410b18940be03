"""What a user without this package does: load what was pushed, in a process that cannot import it."""

import contextlib
import io
import sys
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor


def set_up() -> None:
    sys.modules["hf_featreuse"] = None  # pyright: ignore[reportArgumentType]
    with pytest.raises(ImportError):
        import hf_featreuse  # noqa: F401


def weights(repo: str, token: str | None = None, revision: str = "main") -> dict[str, torch.Tensor]:
    model = AutoModelForImageClassification.from_pretrained(repo, token=token, revision=revision)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def answers(repo: str, token: str | None = None) -> tuple[str, list[Any]]:
    """The class of the processor, and the prediction of the pipeline."""
    processor = AutoImageProcessor.from_pretrained(repo, token=token)
    return type(processor).__name__, pipeline("image-classification", model=repo, token=token)(
        Image.new("RGB", (40, 30))
    )


def run_snippet(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue()
