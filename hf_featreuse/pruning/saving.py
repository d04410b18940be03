"""Save a shallower model for plain `from_pretrained`, completely or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from hf_featreuse.errors import CheckpointError, ConfigurationError
from hf_featreuse.folders import finished_folder, new_folder
from hf_featreuse.pruning.removing import logits_difference


def check_folder(folder: str | Path) -> None:
    """Raise `ConfigurationError` if a folder to write is not empty or cannot be written."""
    folder = Path(folder)
    try:
        taken = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
        if not taken:
            with new_folder(folder, keep=False), tempfile.TemporaryFile(dir=folder):
                pass
    except (OSError, ValueError) as error:  # `ValueError` for a null character.
        raise ConfigurationError(
            f"`--output_dir {folder}` cannot be written: {getattr(error, 'strerror', None) or error}. Pass another "
            "folder."
        ) from None
    if taken:
        raise ConfigurationError(f"`--output_dir {folder}` exists and is not empty. Pass another folder.")


def save_whole(model: PreTrainedModel, processor: BaseImageProcessor | None, folder: str | Path) -> None:
    """Save a model and its image processor, load them again, and only then give the folder its name.

    Raises:
        ConfigurationError: the folder is not empty.
        CheckpointError: the saved model does not load as the same model.
    """
    check_folder(folder)
    with finished_folder(folder) as written:
        model.save_pretrained(written)
        if processor is not None:
            processor.save_pretrained(written)
        _check_reload(model, written)


def _check_reload(model: PreTrainedModel, folder: Path) -> None:
    """Load a checkpoint as a user would, and compare."""
    with torch.random.fork_rng([]):
        loaded: Any = type(model).from_pretrained(folder, output_loading_info=True, local_files_only=True)
    again, report = loaded
    problems = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    weights = again.state_dict()
    wrong = [key for key, value in model.state_dict().items() if not torch.equal(value.cpu(), weights[key])]
    if problems or wrong or logits_difference(model, [], again.to(model.device)) != 0:
        raise CheckpointError(
            f"The checkpoint of this {type(model).__name__} does not load as the same model: "
            f"{problems or wrong[:4] or 'its logits differ'}. Nothing was saved."
        )
