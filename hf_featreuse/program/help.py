"""`--help` of the training program: options by topic, the method first, readable in 80 columns."""

from __future__ import annotations

import argparse
import enum
import shutil
import textwrap
from typing import Any, get_args

from hf_featreuse.data.seeded import AUGMENTATIONS
from hf_featreuse.method.freezing import FrozenBatchNorm
from hf_featreuse.method.schedule import DropGranularity, DropRateOverTime, DropRateSchedule, TrainTrunk
from hf_featreuse.program.arguments import DIGITS, FINE_TUNING, FROM_SCRATCH
from hf_featreuse.program.config_file import DEFAULTS, sections
from hf_featreuse.recipe.losses import LossKind

# Choices of fields that are plain strings, so that errors name the option as in Python.
_CHOICES = {
    "drop_rate_schedule": get_args(DropRateSchedule),
    "drop_rate_over_time": get_args(DropRateOverTime),
    "drop_granularity": get_args(DropGranularity),
    "train_trunk": get_args(TrainTrunk),
    "frozen_batch_norm": get_args(FrozenBatchNorm),
    "loss": get_args(LossKind),
    "augmentation": AUGMENTATIONS,
}
# The arguments of Trainer that most runs set, with help that fits on a line.
_RECIPE = {
    "num_train_epochs": "Passes over the training images.",
    "max_steps": "Total optimizer steps, instead of --num_train_epochs.",
    "per_device_train_batch_size": "Images per process and micro-batch.",
    "gradient_accumulation_steps": "Micro-batches per optimizer step.",
    "optim": "Optimizer, such as adamw_torch, sgd or adafactor.",
    "learning_rate": "Peak learning rate.",
    "lr_scheduler_type": "Such as cosine, linear or constant_with_warmup.",
    "warmup_steps": "Steps of warm-up; below 1 a fraction of the run.",
    "weight_decay": "For all weights except norms and biases.",
    "max_grad_norm": "Clip gradients to this norm; 0 for no clipping.",
    "label_smoothing_factor": "From 0 to 1.",
    "seed": "For weights, data order, augmentation and schedule.",
}
_RUN = {
    "output_dir": "Folder for the model, checkpoints and results.",
    "do_train": "Train. By default --do_train and --do_eval are set.",
    "do_eval": "Evaluate at the end, and write the report evaluation/.",
    "do_predict": "Classify the test split, and write predictions.csv.",
    "per_device_eval_batch_size": "Images per process in evaluation.",
    "eval_strategy": "When to evaluate: no, steps or epoch.",
    "save_strategy": "When to write a checkpoint: no, steps, epoch or best.",
    "save_total_limit": "Number of checkpoints to keep.",
    "load_best_model_at_end": "Keep the best model instead of the last.",
    "metric_for_best_model": "Such as accuracy or loss.",
    "resume_from_checkpoint": "`last`, or the path of a checkpoint.",
    "logging_steps": "Log every this many steps.",
    "report_to": "Trackers, such as tensorboard, wandb or trackio.",
    "use_cpu": "Do not use a GPU.",
    "bf16": "Train in bfloat16 mixed precision.",
    "torch_compile": "Compile block by block.",
    "dataloader_num_workers": "Number of processes that decode images.",
    "push_to_hub": "Push the model with its card after training.",
    "hub_model_id": "Name of the repository, as owner/name.",
}
_INDENT, _COLUMN = 2, 26

_USAGE = """\
usage: featreuse train [--config FILE] [flags]

Train or fine-tune an image classifier with feature reuse. Without flags: a
small ViT from scratch on scikit-learn's handwritten digits. With data and no
model: fine-tunes a checkpoint. With --model_type: trains from scratch."""
_END = """\
Defaults are in brackets; if there are three: for the digits, for training from
scratch, for fine-tuning. Dashes and underscores are equivalent in flags."""


def help_text(parser: argparse.ArgumentParser, everything: bool = False) -> str:
    """Return the help of the program.

    Args:
        parser (`argparse.ArgumentParser`): with all options.
        everything (`bool`, defaults to `False`): whether to list all other arguments of Trainer too.
    """
    # A boolean option that defaults to true has a second action, `--no_NAME`, which gets no line.
    actions = {action.dest: action for action in reversed(parser._actions)}
    topics = sections()
    others = [name for name in topics.pop("training") if name not in {**_RECIPE, **_RUN}]
    topics["recipe"] = [*_RECIPE, *topics["recipe"]]
    topics["run"] = [*_RUN, *topics["run"]]
    if everything:
        topics["other arguments of Trainer"] = others
    width = max(60, min(shutil.get_terminal_size((80, 24)).columns, 100))
    lines = [_USAGE]
    for title, names in topics.items():
        lines += ["", f"{title}:", *(_entry(actions[name], width) for name in names if name in actions)]
    more = "" if everything else f"\n--help_all also lists the other {len(others)} arguments of Trainer."
    return "\n".join([*lines, "", f"{_END}{more}"])


def _entry(action: argparse.Action, width: int) -> str:
    """Return the help of one option: its name and type, and to the right of or below them what it does."""
    name = action.dest
    head = " " * _INDENT + " ".join(filter(None, [f"--{name}", _kind(action)]))
    words = {**_RECIPE, **_RUN}.get(name) or str(action.help or "").replace("%%", "%")
    text = " ".join([*words.split(), _defaults(name)])
    wrapped = textwrap.wrap(text, width - _COLUMN - 1, break_long_words=False, break_on_hyphens=False)
    pad = " " * _COLUMN
    if len(head) + 2 <= _COLUMN:
        return "\n".join([head.ljust(_COLUMN) + wrapped[0], *(pad + line for line in wrapped[1:])])
    return "\n".join([head, *(pad + line for line in wrapped)])


def _kind(action: argparse.Action) -> str:
    """Return what follows the name of the flag: its choices or its type."""
    if choices := _CHOICES.get(action.dest) or action.choices:
        shown = [str(_plain(choice)) for choice in choices]
        return f"{{{','.join(shown)}}}" if len(shown) <= 8 else "NAME"
    if action.nargs == "?" or getattr(action.type, "__name__", "") == "string_to_bool":
        return "{true,false}" if DEFAULTS.get(action.dest) else ""
    kinds = {int: "N", float: "X"}
    return f"{kinds.get(action.type, 'TEXT')}{' ...' if action.nargs == '+' else ''}"  # type: ignore[arg-type]


def _defaults(name: str) -> str:
    """Return the default in brackets, or three if they depend on what is trained; an empty text for no default."""
    plain = DEFAULTS.get(name)
    found = [values.get(name, plain) for values in (DIGITS, FROM_SCRATCH, FINE_TUNING)]
    if all(value == found[0] for value in found):
        return f"[{_shown(found[0])}]" if found[0] not in (None, "", [], {}) else ""
    return f"[{'; '.join(map(_shown, found))}]"


def _shown(value: Any) -> str:
    value = _plain(value)
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value
