"""The words of a model card: its template, what the settings mean, and sentences that explain the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_featreuse.freezing import trunk_option

MEANINGS = {
    "drop_rate": "probability of dropping a block in a cycle; the last block's where the schedule is linear",
    "drop_rate_schedule": "linear: rising with depth up to `drop_rate`; uniform: the same for all blocks",
    "drop_rate_over_time": "constant, falling to 0 or rising from 0 between `reuse_start` and `reuse_end`",
    "drop_granularity": "batch: all samples of a step share one drawn set of blocks; sample: each has its own",
    "vanilla_steps": "plain steps at the start of a cycle",
    "stochastic_depth_steps": "steps of a cycle in which the drawn blocks are left out",
    "masked_freeze_steps": "steps of a cycle in which only the drawn blocks train",
    "scale_kept": "whether a kept block's increment is divided by its survival probability",
    "train_trunk": "what of the layers outside the blocks trains in masked-freeze steps",
    "frozen_batch_norm": "statistics that frozen BatchNorm layers use in masked-freeze steps",
    "allow_inexact_skip": "whether blocks are dropped too whose shortcut is no identity",
    "target_blocks": "which residual blocks take part; none given: all",
    "reuse_start": "fraction of training before which steps are plain",
    "reuse_end": "fraction of training after which steps are plain",
    "reuse_seed": "seed of the random sets of blocks; none given: the training seed",
}

# The line `repository = ...` is written anew when the folder is pushed to another repository.
_SNIPPET = """from PIL import Image
from transformers import pipeline

repository = "{name}"
classifier = pipeline("image-classification", model=repository)
image = Image.new("RGB", (64, 64))  # or your own: Image.open("photo.jpg").convert("RGB")
print(classifier(image))"""

# An adapter's repository holds the labels in its config.json, and the weights of the adapter and the new head alone.
_ADAPTER_SNIPPET = """import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

repository = "{name}"
config = AutoConfig.from_pretrained(repository)
model = AutoModelForImageClassification.from_pretrained("{base}", config=config, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(model, repository).eval()
image = Image.new("RGB", (64, 64))  # or your own: Image.open("photo.jpg").convert("RGB")
inputs = AutoImageProcessor.from_pretrained(repository)(image, return_tensors="pt")
with torch.no_grad():
    print(config.id2label[model(**inputs).logits.argmax(-1).item()])"""

# Of a module that transformers does not know, its user brings the code.
_MODULE_SNIPPET = """from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

repository = "{name}"
model = {architecture}()  # made as it was for training, by its own code
model.load_state_dict(load_file(hf_hub_download(repository, "model.safetensors")))
model.eval()"""

_MODULE_ADAPTER_SNIPPET = """from peft import PeftModel

repository = "{name}"
model = {architecture}()  # made as it was for training, by its own code and with the weights it had then
model = PeftModel.from_pretrained(model, repository).eval()"""

_WHERE = "`repository` is an id on the Hub, or a folder with its files."
_NO_PACKAGE = "The package it was trained with is not needed to run it."
# Snippet and what to know of it, by whether the weights are an adapter's, and whether transformers loads the model.
SNIPPETS = {
    (False, True): (_SNIPPET, f"{_WHERE} It is a plain transformers model. {_NO_PACKAGE}"),
    (True, True): (_ADAPTER_SNIPPET, f"{_WHERE} The base model's weights and PEFT are needed besides. {_NO_PACKAGE}"),
    (False, False): (_MODULE_SNIPPET, f"`repository` is an id on the Hub. {_NO_PACKAGE}"),
    (True, False): (_MODULE_ADAPTER_SNIPPET, f"{_WHERE} PEFT is needed besides. {_NO_PACKAGE}"),
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
    """Tell which kinds of step took place; by default both."""
    return bool(settings.get("stochastic_depth_steps", 1)), bool(settings.get("masked_freeze_steps", 1))


def method_tags(settings: Mapping[str, Any] | None) -> list[str]:
    """Tag the methods that were used."""
    depth, freeze = (False, False) if settings is None else steps_taken(settings)
    tags = {"feature-reuse": depth and freeze, "stochastic-depth": depth}
    return ["hf_featreuse", *(tag for tag, used in tags.items() if used), "image-classification"]


def method_text(settings: Mapping[str, Any] | None, num_blocks: int) -> str:
    """Explain the kinds of step that took place."""
    if settings is None:
        return "How this model was trained was not recorded beside it."
    depth, freeze = steps_taken(settings)
    if not depth and not freeze:
        return "Both kinds of step of hf_featreuse were switched off: this model was trained in the usual way."
    blocks = f"a random set of the {num_blocks} residual blocks" if num_blocks else "a random set of residual blocks"
    trunks = {"all": " and the layers outside the residual blocks", "head": " and the layers after the last one"}
    outside = trunks.get(trunk_option(settings.get("train_trunk", "none")), "")
    if depth and freeze:
        kinds = (
            f"Training repeats a cycle of two kinds of step. In a *stochastic-depth* step {blocks} is dropped: left "
            "out and not computed. In a *masked-freeze* step, which follows, the whole network runs, but only the "
            f"blocks of that set{outside} are trained; if the set is empty, everything is. "
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
