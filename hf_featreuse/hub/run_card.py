"""Write the card and the plot of a trainer's run beside its model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.constants import is_offline_mode
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_featreuse.checkpoints import is_adapter
from hf_featreuse.errors import ConfigurationError
from hf_featreuse.hub.card import build_model_card, is_hub_id
from hf_featreuse.hub.sending import CARD_FILE
from hf_featreuse.sharding import unsharded_class

if TYPE_CHECKING:
    from hf_featreuse.trainer import FeatureReuseTrainer

logger = logging.get_logger(__name__)

# Name of the training plot beside the model.
PLOT_FILE = "training.png"
_LISTED_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "seed",
)  # fmt: skip
# Listed where they are in use.
_LISTED_IF_SET = ("label_smoothing_factor", "mixup_alpha", "cutmix_alpha", "ema_decay")
_LICENCE_TIMEOUT_SECONDS = 5.0
_IN_CARD = ("finetuned_from", "dataset", "license", "tags", "model_name")
# Further arguments of `Trainer.create_model_card`.
_WITHOUT_PLACE = ("language", "tasks", "dataset_tags", "dataset_args")


def card_arguments(details: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `card_details` that have a place in the card; raise `ConfigurationError` for what is no argument."""
    if unknown := sorted(set(details) - {*_IN_CARD, *_WITHOUT_PLACE}):
        raise ConfigurationError(
            f"`card_details` holds {unknown}, which the model card does not know. Pass some of {', '.join(_IN_CARD)}."
        )
    return {name: value for name, value in details.items() if name in _IN_CARD}


def write_run_card(
    trainer: FeatureReuseTrainer,
    folder: str | Path,
    *,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset: str | Sequence[str] | None = None,
) -> None:
    """Write the card of a run into a folder; see `FeatureReuseTrainer.create_model_card`."""
    args, folder = trainer.args, Path(folder)
    # Plain values for enums.
    values = args.to_dict()
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    adapter, base = None, finetuned_from
    if is_adapter(model):
        settings = model.active_peft_config
        adapter, base = str(getattr(settings.peft_type, "value", settings.peft_type)), settings.base_model_name_or_path
        model = model.get_base_model()
    is_pretrained = isinstance(model, PreTrainedModel)
    # The full id, where there is a repository: the snippet on the card loads from it.
    name = trainer.hub_model_id or model_name or trainer._target().repo_id
    steps = {"steps": trainer.state.global_step}
    if trainer.state.global_step < trainer.state.max_steps:
        steps["steps_planned"] = trainer.state.max_steps
    card = build_model_card(
        model_name=name,
        base_model=base,
        dataset_name=dataset if dataset is None or isinstance(dataset, str) else ", ".join(dataset),
        settings=trainer.reuse_args.settings(),
        metrics={key: value for key, value in _evaluation(trainer).items() if _is_metric(key, value)},
        license=license or (licence_of(base) if base and is_hub_id(base) else None),
        plot_file=PLOT_FILE if (folder / PLOT_FILE).is_file() else None,
        architecture=unsharded_class(model).__name__,
        block_names=[block.name for block in trainer.feature_reuse.blocks] if trainer.feature_reuse else [],
        training={name: values[name] for name in _LISTED_ARGUMENTS}
        | {name: values[name] for name in _LISTED_IF_SET if values.get(name)}
        | {"processes": args.world_size, "mixed_precision": args.mixed_precision, **steps},
        adapter=adapter,
        from_pretrained=is_pretrained,
    )
    of_model: Sequence[str] = (model.model_tags or ()) if is_pretrained else ()
    given = [tags] if isinstance(tags, str) else tags or ()
    card.data["tags"] = list(dict.fromkeys([*card.data["tags"], *of_model, *given]))
    card.save(folder / CARD_FILE)


def _evaluation(trainer: FeatureReuseTrainer) -> dict[str, Any]:
    """The last evaluation of the run; where training loaded its best model and none followed, that of this model."""
    state = trainer.state
    places = [at for at, entry in enumerate(state.log_history) if any(key.startswith("eval_") for key in entry)]
    if not places:
        return {}
    last = state.log_history[places[-1]]
    has_ended = any("train_runtime" in entry for entry in state.log_history[places[-1] :])
    if not has_ended or not trainer.args.load_best_model_at_end or state.best_model_checkpoint is None:
        return last
    at_best = [state.log_history[at] for at in places if state.log_history[at].get("step") == state.best_global_step]
    return (at_best or [last])[-1]


def _is_metric(key: str, value: object) -> bool:
    """Whether an entry of the log is a figure of an evaluation; a metric may also give lists or words."""
    return key.startswith("eval_") and isinstance(value, (int, float)) and not isinstance(value, bool)


def write_run_plot(trainer: FeatureReuseTrainer, folder: str | Path) -> None:
    """Write the training plot of a run into a folder; nothing where there is nothing to draw or no matplotlib."""
    from hf_featreuse.plotting import plot_training

    reuse = trainer.feature_reuse
    if reuse is None:  # Nothing was trained here; a plot of an earlier run stays.
        return
    names = [block.name for block in reuse.blocks]
    try:
        plot_training(trainer.state.log_history, reuse.schedule, Path(folder) / PLOT_FILE, block_names=names)
    except ConfigurationError as error:
        logger.info(f"No training plot was drawn. {error}")


@functools.lru_cache
def licence_of(model_id: str) -> str | None:
    """The licence of a model on the Hub; `None` where it states none, or cannot be asked."""
    if is_offline_mode():
        return None
    try:
        tags = HfApi().model_info(model_id, timeout=_LICENCE_TIMEOUT_SECONDS).tags or []
    except (httpx2.HTTPError, OSError, ValueError):
        return None
    return next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None)
