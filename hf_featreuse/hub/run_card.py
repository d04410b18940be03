"""Write the model card and the training plot of a run next to its model."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.constants import is_offline_mode
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_featreuse.checkpoints.weights import is_adapter
from hf_featreuse.errors import ConfigurationError
from hf_featreuse.hub.card import build_model_card, has_processor, is_hub_id
from hf_featreuse.hub.limits import limited_requests
from hf_featreuse.hub.sending import CARD_FILE
from hf_featreuse.method.fsdp import unsharded_class
from hf_featreuse.method.schedule import FeatureReuseSchedule

logger = logging.get_logger(__name__)

# Name of the training plot, next to the model.
PLOT_FILE = "training.png"
_LISTED_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "seed",
)  # fmt: skip
# Listed if they are in use.
_LISTED_IF_SET = ("label_smoothing_factor", "mixup_alpha", "cutmix_alpha", "ema_decay")
_LICENSE_TIMEOUT_SECONDS = 5.0
# A license identifier in the Hub's metadata.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9._-]*")
_IN_CARD = ("finetuned_from", "dataset", "license", "tags", "model_name")
# Further arguments of `Trainer.create_model_card`.
_WITHOUT_PLACE = ("language", "tasks", "dataset_tags", "dataset_args")


def card_arguments(details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `card_details` that the card shows; raise `ConfigurationError` for unknown ones."""
    if unknown := sorted(set(details) - {*_IN_CARD, *_WITHOUT_PLACE}):
        raise ConfigurationError(
            f"`card_details` holds {unknown}, which the model card does not know. Pass some of {', '.join(_IN_CARD)}."
        )
    return {name: value for name, value in details.items() if name in _IN_CARD}


@dataclass(frozen=True)
class RunSummary:
    """What the card and the plot of a run are made from.

    Args:
        name (`str`): name of the model, or the id of its repository if there is one; the card's snippet loads it.
        model (`torch.nn.Module`): the trained model, not wrapped; may be an adapter.
        settings (`dict`): options of feature reuse.
        schedule (`FeatureReuseSchedule`, *optional*): `None` if nothing was trained here.
        block_names (`list[str]`): of the residual blocks.
        arguments (`dict`): the training arguments, as plain values.
        processes (`int`): number of processes that trained together.
        steps (`int`): optimizer steps taken.
        max_steps (`int`): optimizer steps planned.
        log_history (`list[dict]`): from the Trainer's state.
        best_step (`int`, *optional*): step of the best model, if it was loaded at the end of training.
    """

    name: str
    model: nn.Module
    settings: Mapping[str, Any]
    schedule: FeatureReuseSchedule | None
    block_names: Sequence[str]
    arguments: Mapping[str, Any]
    processes: int
    steps: int
    max_steps: int
    log_history: Sequence[Mapping[str, Any]]
    best_step: int | None = None

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """The last evaluation; if training ended by loading its best model and none followed, that of this model."""
        places = [at for at, entry in enumerate(self.log_history) if any(key.startswith("eval_") for key in entry)]
        if not places:
            return {}
        last = self.log_history[places[-1]]
        has_ended = any("train_runtime" in entry for entry in self.log_history[places[-1] :])
        if not has_ended or self.best_step is None:
            return last
        at_best = [self.log_history[at] for at in places if self.log_history[at].get("step") == self.best_step]
        return (at_best or [last])[-1]


def write_run_card(
    run: RunSummary,
    folder: str | Path,
    *,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    finetuned_from: str | None = None,
    dataset: str | Sequence[str] | None = None,
) -> None:
    """Write the card of a run into a folder; see `FeatureReuseTrainer.create_model_card`."""
    folder, model, values = Path(folder), run.model, run.arguments
    adapter, base = None, finetuned_from or getattr(model, "name_or_path", None) or None
    if is_adapter(model):
        of_adapter: Any = model
        settings = of_adapter.active_peft_config
        adapter, base = str(getattr(settings.peft_type, "value", settings.peft_type)), settings.base_model_name_or_path
        model = of_adapter.get_base_model()
    steps = {"steps": run.steps}
    if run.steps < run.max_steps:
        steps["steps_planned"] = run.max_steps
    card = build_model_card(
        model_name=run.name,
        base_model=base,
        dataset_name=dataset if dataset is None or isinstance(dataset, str) else ", ".join(dataset),
        settings=run.settings,
        metrics={key: value for key, value in run.evaluation.items() if _is_metric(key, value)},
        license=license or (license_of(base) if base and is_hub_id(base) else None),
        plot_file=PLOT_FILE if (folder / PLOT_FILE).is_file() else None,
        architecture=unsharded_class(model).__name__,
        block_names=run.block_names,
        training={name: values[name] for name in _LISTED_ARGUMENTS}
        | {name: values[name] for name in _LISTED_IF_SET if values.get(name)}
        | {"processes": run.processes, "mixed_precision": values["mixed_precision"], **steps},
        adapter=adapter,
        from_pretrained=isinstance(model, PreTrainedModel),
        has_processor=has_processor(folder),
    )
    of_model: Sequence[str] = (model.model_tags or ()) if isinstance(model, PreTrainedModel) else ()
    given = [tags] if isinstance(tags, str) else tags or ()
    card.data["tags"] = list(dict.fromkeys([*card.data["tags"], *of_model, *given]))
    card.save(folder / CARD_FILE)


def _is_metric(key: str, value: object) -> bool:
    """Return whether a log entry is a number of an evaluation; metrics may also return lists or words."""
    return key.startswith("eval_") and isinstance(value, (int, float)) and not isinstance(value, bool)


def write_run_plot(run: RunSummary, folder: str | Path) -> None:
    """Write the training plot of a run into a folder, unless there is nothing to draw or no matplotlib."""
    from hf_featreuse.plotting import plot_training

    if run.schedule is None:  # Nothing was trained here; a plot of an earlier run stays.
        return
    try:
        plot_training(run.log_history, run.schedule, Path(folder) / PLOT_FILE, block_names=run.block_names)
    except ConfigurationError as error:
        logger.info(f"No training plot was drawn. {error}")


def write_base_config(model: nn.Module, folder: str | Path) -> None:
    """Write the configuration of an adapter's base model into a folder: the adapter's own files hold no labels."""
    base: Any = model.get_base_model() if is_adapter(model) else None  # pyright: ignore[reportCallIssue]
    if isinstance(base, PreTrainedModel):
        base.config.save_pretrained(folder)


@functools.lru_cache
def license_of(model_id: str) -> str | None:
    """Return the license of a model on the Hub; `None` if it states none or the Hub cannot be reached."""
    if is_offline_mode():
        return None
    try:
        with limited_requests():
            tags = HfApi().model_info(model_id, timeout=_LICENSE_TIMEOUT_SECONDS).tags or []
    except Exception:  # The connection fails, or the client cannot read the answer.
        return None
    found = (tag.removeprefix("license:") for tag in tags if isinstance(tag, str) and tag.startswith("license:"))
    return next((license for license in found if _LICENSE.fullmatch(license)), None)
