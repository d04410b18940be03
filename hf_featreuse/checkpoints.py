"""Read back what was saved: whole checkpoints only, every weight, to the bit.

transformers 5.23 writes a Trainer checkpoint under the key names of the published weights, and reads it back by the
names inside the model with a load that is not strict: for ViT, DeiT, BEiT, Swin and DINOv2 most weights are then
missing and training goes on from what was there before (huggingface/transformers#43701).
"""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME, logging
from transformers.utils.import_utils import is_peft_available

from hf_featreuse.errors import CheckpointError
from hf_featreuse.resume_state import resume_state_fault

logger = logging.get_logger(__name__)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load every weight of a checkpoint into a model, whatever key names it was written under.

    Args:
        model (`torch.nn.Module`): the model, of the class and configuration that were saved.
        folder (`str` or `Path`): checkpoint folder with `model.safetensors`, its shards, or `pytorch_model.bin`.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape; the model is left as it was.

    Example:
        >>> import tempfile
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse.checkpoints import load_weights
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
    """Load a plain model's weights strictly; check an adapter's file and return False: Trainer loads it."""
    if model is None:
        return False
    if is_adapter(model):
        check_adapter(model, folder)
        return False
    load_weights(model, folder)
    return True


def is_adapter(model: nn.Module | None) -> bool:
    """Whether a model is wrapped by PEFT, which saves and loads its adapters alone."""
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


def checkpoint_fault(folder: str | Path) -> str | None:
    """Say what is wrong with a checkpoint folder, or give `None` for a whole one.

    A file that was cut short is found by its length and its end, without reading it through.
    """
    folder = Path(folder)
    state = folder / TRAINER_STATE_NAME
    if not state.is_file():
        return f"{TRAINER_STATE_NAME}, which is written last, is missing"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut short"
    if fault := resume_state_fault(folder):
        return fault
    for path in sorted(folder.rglob("*.safetensors")):
        if not _is_whole_safetensors(path):
            return f"{path.name} is cut short"
    for path in sorted(folder.rglob("*.index.json")):
        try:
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except ValueError:
            return f"{path.name} is cut short"
        missing = sorted(shard for shard in shards if not (path.parent / shard).is_file())
        if missing:
            return f"{missing[0]} is missing"
    # With `save_only_model` there is neither; sharded engines write the optimizer under other names.
    if (folder / "scheduler.pt").is_file() and not [*folder.glob("optimizer*"), *folder.glob("global_step*")]:
        return "optimizer.pt is missing"
    for path in sorted(path for ending in ("*.pt", "*.bin", "*.pth") for path in folder.rglob(ending)):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is cut short"
    return None


def newest_whole(run_folder: str | Path, not_after: int | None = None) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint of a run, or `None`, and what is wrong with each of the newer ones."""
    found = [
        (step, path) for path in Path(run_folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (step := _step(path)) >= 0
    ]
    faults = []
    for _, path in sorted((step, path) for step, path in found if not_after is None or step <= not_after)[::-1]:
        fault = checkpoint_fault(path)
        if fault is None:
            return str(path), faults
        faults.append(f"{path} ({fault})")
    return None, faults


def last_whole_checkpoint(run_folder: str | Path, not_after: int | None = None) -> str | None:
    """The newest whole checkpoint of a run; what is passed over is said in a warning.

    Args:
        run_folder (`str` or `Path`): the `output_dir` of a run, with folders `checkpoint-<step>`.
        not_after (`int`, *optional*): leave out checkpoints of later steps.

    Returns:
        `str`: its folder; `None` where there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    path, faults = newest_whole(run_folder, not_after)
    if path is not None:
        if faults:
            logger.warning(f"Resuming from {path}, the last whole checkpoint. Passed over: {'; '.join(faults)}.")
        return path
    if faults:
        raise CheckpointError(
            f"No checkpoint to resume from is whole: {'; '.join(faults)}. Delete them and pass "
            "`resume_from_checkpoint=False`, or another `output_dir`, to start anew."
        )
    return None


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | bool | None:
    """The checkpoint to resume from: the one asked for, or the last whole one before it.

    `True` and `"last"` ask for the newest in `output_dir`.
    """
    if resume_from_checkpoint in (None, False):
        return None
    if resume_from_checkpoint is True or resume_from_checkpoint == "last":
        # Where there is none at all, Trainer's own error says so.
        return last_whole_checkpoint(output_dir) or True
    path = Path(str(resume_from_checkpoint))
    if not path.is_dir():
        raise CheckpointError(
            f"`resume_from_checkpoint={str(path)!r}` is no folder. Pass a folder `checkpoint-<step>` of an earlier "
            "run, or `True` for the newest one in `output_dir`."
        )
    fault = checkpoint_fault(path)
    if fault is None or _step(path) < 0:
        return str(path)
    return last_whole_checkpoint(path.parent, not_after=_step(path))


def _step(path: Path) -> int:
    digits = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(digits) if digits.isdigit() else -1


def _is_whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length or length == 0:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def _read_file(folder: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a checkpoint in one file, under the names in the file; `None` for a checkpoint in shards."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return safetensors.torch.load_file(folder / SAFE_WEIGHTS_NAME, device="cpu")
    if (folder / WEIGHTS_NAME).is_file():
        return torch.load(folder / WEIGHTS_NAME, map_location="cpu", weights_only=True)
    return None


def _read_converted(model: PreTrainedModel, folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors under the names inside the model, as `from_pretrained` converts them."""
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
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint {folder} cannot be read: {str(error).splitlines()[0]} Nothing was loaded. Resume "
                "from another checkpoint."
            ) from error
    twin, report = loaded
    # `from_pretrained` would fill these at random and go on.
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


def _describe(folder: str | Path, model: str, problems: Mapping[str, Any]) -> str:
    said = ", ".join(f"{name}: {keys[:4]} ({len(keys)})" for name, keys in problems.items() if keys)
    return (
        f"The checkpoint {folder} does not hold the weights of this {model} exactly: {said}. Nothing was loaded. "
        "Resume from another checkpoint, or with the model and configuration that wrote this one."
    )
