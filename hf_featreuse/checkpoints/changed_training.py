"""Describe training options that changed since a checkpoint, and their effect on the resumed run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

_SEEN_AGAIN = "so images of this epoch may be seen again or left out"
_ORDER = f"the rest of the data is shuffled in another order, {_SEEN_AGAIN}"
_BATCHES = f"the position in the data follows from the number of optimizer steps, {_SEEN_AGAIN}"
# Recorded options with an effect after the checkpoint, and the effect; those in `_RESTORED` have none.
_EFFECTS = {
    "seed": f"{_ORDER}; dropout continues from the random state of the checkpoint",
    "data_seed": _ORDER,
    "gradient_accumulation_steps": _BATCHES,
    "per_device_train_batch_size": _BATCHES,
    "processes": f"{_BATCHES}; each process starts with a new random state",
    "precision": "steps are computed in the new precision from here on; weights and moments stay as they are",
    "lr_scheduler_type": "learning rates follow the new schedule from the next step on, at the learning rate of the "
    "checkpoint",
    "warmup_steps": "learning rates follow the new warm-up from the next step on",
    "max_grad_norm": "gradients are clipped at the new norm from here on",
    "label_smoothing_factor": "the loss is smoothed by the new factor from here on",
    "loss": "the loss is the new one from here on",
    "focal_gamma": "the focal loss has the new exponent from here on",
    "class_weights": "the loss has the new weights from here on",
}
_RESTORED = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim_args",
    "layer_decay",
    "head_lr_multiplier",
)


def training_settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the options of a run to compare on resume, as values for JSON."""
    settings = {
        "processes": args.world_size,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
    }
    # A plain `TrainingArguments` lacks those of the recipe; JSON would give tuples back as lists.
    found = {name: getattr(args, name, None) for name in (*_EFFECTS, *_RESTORED)} | settings
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def describe_changed_training(saved: object, now: Mapping[str, Any]) -> str | None:
    """Describe which training options changed since a checkpoint and their effect; `None` if none did.

    Args:
        saved (`dict`): what [`training_settings`] returned when the checkpoint was written. Older checkpoints have
            none.
        now (`dict`): what it returns for the run that resumes it.
    """
    before = saved if isinstance(saved, dict) else {}
    changed = [name for name, value in now.items() if name in before and before[name] != value]
    if not changed:
        return None
    named = {name: f"`{name}={now[name]!r}` (before: {before[name]!r})" for name in changed}
    effects = [f"{named[name]}: {_EFFECTS[name]}." for name in changed if name in _EFFECTS]
    without = [named[name] for name in changed if name not in _EFFECTS]
    sentences = ["Training options changed since the checkpoint.", *effects]
    if without:
        sentences.append(
            "These have no effect, because the optimizer and the scheduler of the checkpoint are restored: "
            f"{', '.join(without)}. To change them, start a new run from the weights with `from_pretrained`."
        )
    return " ".join(sentences)
