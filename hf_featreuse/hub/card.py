"""Write the model card: what was trained, from which weights, on which data, how, and with which result.

Only what the caller states is printed. Paths of the model, its base and its data are not: they mean nothing to a
reader and reveal details of the machine. Nothing here uses the network.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from numbers import Real
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.hub.card_text import MEANINGS, SNIPPETS, TEMPLATE, method_tags, method_text
from hf_featreuse.hub.markdown import markdown_code, markdown_text, python_string
from hf_featreuse.text import flat

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PACKAGES = ("transformers", "torch", "datasets", "huggingface_hub")
# Entries of Trainer's metrics that are not results.
_NOT_RESULTS = re.compile(r"epoch|step|num_input_tokens_seen|.*(runtime|_per_second|preparation_time|_flos|_samples)")
_METRIC_NAMES = {"accuracy": "Accuracy (top-1)", "top5_accuracy": "Accuracy (top-5)", "loss": "Loss"}


def build_model_card(
    *,
    model_name: str,
    base_model: str | None = None,
    dataset_name: str | None = None,
    dataset_split: str | None = None,
    settings: Mapping[str, Any] | None,
    metrics: Mapping[str, float],
    license: str | None = None,
    plot_file: str | Path | None = None,
    architecture: str,
    block_names: Sequence[str],
    training: Mapping[str, object],
    adapter: str | None = None,
    from_pretrained: bool = True,
    has_processor: bool = True,
) -> ModelCard:
    """Build the model card of a trained image classifier, with metadata that the Hub reads.

    The `model-index` of the metadata, which feeds the Hub's result tables, is written only for a data set with a name;
    results on a local folder are only listed in a table.

    Args:
        model_name (`str`): name or Hub id of the model, such as `"ada/vit-digits"`; of a path, the last part is used.
        base_model (`str`, *optional*): Hub id of the weights it was fine-tuned from; `None` for training from scratch.
        dataset_name (`str`, *optional*): Hub id or plain name of the data set. A folder on this machine becomes "a
            local data set"; only an id with a namespace is linked.
        dataset_split (`str`, *optional*): the split that `metrics` were measured on.
        settings (`Mapping[str, Any]`, *optional*): options of the method, such as `{"drop_rate": 0.5}`. With
            `stochastic_depth_steps` and `masked_freeze_steps` both 0 the card says that training was plain; with
            `None`, that how the model was trained was not recorded.
        metrics (`Mapping[str, float]`): as `Trainer.evaluate` returns them; accuracies from 0 to 1. An `eval_` or
            `test_` prefix is dropped, timings are left out.
        license (`str`, *optional*): Hub identifier of the license, such as `"apache-2.0"`.
        plot_file (`str` or `Path`, *optional*): the training plot, relative to the repository; of an absolute path,
            the name is used.
        architecture (`str`): class of the model, such as `"ViTForImageClassification"`.
        block_names (`Sequence[str]`): the residual blocks that took part, in forward order.
        training (`Mapping[str, object]`): training hyperparameters to list.
        adapter (`str`, *optional*): type of the PEFT adapter, such as `"LORA"`, if the weights are an adapter's.
        from_pretrained (`bool`, defaults to `True`): whether transformers loads the model, or the adapter's base; for
            other modules the card shows how to load the weights.
        has_processor (`bool`, defaults to `True`): whether an image processor is saved with the model. `pipeline`
            needs it, so without one the card shows how to load only the model.

    Names and values are escaped: Markdown, HTML and line breaks in them appear as plain text.

    Returns:
        `ModelCard`: its text is `str(card)`; `card.save("README.md")` writes it.

    Raises:
        ConfigurationError: the model has no name, or a metric is not a number.

    Example:
        >>> from hf_featreuse.hub import build_model_card
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
    name = flat(PurePath(model_name.replace("\\", "/")).name if _is_path(model_name) else model_name)
    if not name:
        raise ConfigurationError(f"`model_name={model_name!r}` does not name a model. Pass a name or Hub id.")
    base_id = base_model if base_model and is_hub_id(base_model) else None
    dataset = flat(dataset_name) if dataset_name and not _is_local(dataset_name) else None
    results = _results(metrics)
    eval_results = _eval_results(results, dataset, dataset_split)
    data = ModelCardData(
        base_model=base_id,
        datasets=[dataset] if dataset and _is_hub_dataset(dataset) else None,
        eval_results=eval_results,
        library_name="peft" if adapter else "transformers" if from_pretrained else None,
        license=flat(license) if license else None,
        metrics=["accuracy"] if "accuracy" in results else None,
        model_name=name.split("/")[-1] if eval_results else None,
        pipeline_tag="image-classification",
        tags=[*method_tags(settings), *_adapter_tags(adapter, base_id, from_pretrained)],
    )
    snippet, note = SNIPPETS[adapter is not None, from_pretrained, has_processor]
    snippet = snippet.format(
        name=python_string(name),
        base=python_string(base_id or "the base model's folder"),
        # This becomes code, unlike everything else here.
        architecture=architecture if architecture.isidentifier() else "Model",
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=markdown_text(name.split("/")[-1]),
        summary=_summary(architecture, adapter, _origin(base_model, base_id), dataset_name, settings is not None),
        snippet=snippet,
        snippet_note=note,
        results=[(_METRIC_NAMES.get(key) or markdown_text(key), _metric_text(key, v)) for key, v in results.items()],
        results_intro=_results_intro(dataset_name, dataset_split),
        plot=_plot_link(plot_file),
        method=method_text(settings, len(block_names)),
        settings=[
            (markdown_code(key, in_table=True), _cell(value), MEANINGS.get(key, ""))
            for key, value in (settings or {}).items()
        ],
        block_names=list(block_names),
        block_list=", ".join(map(markdown_code, block_names)),
        training=[(markdown_code(key, in_table=True), _cell(value)) for key, value in training.items()],
        versions=_versions(adapter) if settings is not None else [],
        package_version=_own_version(),
    )


def has_processor(folder: Path) -> bool:
    """Return whether a folder holds an image processor."""
    return any((folder / name).is_file() for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME))


def is_hub_id(name: str) -> bool:
    """Return whether a name is a Hub id, not a path or an existing folder of the same name."""
    return not _is_local(name) and _HUB_ID.fullmatch(name) is not None


def _is_path(name: str) -> bool:
    """Return whether a name is written as a path on this machine, not as an id or a plain name."""
    starts = ("/", "./", "../", "~", ".\\", "..\\")
    return name in (".", "..") or name.startswith(starts) or name.count("/") > 1 or "\\" in name


def _is_local(name: str) -> bool:
    """Return whether a name is on this machine; a folder comes before a Hub id of that name, as in `load_dataset`."""
    return _is_path(name) or Path(name).exists()


def _is_hub_dataset(name: str) -> bool:
    """Return whether to link a data set; a name without a namespace may be a data set from elsewhere."""
    return "/" in name and _HUB_ID.fullmatch(name) is not None


def _dataset_text(dataset: str | None) -> str:
    """Name the data set, with a link if it is on the Hub."""
    if not dataset:
        return "data that is not named here"
    if _is_local(dataset):
        return "a local data set"
    return (
        f"[{dataset}](https://huggingface.co/datasets/{dataset})"
        if _is_hub_dataset(dataset)
        else markdown_text(dataset)
    )


def _origin(base_model: str | None, base_id: str | None) -> str:
    """Describe what training started from."""
    if base_id is not None:
        return f"fine-tuned from [{base_id}](https://huggingface.co/{base_id})"
    return "fine-tuned from local weights" if base_model else "trained from scratch"


def _summary(architecture: str, adapter: str | None, origin: str, dataset: str | None, recorded: bool) -> str:
    """Describe what was trained, from which weights and on which data; or, if not recorded, only what the model is."""
    what = f"{markdown_text(adapter)} adapter for an image classifier" if adapter else "image classifier"
    kind = markdown_code(architecture)
    article = "An" if what[0] in "aeiouAEIOU" else "A"
    if not recorded:
        return f"{article} {what} ({kind})."
    return f"{article} {what} ({kind}), {origin} on {_dataset_text(dataset)} with `hf_featreuse`."


def _adapter_tags(adapter: str | None, base_id: str | None, from_pretrained: bool) -> list[str]:
    """Return the tags that PEFT gives an adapter."""
    if adapter is None:
        return []
    tags = [flat(adapter).lower(), *(["transformers"] if from_pretrained else [])]
    return [*tags, *([f"base_model:adapter:{base_id}"] if base_id else [])]


def _results(metrics: Mapping[str, float]) -> dict[str, float]:
    """Select the results among Trainer's metrics, and remove their prefix."""
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
    """Return the entries of the model-index; `None` without a named data set."""
    if dataset is None:
        return None
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            # The Hub requires an identifier, so the name of a data set from elsewhere is made into one.
            dataset_type=re.sub(r"[^\w./-]+", "-", dataset),
            dataset_name=dataset,
            dataset_split=flat(split) if split else None,
            metric_type=flat(key),
            metric_name=_METRIC_NAMES.get(key, flat(key)),
            metric_value=value,
        )
        for key, value in results.items()
        if math.isfinite(value)
    ] or None


def _results_intro(dataset: str | None, split: str | None) -> str:
    """Describe what the results were measured on."""
    where = f"the {markdown_code(split)} split of {_dataset_text(dataset)}" if split else _dataset_text(dataset)
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
    return markdown_text(f"{value:g}" if isinstance(value, float) else value)


def _own_version() -> str:
    from hf_featreuse import __version__

    return __version__


def _versions(adapter: str | None) -> list[tuple[str, str]]:
    """List the versions that the model was trained with."""
    return [
        ("hf_featreuse", _own_version()),
        *((package, version(package)) for package in (*_PACKAGES, *(["peft"] if adapter else []))),
        ("Python", platform.python_version()),
    ]
