"""Write the card of a trained model: what was trained, from what, on what, how, and with which result.

Only what the caller states is printed. Paths of the model, its base and its data are not: they mean nothing to a
reader, and tell about the machine. Nothing here touches the network.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from numbers import Real
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_featreuse.errors import ConfigurationError

if TYPE_CHECKING:
    from hf_featreuse.trainer import FeatureReuseTrainer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PACKAGES = ("transformers", "torch", "datasets", "huggingface_hub")
# Entries of Trainer's metrics that are no result.
_NOT_RESULTS = re.compile(r"epoch|step|num_input_tokens_seen|.*(runtime|_per_second|preparation_time|_flos|_samples)")
_METRIC_NAMES = {"accuracy": "Accuracy (top-1)", "top5_accuracy": "Accuracy (top-5)", "loss": "Loss"}
_MEANINGS = {
    "drop_rate": "probability of dropping a block in a cycle; the last block's where the schedule is linear",
    "drop_rate_schedule": "linear: rising with depth up to `drop_rate`; uniform: the same for all blocks",
    "drop_granularity": "batch: all samples of a step share one drawn set of blocks; sample: each has its own",
    "stochastic_depth_steps": "steps of a cycle in which the drawn blocks are left out",
    "masked_freeze_steps": "steps of a cycle in which only the drawn blocks train",
    "scale_kept": "whether a kept block's increment is divided by its survival probability",
    "train_trunk": "whether the layers outside the blocks train in masked-freeze steps too",
    "frozen_batch_norm": "statistics that frozen BatchNorm layers use in masked-freeze steps",
    "allow_inexact_skip": "whether blocks are dropped too whose shortcut is no identity",
    "target_blocks": "which residual blocks take part; none given: all",
    "reuse_start": "fraction of training before which steps are plain",
    "reuse_end": "fraction of training after which steps are plain",
    "reuse_seed": "seed of the random sets of blocks; none given: the training seed",
}

# Name of the training plot beside the model.
PLOT_FILE = "training.png"
_LISTED_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "seed",
)  # fmt: skip

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## Use

```python
from transformers import pipeline

{{ snippet_comment }}
classifier = pipeline("image-classification", model={{ snippet_model }})
print(classifier("image.png"))
```

It is a plain transformers model; the package it was trained with is not needed to run it.

## Results
{% if results %}
{{ results_intro }}

| metric | value |
|---|---|
{% for name, value in results -%}
| {{ name }} | {{ value }} |
{% endfor %}
{%- else %}
No evaluation was recorded.
{% endif %}
{%- if plot %}
![Losses of each kind of step, evaluation accuracy and dropped blocks over the optimizer steps]({{ plot }})
{% endif %}
## Method

{{ method }}
{% if settings %}
| setting | value | meaning |
|---|---|---|
{% for name, value, meaning in settings -%}
| `{{ name }}` | {{ value }} | {{ meaning }} |
{% endfor %}
{%- endif %}
{%- if block_names %}
<details><summary>The {{ block_names|length }} residual blocks, in forward order</summary>

{{ block_list }}

</details>
{% endif %}
## Training
{% if training %}
| hyperparameter | value |
|---|---|
{% for name, value in training -%}
| `{{ name }}` | {{ value }} |
{% endfor %}
{%- else %}
No hyperparameters were recorded.
{% endif %}
## Versions
{% for name, value in versions %}
- {{ name }} {{ value }}
{%- endfor %}

## Citation

```bibtex
@misc{park2024residualdroppath,
  title         = {ResidualDroppath: Enhancing Feature Reuse over Residual Connections},
  author        = {Sejik Park},
  year          = {2024},
  eprint        = {2411.09475},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2411.09475}
}
```
"""


def build_model_card(
    *,
    model_name: str,
    base_model: str | None = None,
    dataset_name: str | None = None,
    dataset_split: str | None = None,
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
    license: str | None = None,
    plot_file: str | Path | None = None,
    architecture: str,
    block_names: Sequence[str],
    training: Mapping[str, object],
) -> ModelCard:
    """Build the model card of a trained image classifier, with metadata that the Hub reads.

    The `model-index` of the metadata, which feeds the Hub's result tables, is written only for a data set with a name:
    results on a folder of the user's are a table alone.

    Args:
        model_name (`str`): name or Hub id of the model, such as `"ada/vit-digits"`; of a path, the last part.
        base_model (`str`, *optional*): Hub id of the weights it was fine-tuned from; `None` for training from scratch.
        dataset_name (`str`, *optional*): Hub id or plain name of the data set. `None` and folders on this machine
            become "a local data set"; only an id with a namespace is linked.
        dataset_split (`str`, *optional*): the split that `metrics` were measured on.
        settings (`Mapping[str, Any]`): options of the method, such as `{"drop_rate": 0.5}`. With
            `stochastic_depth_steps` and `masked_freeze_steps` both 0 the card says that training was plain.
        metrics (`Mapping[str, float]`): as `Trainer.evaluate` returns them; accuracies from 0 to 1. An `eval_` or
            `test_` prefix is dropped, timings are left out.
        license (`str`, *optional*): Hub identifier of the licence, such as `"apache-2.0"`.
        plot_file (`str` or `Path`, *optional*): the training plot, relative to the repository; of an absolute path,
            its name.
        architecture (`str`): class of the model, such as `"ViTForImageClassification"`.
        block_names (`Sequence[str]`): the residual blocks that took part, in forward order.
        training (`Mapping[str, object]`): training hyperparameters to list.

    Returns:
        `ModelCard`: its text is `str(card)`; `card.save("README.md")` writes it.

    Raises:
        ConfigurationError: the model has no name, or a metric is not a number.

    Example:
        >>> from hf_featreuse.model_card import build_model_card
        >>> card = build_model_card(
        ...     model_name="ada/vit-digits",
        ...     settings={"drop_rate": 0.5},
        ...     metrics={"eval_accuracy": 0.97},
        ...     architecture="ViTForImageClassification",
        ...     block_names=["vit.layers.0", "vit.layers.1"],
        ...     training={"learning_rate": 1e-3},
        ... )
        >>> card.data.pipeline_tag, "from scratch" in card.text
        ('image-classification', True)
    """
    name = PurePath(model_name.replace("\\", "/")).name if _is_path(model_name) else model_name.strip()
    if not name:
        raise ConfigurationError(f"`model_name={model_name!r}` names no model. Pass a name or Hub id.")
    base_id = base_model if base_model and not _is_local(base_model) and _HUB_ID.fullmatch(base_model) else None
    dataset = dataset_name if dataset_name and not _is_local(dataset_name) else None
    results = _results(metrics)
    eval_results = _eval_results(results, dataset, dataset_split)
    data = ModelCardData(
        base_model=base_id,
        datasets=[dataset] if dataset and _is_hub_dataset(dataset) else None,
        eval_results=eval_results,
        library_name="transformers",
        license=license,
        metrics=["accuracy"] if "accuracy" in results else None,
        model_name=name.split("/")[-1] if eval_results else None,
        pipeline_tag="image-classification",
        tags=_tags(settings),
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=name.split("/")[-1],
        summary=_summary(architecture, base_model, base_id, dataset),
        snippet_comment="# This repository's id on the Hub, or a folder with its files.",
        snippet_model=f'"{name}"',
        results=[(_METRIC_NAMES.get(key, _cell(key)), _metric_text(key, value)) for key, value in results.items()],
        results_intro=_results_intro(dataset, dataset_split),
        plot=_plot_link(plot_file),
        method=_method(settings, len(block_names)),
        settings=[(key, _cell(value), _MEANINGS.get(key, "")) for key, value in settings.items()],
        block_names=list(block_names),
        block_list=", ".join(f"`{block}`" for block in block_names),
        training=[(key, _cell(value)) for key, value in training.items()],
        versions=_versions(),
    )


def write_model_card(
    trainer: FeatureReuseTrainer,
    *,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset: str | Sequence[str] | None = None,
) -> None:
    """Write the card of a trainer's run beside its model; see `FeatureReuseTrainer.create_model_card`."""
    args, folder = trainer.args, Path(str(trainer.args.output_dir))
    # Plain values for enums.
    values = args.to_dict()
    evaluations = [entry for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)]
    card = build_model_card(
        model_name=model_name or args.hub_model_id or folder.resolve().name,
        base_model=finetuned_from,
        dataset_name=dataset if dataset is None or isinstance(dataset, str) else ", ".join(dataset),
        settings=trainer.reuse_args.settings(),
        metrics={key: value for key, value in (evaluations or [{}])[-1].items() if key.startswith("eval_")},
        license=license,
        plot_file=PLOT_FILE if (folder / PLOT_FILE).is_file() else None,
        architecture=type(trainer.accelerator.unwrap_model(trainer.model)).__name__,
        block_names=[block.name for block in trainer.feature_reuse.blocks] if trainer.feature_reuse else [],
        training={name: values[name] for name in _LISTED_ARGUMENTS}
        | {"processes": args.world_size, "mixed_precision": args.mixed_precision, "steps": trainer.state.global_step},
    )
    own: list[str] = card.data["tags"]
    card.data["tags"] = own + [tag for tag in ([tags] if isinstance(tags, str) else tags or ()) if tag not in own]
    card.save(folder / "README.md")


def _is_path(name: str) -> bool:
    """Tell what is written as a path on this machine from an id or a plain name."""
    starts = ("/", "./", "../", "~", ".\\", "..\\")
    return name in (".", "..") or name.startswith(starts) or name.count("/") > 1 or "\\" in name


def _is_local(name: str) -> bool:
    """Tell what is on this machine; a folder comes before a Hub id of the same name, as in `load_dataset`."""
    return _is_path(name) or Path(name).exists()


def _is_hub_dataset(name: str) -> bool:
    """A plain name without a namespace may be a data set from elsewhere, so it is not linked."""
    return "/" in name and _HUB_ID.fullmatch(name) is not None


def _dataset_text(dataset: str | None) -> str:
    """Name the data set, linked where it is on the Hub."""
    if dataset is None:
        return "a local data set"
    return f"[{dataset}](https://huggingface.co/datasets/{dataset})" if _is_hub_dataset(dataset) else dataset


def _summary(architecture: str, base_model: str | None, base_id: str | None, dataset: str | None) -> str:
    """Say what was trained, from what and on what."""
    if base_id is not None:
        origin = f"fine-tuned from [{base_id}](https://huggingface.co/{base_id})"
    else:
        origin = "fine-tuned from local weights" if base_model else "trained from scratch"
    return f"An image classifier (`{architecture}`), {origin} on {_dataset_text(dataset)} with `hf_featreuse`."


def _steps(settings: Mapping[str, Any]) -> tuple[bool, bool]:
    """Tell which kinds of step took place; by default both."""
    return bool(settings.get("stochastic_depth_steps", 1)), bool(settings.get("masked_freeze_steps", 1))


def _tags(settings: Mapping[str, Any]) -> list[str]:
    """Tag the methods that were used."""
    depth, freeze = _steps(settings)
    tags = {"feature-reuse": depth and freeze, "stochastic-depth": depth}
    return ["hf_featreuse", *(tag for tag, used in tags.items() if used), "image-classification"]


def _method(settings: Mapping[str, Any], num_blocks: int) -> str:
    """Explain the kinds of step that took place."""
    depth, freeze = _steps(settings)
    if not depth and not freeze:
        return "Both kinds of step of hf_featreuse were switched off: this model was trained in the usual way."
    blocks = f"a random set of the {num_blocks} residual blocks" if num_blocks else "a random set of residual blocks"
    outside = " and the layers outside the residual blocks" if settings.get("train_trunk") else ""
    if depth and freeze:
        kinds = (
            f"Training repeats a cycle of two kinds of step. In a *stochastic-depth* step {blocks} is dropped: left "
            "out and not computed. In a *masked-freeze* step, which follows, the whole network runs, but only the "
            f"blocks of that set{outside} are trained. A cycle whose set is empty trains in the usual way. "
            "The two kinds of step follow the abstract of [ResidualDroppath](https://arxiv.org/abs/2411.09475); the "
            "settings are of this run, not the paper's."
        )
    elif depth:
        kinds = f"In each *stochastic-depth* step {blocks} is dropped: left out and not computed."
    else:
        kinds = f"In each *masked-freeze* step the whole network runs, but only {blocks}{outside} are trained."
    if settings.get("drop_granularity") == "sample":
        kinds += " Each sample of a batch has a set of its own, and is computed and trains what its set says."
    return f"{kinds} Evaluation and prediction use the whole network."


def _results(metrics: Mapping[str, float]) -> dict[str, float]:
    """Keep the results among Trainer's metrics, without their prefix."""
    results: dict[str, float] = {}
    for key, value in metrics.items():
        name = re.sub(r"^(eval|test)_", "", key)
        if _NOT_RESULTS.fullmatch(name):
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ConfigurationError(f"`metrics` has {key}={value!r}, which is not a number. Pass numbers only.")
        results[name] = float(value)
    return results


def _eval_results(results: Mapping[str, float], dataset: str | None, split: str | None) -> list[EvalResult] | None:
    """Make the entries of the model-index; none without a named data set."""
    if dataset is None:
        return None
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=key,
            metric_name=_METRIC_NAMES.get(key, key),
            metric_value=value,
        )
        for key, value in results.items()
        if math.isfinite(value)
    ] or None


def _results_intro(dataset: str | None, split: str | None) -> str:
    """Say what the results were measured on."""
    where = f"the `{split}` split of {_dataset_text(dataset)}" if split else _dataset_text(dataset)
    return f"Measured with the whole network on {where}."


def _metric_text(key: str, value: float) -> str:
    """Show accuracies as percentages."""
    return f"{100 * value:.2f} %" if key.endswith("accuracy") and 0 <= value <= 1 else f"{value:.4g}"


def _plot_link(plot_file: str | Path | None) -> str | None:
    """Link the plot relative to the repository."""
    if plot_file is None:
        return None
    path = Path(plot_file)
    return quote(path.name if path.is_absolute() else path.as_posix())


def _cell(value: object) -> str:
    """Show a value in a cell of a table."""
    if value is None:
        return "none given"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _versions() -> list[tuple[str, str]]:
    """List what the model was trained with."""
    from hf_featreuse import __version__

    return [
        ("hf_featreuse", __version__),
        *((package, version(package)) for package in _PACKAGES),
        ("Python", platform.python_version()),
    ]
