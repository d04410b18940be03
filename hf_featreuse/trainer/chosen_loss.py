"""Choose the loss of a run from its options, and check that it fits the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.recipe.losses import DEFAULT_GAMMA, ImageLoss
from hf_featreuse.trainer.class_weights import BALANCED, class_weights, labels_of
from hf_featreuse.trainer.recipe_arguments import RecipeArguments

_SEVERAL, _REGRESSION = "multi_label_classification", "regression"
# The task of a model without a config.
_UNKNOWN = "unknown"


def chosen_loss(
    options: RecipeArguments,
    model: nn.Module | None,
    *,
    own: Callable | None = None,
    label_smoothing: float = 0.0,
    train_dataset: Any = None,
) -> Callable[[], ImageLoss] | None:
    """Choose the loss of a run; `None` if the options leave it to the model and Trainer.

    Args:
        options (`RecipeArguments`): of the run.
        model (`torch.nn.Module`, *optional*): the model that trains.
        own (`Callable`, *optional*): your own loss function.
        label_smoothing (`float`, defaults to 0.0): as in `TrainingArguments`.
        train_dataset (`Any`, *optional*): whose labels `class_weights="balanced"` counts when the loss is first used.

    Returns:
        `Callable`: returns the loss.

    Raises:
        ConfigurationError: the options do not fit the model or each other.
    """
    if options.loss is None and options.class_weights is None:
        return None
    problem, names = _problem(model), _label_names(model)
    several = problem == _SEVERAL
    kind = options.loss or ("bce" if several else "cross_entropy")
    _check(kind, problem, own, label_smoothing, options.class_weights is not None)
    gamma = DEFAULT_GAMMA if options.focal_gamma is None else options.focal_gamma

    @functools.cache
    def loss() -> ImageLoss:
        def counted() -> Any:
            return labels_of(train_dataset)

        weights = class_weights(options.class_weights, names, counted, several=several)
        return ImageLoss(kind, weights, gamma, label_smoothing)  # pyright: ignore[reportArgumentType]

    if options.class_weights != BALANCED:
        loss()  # Errors come before training.
    return loss


def _check(kind: str, problem: str | None, own: Callable | None, label_smoothing: float, weighted: bool) -> None:
    if own is not None:
        raise ConfigurationError(
            "`compute_loss_func` was passed together with `loss` or `class_weights`, which choose another loss. Pass "
            "only one of them."
        )
    named = f"this model has `problem_type={problem!r}`"
    if (kind == "mse") != (problem == _REGRESSION) and problem != _UNKNOWN:
        fix = '"cross_entropy", "bce" or "focal"' if kind == "mse" else '"mse", without `class_weights`'
        raise ConfigurationError(
            f'`loss="{kind}"` is for {"regression" if kind == "mse" else "classes"}, but {named}. Pass {fix}.'
        )
    if kind == "cross_entropy" and problem == _SEVERAL:
        raise ConfigurationError(
            f'`loss="cross_entropy"` is for one label per image, but {named}. Pass "bce" or "focal".'
        )
    if label_smoothing and (kind == "mse" or problem == _SEVERAL):
        raise ConfigurationError(
            f"`label_smoothing_factor={label_smoothing}` spreads the one label of an image over all classes, but "
            f"{named}. Set it to 0."
        )
    if weighted and problem == _REGRESSION:
        raise ConfigurationError(f"`class_weights` weighs classes, but {named}. Leave it unset.")


def _problem(model: nn.Module | None) -> str | None:
    """Return the problem type of a model; one output means regression, as in transformers."""
    config = getattr(model, "config", None)
    if config is None:
        return _UNKNOWN
    return config.problem_type or (_REGRESSION if config.num_labels == 1 else None)


def _label_names(model: nn.Module | None) -> list[str] | None:
    config = getattr(model, "config", None)
    return None if config is None else [str(config.id2label[index]) for index in sorted(config.id2label)]
