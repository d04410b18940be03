"""What the Hub would refuse in the metadata of a model card.

Written after the public specification: `modelcard.md` of github.com/huggingface/hub-docs.
"""

import math
import re
from typing import Any

import yaml

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def card_problems(text: str) -> list[str]:
    """What the Hub would refuse in a card's metadata, as its public specification has it."""
    block = re.match(r"---[\r\n]+(.*?)[\r\n]+---([\r\n]|$)", text, flags=re.DOTALL)
    data = yaml.safe_load(block.group(1)) if block else None
    if not isinstance(data, dict):
        return ["metadata is missing"]
    problems = [
        f'"{name}" must be an identifier'
        for name in ("license", "pipeline_tag", "library_name")
        if name in data and not re.fullmatch(r"[a-z0-9._-]+", str(data[name]))
    ]
    problems += [
        f'"{name}" must be an array of strings'
        for name in ("tags", "datasets", "metrics")
        if name in data and not (isinstance(data[name], list) and all(isinstance(x, str) and x for x in data[name]))
    ]
    ids = [data["base_model"]] if "base_model" in data else []
    ids += data.get("datasets") or []
    problems += [f"{value!r} is not a Hub id" for value in ids if not _ID.fullmatch(str(value))]
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model.get("results"):
            problems.append('"model-index" needs a name and results')
        if not all(map(_is_result, model.get("results") or [])):
            problems.append('a result of "model-index" lacks a task, a data set or a finite metric')
    return problems


def _is_result(result: dict[str, Any]) -> bool:
    metrics = result.get("metrics") or [{}]
    words = [result.get("task", {}).get("type"), *(result.get("dataset", {}).get(key) for key in ("type", "name"))]
    words += [metric.get("type") for metric in metrics]
    values = [metric.get("value") for metric in metrics]
    return all(isinstance(word, str) and word for word in words) and all(
        isinstance(value, (int, float)) and math.isfinite(value) for value in values
    )
