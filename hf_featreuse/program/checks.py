"""Checks of the options of the training program before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.text import did_you_mean, flat, joined

# Numbers that Trainer accepts and then fails on, divides by or silently ignores: the smallest and largest value.
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), (1, 1e9)
    ),
    **dict.fromkeys(("max_train_samples", "max_eval_samples", "image_size", "save_total_limit"), (1, 1e18)),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon"), (0, 1e18)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "horizontal_flip", "label_smoothing_factor"), (0, 1)),
    "random_erasing": (0, 1),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    **dict.fromkeys(("dataloader_num_workers", "rand_augment_ops"), (0, 1e4)),
    "rand_augment_magnitude": (0, 30),
    "image_scale_min": (1e-9, 1),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "num_train_epochs"), (1e-9, 1e18)),
    "early_stopping_patience": (1, 1e9),
    "early_stopping_threshold": (0, 1e18),
    "launch": (1, 1e4),
}


def check_values(*arguments: Any) -> None:
    """Raise for numbers out of range and for trackers that are not installed, before anything is loaded."""
    values = {name: value for each in arguments for name, value in vars(each).items()}
    for name, value in values.items():
        least, most = LIMITS.get(name, (-math.inf, math.inf))
        if isinstance(value, (int, float)) and not (math.isfinite(value) and least <= value <= most):
            raise ConfigurationError(
                f"`--{name} {value}` is out of range. Pass a number of at least {least:g}"
                f"{'' if math.isinf(most) else f' and at most {most:g}'}."
            )
        if isinstance(value, str) and not value.strip():
            raise ConfigurationError(f"`--{name}` is empty. Pass a value, or leave it out.")
    if not isinstance(values["lr_scheduler_kwargs"] or {}, dict):
        raise ConfigurationError(
            f"`--lr_scheduler_kwargs {flat(values['lr_scheduler_kwargs'])}` is not a JSON object. Pass one such as "
            "'{\"num_cycles\": 1}'."
        )
    if values["max_steps"] == 0:
        raise ConfigurationError("`--max_steps 0` trains nothing. Pass at least 1, or `--do_eval` to evaluate only.")
    for tracker in values["report_to"]:
        _check_tracker(tracker)


def _check_tracker(tracker: str) -> None:
    known = list(INTEGRATION_TO_CALLBACK)
    if tracker not in known:
        hint = did_you_mean(tracker, known) or f" Pass {joined(known, 'or')}."
        raise ConfigurationError(f"`--report_to {flat(tracker)}` is not a tracker that transformers knows.{hint}")
    if tracker not in get_available_reporting_integrations():
        raise ConfigurationError(f"`--report_to {tracker}`: its library is not installed. Install it, or pass none.")


def set_best_model(values: dict[str, Any], given: Collection[str]) -> None:
    """Keep the last model, not the best, if the user chose evaluations or checkpoints without which there is no best.

    Args:
        values (`dict[str, Any]`): all options by name; modified in place.
        given (`Collection[str]`): names of the options that the user has set.
    """
    chosen = {"eval_strategy", "save_strategy"} & set(given) and "load_best_model_at_end" not in given
    if chosen and not (values["eval_strategy"] == values["save_strategy"] == "epoch"):
        values["load_best_model_at_end"] = False


def set_early_stopping(values: dict[str, Any], given: Collection[str]) -> None:
    """Set what early stopping needs and the user has not set: evaluations, checkpoints as often, the best model.

    Args:
        values (`dict[str, Any]`): all options by name; modified in place.
        given (`Collection[str]`): names of the options that the user has set.

    Raises:
        ConfigurationError: the options contradict early stopping.
    """
    if values["early_stopping_patience"] is None:
        if "early_stopping_threshold" in given and values["early_stopping_threshold"]:
            raise ConfigurationError(
                "`--early_stopping_threshold` has no effect without `--early_stopping_patience`. Pass both."
            )
        return
    if values["eval_strategy"] == "no":
        if "eval_strategy" in given:
            raise ConfigurationError(
                "`--early_stopping_patience` needs evaluations during training, but `--eval_strategy no` was passed. "
                "Pass `--eval_strategy epoch` or `steps`."
            )
        values["eval_strategy"] = "epoch"
    if "load_best_model_at_end" not in given:
        values["load_best_model_at_end"] = True
    if values["metric_for_best_model"] is None:
        values["metric_for_best_model"] = "loss"
    # The best model can be kept only if each evaluation has a checkpoint.
    if values["load_best_model_at_end"] and not {"save_strategy", "save_steps"} & set(given):
        values["save_strategy"] = values["eval_strategy"]
        if values["eval_strategy"] == "steps":
            values["save_steps"] = values["eval_steps"] or values["logging_steps"]
    if values["load_best_model_at_end"] and values["save_strategy"] not in (values["eval_strategy"], "best"):
        raise ConfigurationError(
            f"`--early_stopping_patience` keeps the best model, so each evaluation needs a checkpoint, but "
            f"`--save_strategy {values['save_strategy']}` differs from `--eval_strategy {values['eval_strategy']}`. "
            "Pass the same for both, or `--load_best_model_at_end false`."
        )
    # Otherwise a resumed run would count its evaluations from zero.
    values["restore_callback_states_from_checkpoint"] = True
