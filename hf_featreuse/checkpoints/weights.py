"""Load every saved weight, bit-identical.

transformers 5.23 writes a Trainer checkpoint under the key names of the published weights, and reads it back by the
names inside the model with a load that is not strict. For ViT, DeiT, BEiT, Swin and DINOv2 most weights are then
missing, and training continues from the weights that the model had before (huggingface/transformers#43701).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils.import_utils import is_peft_available

from hf_featreuse.checkpoints.contents import FaultError, check_safetensors, read_tensors
from hf_featreuse.errors import CheckpointError
from hf_featreuse.text import kind_and_text


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load every weight of a checkpoint into a model, whatever key names it uses.

    Args:
        model (`torch.nn.Module`): the model, of the class and configuration that were saved.
        folder (`str` or `Path`): checkpoint folder with `model.safetensors`, its shards, or `pytorch_model.bin`.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape; the model is left as it was.

    Example:
        >>> import tempfile
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse.checkpoints.weights import load_weights
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> model = ViTForImageClassification(config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     load_weights(ViTForImageClassification(config), folder)
    """
    state = _read_file(Path(folder))
    own = model.state_dict()
    if state is None or set(state) != set(own):
        state = _read_converted(model, folder) if isinstance(model, PreTrainedModel) else state or {}
    _check_state(model, own, state, folder)
    model.load_state_dict(state, strict=True)


def load_exactly(model: nn.Module | None, folder: str | Path) -> bool:
    """Load a plain model's weights strictly and return `True`; only check an adapter's file, which Trainer loads."""
    if model is None:
        return False
    if is_adapter(model):
        check_adapter(model, folder)
        return False
    load_weights(model, folder)
    return True


def is_adapter(model: nn.Module | None) -> bool:
    """Return whether a model is wrapped by PEFT, which saves and loads only its adapters."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def check_adapter(model: nn.Module, folder: str | Path) -> None:
    """Raise `CheckpointError` unless an adapter checkpoint holds every weight of the active adapter."""
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    with safetensors.safe_open(path, framework="pt") as file:
        saved = set(file.keys())
    missing = sorted(set(get_peft_model_state_dict(model)) - saved)
    if missing:
        raise CheckpointError(_describe(folder, "adapter", {"missing": missing}))


def _read_file(folder: Path) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a checkpoint in one file, under its names; `None` for a sharded checkpoint."""
    try:
        if (folder / SAFE_WEIGHTS_NAME).is_file():
            check_safetensors(folder / SAFE_WEIGHTS_NAME)
            return safetensors.torch.load_file(folder / SAFE_WEIGHTS_NAME, device="cpu")
        if (folder / WEIGHTS_NAME).is_file():
            return read_tensors(folder / WEIGHTS_NAME)
    except FaultError as error:
        raise CheckpointError(_unreadable(folder, str(error))) from error
    return None


def _read_converted(model: PreTrainedModel, folder: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors under the names inside the model, as `from_pretrained` converts them."""
    # float32 holds bfloat16 and float16 exactly; loading in the model's first dtype would round mixed ones.
    is_double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        try:
            loaded: Any = type(model).from_pretrained(
                folder,
                config=copy.deepcopy(model.config),
                dtype=torch.float64 if is_double else torch.float32,
                local_files_only=True,
                output_loading_info=True,
                # Reported like a missing weight, and refused below.
                ignore_mismatched_sizes=True,
            )
        # For bad files transformers raises errors of many classes.
        except Exception as error:
            raise CheckpointError(_unreadable(folder, kind_and_text(error))) from error
    twin, report = loaded
    # `from_pretrained` fills these at random and continues.
    problems = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if problems:
        raise CheckpointError(_describe(folder, type(model).__name__, problems))
    return twin.state_dict()


def _check_state(
    model: nn.Module, own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], folder: str | Path
) -> None:
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    problems = {"missing": sorted(set(own) - set(state)), "unexpected": sorted(set(state) - set(own)), "shape": shapes}
    if any(problems.values()):
        raise CheckpointError(_describe(folder, type(model).__name__, problems))


def _unreadable(folder: str | Path, reason: str) -> str:
    return f"The checkpoint {folder} cannot be read: {reason}. Nothing was loaded. Resume from another checkpoint."


def _describe(folder: str | Path, model: str, problems: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{name}: {keys[:4]} ({len(keys)})" for name, keys in problems.items() if keys)
    return (
        f"The weights in the checkpoint {folder} are not exactly those of this {model}: {listed}. Nothing was loaded. "
        "Resume from another checkpoint, or with the model and configuration that wrote this one."
    )
