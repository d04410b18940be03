"""What options of training that changed since a checkpoint do from there on, and which of them do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

_SEEN_AGAIN = "so images of this epoch may be seen again or left out"
_ORDER = f"the rest of the data is shuffled in another order, {_SEEN_AGAIN}"
_BATCHES = f"the position in the data follows from the number of optimizer steps, {_SEEN_AGAIN}"
# Options that have an effect from the checkpoint on, and which. The others that are recorded have none.
_EFFECTS = {
    "seed": f"{_ORDER}; dropout continues from the random state of the checkpoint",
    "data_seed": _ORDER,
    "gradient_accumulation_steps": _BATCHES,
    "per_device_train_batch_size": _BATCHES,
    "processes": f"{_BATCHES}; each process begins with a new random state",
    "precision": "steps are computed in the new precision from here on; weights and moments stay as they are",
    "lr_scheduler_type": "learning rates follow the new schedule from the next step on, at the learning rate of the "
    "checkpoint",
    "warmup_steps": "learning rates follow the new warm-up from the next step on",
    "max_grad_norm": "gradients are clipped at the new norm from here on",
    "label_smoothing_factor": "the loss is smoothed by the new factor from here on",
}
_RESTORED = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim_args",
)


def training_settings(args: TrainingArguments) -> dict[str, Any]:
    """The options of a run to compare on resume, as JSON holds them."""
    settings = {
        "processes": args.world_size,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
    }
    return {name: settings[name] if name in settings else getattr(args, name) for name in (*_EFFECTS, *_RESTORED)}


def describe_changed_training(saved: object, now: Mapping[str, Any]) -> str | None:
    """Say which options of training changed since a checkpoint and what follows; `None` if none did.

    Args:
        saved (`dict`): what [`training_settings`] gave when the checkpoint was written. Older checkpoints have none.
        now (`dict`): what it gives for the run that resumes it.
    """
    before = saved if isinstance(saved, dict) else {}
    changed = [name for name, value in now.items() if name in before and before[name] != value]
    if not changed:
        return None
    named = {name: f"`{name}={now[name]!r}` (before: {before[name]!r})" for name in changed}
    effects = [f"{named[name]}: {_EFFECTS[name]}." for name in changed if name in _EFFECTS]
    without = [named[name] for name in changed if name not in _EFFECTS]
    said = ["Options of training changed since the checkpoint.", *effects]
    if without:
        said.append(
            "Without effect, as the optimizer and the scheduler of the checkpoint are restored: "
            f"{', '.join(without)}. To change them, start a new run from the weights with `from_pretrained`."
        )
    return " ".join(said)
