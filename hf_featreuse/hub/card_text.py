"""The text of a model card: its template, the meaning of the settings, and sentences that explain the method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hf_featreuse.method.schedule import trunk_option

MEANINGS = {
    "drop_rate": "probability of dropping a block in a cycle; of the last block if the schedule is linear; 0: plain",
    "drop_rate_schedule": "linear: rising with depth up to `drop_rate`; uniform: the same for all blocks",
    "drop_rate_over_time": "from `reuse_start` to `reuse_end`: constant, falling to 0, or rising from 0",
    "drop_granularity": "batch: one drawn set of blocks per step; sample: one per sample",
    "vanilla_steps": "plain steps at the start of each cycle",
    "stochastic_depth_steps": "steps of a cycle in which the drawn blocks are skipped",
    "masked_freeze_steps": "steps of a cycle in which, of all blocks, only the drawn ones train",
    "scale_kept": "whether stochastic-depth steps divide what a kept block adds by the probability that it is kept",
    "train_trunk": "what outside the blocks trains in masked-freeze steps: all, the head after them, or none",
    "frozen_batch_norm": "statistics that frozen BatchNorm layers use in masked-freeze steps",
    "allow_inexact_skip": "whether blocks whose shortcut is not an identity are dropped too",
    "target_blocks": "which residual blocks take part; if none are given, all",
    "reuse_start": "fraction of training before which steps are plain",
    "reuse_end": "fraction of training after which steps are plain",
    "unfreeze_at": "fraction of training by which all blocks train; if none is given, all train from the start",
    "reuse_seed": "seed of the random sets of blocks; if none is given, the training seed",
}

# The line `repository = ...` is replaced when the folder is pushed to another repository.
_SNIPPET = """from PIL import Image
from transformers import pipeline

repository = {name}
classifier = pipeline("image-classification", model=repository)
image = Image.new("RGB", (64, 64))  # or your own: Image.open("photo.jpg").convert("RGB")
print(classifier(image))"""

_MODEL_SNIPPET = """from transformers import AutoModelForImageClassification

repository = {name}
model = AutoModelForImageClassification.from_pretrained(repository)"""

# An adapter's repository holds a config.json with the labels, and only the weights of the adapter and the new head.
_ADAPTER_SNIPPET = """import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

repository = {name}
config = AutoConfig.from_pretrained(repository)
model = AutoModelForImageClassification.from_pretrained({base}, config=config, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(model, repository).eval()
image = Image.new("RGB", (64, 64))  # or your own: Image.open("photo.jpg").convert("RGB")
inputs = AutoImageProcessor.from_pretrained(repository)(image, return_tensors="pt")
with torch.no_grad():
    print(config.id2label[model(**inputs).logits.argmax(-1).item()])"""

_ADAPTED_MODEL_SNIPPET = """from peft import PeftModel
from transformers import AutoConfig, AutoModelForImageClassification

repository = {name}
config = AutoConfig.from_pretrained(repository)
model = AutoModelForImageClassification.from_pretrained({base}, config=config, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(model, repository).eval()"""

# For a module that transformers does not know, the user provides the code.
_MODULE_SNIPPET = """from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

repository = {name}
model = {architecture}()  # created by its own code, as for training
model.load_state_dict(load_file(hf_hub_download(repository, "model.safetensors")))
model.eval()"""

_MODULE_ADAPTER_SNIPPET = """from peft import PeftModel

repository = {name}
model = {architecture}()  # created by its own code, as for training and with the same initial weights
model = PeftModel.from_pretrained(model, repository).eval()"""

_WHERE = "`repository` is an id on the Hub, or a folder with its files."
_NO_PACKAGE = "The package it was trained with is not needed to run it."
_UNPREPARED = "There is no image processor: prepare images as for training."
# Snippet and a note on it, by whether the weights are an adapter's, whether transformers loads the model, and whether
# there is an image processor.
SNIPPETS = {
    (False, True, True): (_SNIPPET, f"{_WHERE} It is a plain transformers model. {_NO_PACKAGE}"),
    (False, True, False): (_MODEL_SNIPPET, f"{_WHERE} It is a plain transformers model. {_UNPREPARED} {_NO_PACKAGE}"),
    (True, True, True): (
        _ADAPTER_SNIPPET,
        f"{_WHERE} The base model's weights and PEFT are needed, too. {_NO_PACKAGE}",
    ),
    (True, True, False): (
        _ADAPTED_MODEL_SNIPPET,
        f"{_WHERE} The base model's weights and PEFT are needed, too. {_UNPREPARED} {_NO_PACKAGE}",
    ),
    **{
        (False, False, either): (_MODULE_SNIPPET, f"`repository` is an id on the Hub. {_NO_PACKAGE}")
        for either in (True, False)
    },
    **{
        (True, False, either): (_MODULE_ADAPTER_SNIPPET, f"{_WHERE} PEFT is needed, too. {_NO_PACKAGE}")
        for either in (True, False)
    },
}

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## Use

```python
{{ snippet }}
```

{{ snippet_note }}

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
| {{ name }} | {{ value }} | {{ meaning }} |
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
| {{ name }} | {{ value }} |
{% endfor %}
{%- else %}
No hyperparameters were recorded.
{% endif %}
{%- if versions %}
## Versions
{% for name, value in versions %}
- {{ name }} {{ value }}
{%- endfor %}
{% endif %}
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

@software{hf_featreuse,
  title   = {hf_featreuse: feature reuse over residual connections for Hugging Face Trainer},
  version = {{ '{' }}{{ package_version }}{{ '}' }}
}
```
"""


def steps_taken(settings: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether there were stochastic-depth and masked-freeze steps; by default there were both."""
    drops = settings.get("drop_rate", 0.5) > 0
    return tuple(drops and settings.get(f"{kind}_steps", 1) > 0 for kind in ("stochastic_depth", "masked_freeze"))


def method_tags(settings: Mapping[str, Any] | None) -> list[str]:
    """Return the tags of the methods that were used."""
    depth, freeze = (False, False) if settings is None else steps_taken(settings)
    tags = {"feature-reuse": depth and freeze, "stochastic-depth": depth}
    return ["hf_featreuse", *(tag for tag, used in tags.items() if used), "image-classification"]


def method_text(settings: Mapping[str, Any] | None, num_blocks: int) -> str:
    """Explain the steps that took place.

    Args:
        settings (`Mapping[str, Any]`, *optional*): options of the method; absent ones are not mentioned. `None` means
            that none was recorded.
        num_blocks (`int`): number of residual blocks that took part, 0 if it is not known.
    """
    if settings is None:
        return "How this model was trained was not recorded."
    depth, freeze = steps_taken(settings)
    if not depth and not freeze:
        usual = "The method of hf_featreuse was switched off: this model was trained in the usual way."
        return " ".join([usual, *_unfreezing(settings)])
    sentences = [*_steps(settings, num_blocks, depth, freeze), *_draws(settings), *_time(settings)]
    sentences += _unfreezing(settings)
    sentences.append("Evaluation and prediction use the whole network.")
    if depth and freeze:
        sentences.append(
            "The two kinds of step follow the abstract of [ResidualDroppath](https://arxiv.org/abs/2411.09475); the "
            "settings are of this run, not the paper's."
        )
    return " ".join(sentences)


def _steps(settings: Mapping[str, Any], num_blocks: int, depth: bool, freeze: bool) -> Iterator[str]:
    """Describe the steps of a cycle, in sentences."""
    blocks = f"a random set of the {num_blocks} residual blocks" if num_blocks else "a random set of residual blocks"
    plain = settings.get("vanilla_steps", 0)
    trunks = {"all": " and the layers outside the residual blocks", "head": " and the layers after the last block"}
    outside = trunks.get(trunk_option(settings.get("train_trunk", "none")), "")
    if depth and freeze:
        yield "Training repeats a cycle of two kinds of step."
    if plain:
        yield f"Each cycle begins with {plain} plain step{'s' if plain > 1 else ''}."
    if depth:
        which = "a" if freeze else "each"
        yield f"In {which} *stochastic-depth* step {blocks} is dropped: skipped and not computed."
        if settings.get("scale_kept") is not None:
            scaled = "divided by the probability that it is kept" if settings["scale_kept"] else "not scaled"
            yield f"What a block that is kept adds to its input is {scaled}."
    if freeze:
        which, drawn = ("a", "the blocks of that set") if depth else ("each", blocks)
        follows = ", which follows," if depth else ""
        yield (
            f"In {which} *masked-freeze* step{follows} the whole network runs, but only {drawn}{outside} are trained; "
            "if the set is empty, everything is trained."
        )


def _draws(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings.get("drop_granularity") == "sample":
        yield "Each sample of a batch has its own set."


def _unfreezing(settings: Mapping[str, Any]) -> Iterator[str]:
    if (end := settings.get("unfreeze_at")) is not None:
        yield (
            "At first only what follows the last block was trained; the blocks joined from the last one down, until "
            f"everything was trained from {100 * end:g} % of training on."
        )


def _time(settings: Mapping[str, Any]) -> Iterator[str]:
    """Describe when these steps took place, and how the drop rate changed."""
    start, end = settings.get("reuse_start", 0), settings.get("reuse_end", 1)
    all_of_it = (start, end) == (0, 1)
    if not all_of_it:
        yield f"This holds from {100 * start:g} % to {100 * end:g} % of training; all other steps are plain."
    over_time = {"falling": "falls linearly to 0", "rising": "rises linearly from 0"}
    if (change := over_time.get(settings.get("drop_rate_over_time", "constant"))) is not None:
        yield f"The probability of dropping a block {change} over {'' if all_of_it else 'this part of '}training."
