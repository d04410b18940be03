"""Write the table of image classifiers in transformers: residual blocks, their share, and what steps cost.

    python benchmarks/architectures.py

Every class is built in transformers' default configuration on the meta device, where a forward does no arithmetic, so
that the sizes are the real ones. If a forward fails there, it runs on the CPU with random weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as MAPPING

from hf_featreuse import BlockError, ModelReport, find_residual_blocks, inspect_model

COMMAND = "python benchmarks/architectures.py"
OUTPUT = Path(__file__).parents[1] / "docs" / "architectures.md"
IMAGE_SIZE = 224
NONE = "-"

# Defaults that transformers itself cannot build: the width of the queries is not a multiple of eight heads.
OVERRIDES = {
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationConvProcessing": {"num_cross_attention_heads": 1},
}
NO_LOSS = "returns no loss, so it does not train in a Trainer"
NOTES = {
    "BitForImageClassification": "the first layer of a stage has a projection shortcut",
    "CvtForImageClassification": "keep its own `drop_path_rate` at 0: it would drop the shortcut too",
    "DeiTForImageClassificationWithTeacher": NO_LOSS,
    "EfficientNetForImageClassification": "the first block of a group has no shortcut",
    "HGNetV2ForImageClassification": "the first block of a stage has no shortcut",
    "HieraForImageClassification": (
        "every stage but the first keeps one layer, its first, which pools and widens; "
        "all others may be dropped at once"
    ),
    "ImageGPTForImageClassification": "takes colour clusters as `input_ids`: 1,024 of them",
    "LevitForImageClassification": "attention and MLP are separate blocks",
    "LevitForImageClassificationWithTeacher": NO_LOSS,
    "MobileNetV1ForImageClassification": "no shortcut anywhere",
    "MobileNetV2ForImageClassification": "layers that change width or resolution have no shortcut",
    "PPLCNetForImageClassification": f"no shortcut anywhere; {NO_LOSS}",
    "PerceiverForImageClassificationConvProcessing": "built with `num_cross_attention_heads=1`",
    "PerceiverForImageClassificationFourier": "built with `num_cross_attention_heads=1`",
    "RegNetForImageClassification": "the first layer of a stage has a projection shortcut",
    "ResNetForImageClassification": "the first layer of a stage has a projection shortcut",
    "ShieldGemma2ForImageClassification": (
        "figures for only text, so for its language layers: with an image its forward fails on the meta device, and "
        f"it is too large for another; {NO_LOSS}"
    ),
    "TextNetForImageClassification": "its identity branch is a batch normalisation, not a shortcut",
}
HEADER = (
    "model type",
    "class",
    "blocks",
    "parameters in them",
    "arithmetic in them",
    "stochastic depth",
    "masked freeze",
    "checkpointing",
    "notes",
)
TEXT = f"""# Architectures

Every image classifier of transformers, in its default configuration. Blocks are found by structure, not from a list of
classes: a module whose output is its input plus a branch. Anything else, such as a layer with a projection or a
downsampling shortcut, belongs to the trunk: it always runs, and trains in both kinds of step by default.

- *blocks*: residual blocks that can be skipped, frozen and [scaled](method.md#scaling).
- *parameters in them*, *arithmetic in them*: share of the model's parameters, and of the arithmetic of a plain step.
- *stochastic depth*, *masked freeze*: expected arithmetic of a step as a share of a plain step's, at a uniform drop
  rate of 0.5 and the default `train_trunk="all"`. Counted, not timed; {NONE} where it cannot be.
- *checkpointing*: whether transformers offers gradient checkpointing for the class.

The image has the size that the configuration names, else {IMAGE_SIZE} pixels. Blocks with an activation after their
addition are listed too; with ReLU, as here, skipping is exact, with GELU it is refused. They are scaled inside, before
the activation: ResNet, RegNet, and BiT with `layer_type="bottleneck"`. All others are scaled as a whole.

"""
BEYOND = """
## timm

Checkpoints of timm load as `TimmWrapperForImageClassification` if timm and torchvision are installed:
`pip install "hf_featreuse[timm]"`. With a CPU-only or another build of torch than that of the package index, install
torchvision from torch's own index first: one that does not fit keeps transformers itself from being imported
(`operator torchvision::nms does not exist`). Blocks are found by the same rule; `tests/method/test_timm.py` checks
these families of timm 1.0.31.

The example reads sizes and normalisation from an image processor, and timm's wraps its own transforms instead: pass
`--image_processor_name` with one that names its sizes, such as `ViTImageProcessor` saved with the mean and size of the
checkpoint's `pretrained_cfg`.

| families | blocks |
|---|---|
| ViT, DeiT III, BEiT, EVA, XCiT, MLP-Mixer, ResMLP | every block |
| CaiT | every block; in those of class attention the stream is the second argument |
| ConvNeXt, ConvNeXt V2, Swin, DaViT, PVTv2, LeViT, EdgeNeXt, PoolFormer | every block |
| ResNet, ResNetV2, RegNet, EfficientNet, MobileNetV3, MViTv2, Hiera | all but those that change width or resolution |
| TNT | every block, with `allow_inexact_skip=True`: only the first of its two streams is shown to be kept |
| CAFormer | those of the first two stages; in the others the shortcut has a scale: name them in `target_blocks` |
| DLA, legacy Xception, RepViT | none in a list or row: name them in `target_blocks` |
| ReXNet, DPN | none: every block widens the stream; none can be named |
| VGG, LCNet, DenseNet | none: no addition to a stream anywhere |

On the CPU, torch 2.13 ends with a segmentation fault in the backward of a GroupNorm layer whose weights train and
whose input is in channels-last layout and requires no gradient. With `train_trunk="head"` or `"none"`, the first layer
of the lowest block that trains in a masked-freeze step is such a layer if the model or its stem puts images into that
layout.

## Naming blocks that are not found

```python
from hf_featreuse import FeatureReuseConfig

config = FeatureReuseConfig("outputs/dla", target_blocks=["level2.tree2", "level3.tree2.tree2"])
```

An entry of `target_blocks` that matches none of the blocks found may name any other module. It becomes a block if
every call takes one tensor of the shape and dtype of its first output, and is refused with the reason if not.

- If the graph shows it to be its input plus something, it is a block like any other, as in DLA.
- If it does not, as with a scaled shortcut, only you claim that it computes input plus branch. If dropped, it returns
  its input as it is, and training asks for `allow_inexact_skip=True` as well.

An entry that matches blocks found takes only those; for blocks of both kinds pass a list. Of two modules of which one
contains the other only one can be named, and none that contains blocks found.

## Outside image classification

Works, but not studied: nothing here is specific to images, and `tests/method/test_other_models.py` runs these on tiny
random models. Whether feature reuse helps them is not known.

| model | blocks | notes |
|---|---|---|
| Llama | every decoder layer | pass `use_cache=False` among the inputs, as Trainer does |
| RoBERTa-PreLayerNorm | every layer | pre-norm, as ViT |
| Whisper encoder | every encoder layer | pass a small batch as `inputs`: none can be made from the configuration |
| BERT, DistilBERT | none | a layer is LayerNorm(x + f(x)): without f it still normalises, so no shortcut is exact |
"""


@dataclass(frozen=True)
class Row:
    model_type: str
    model_class: str
    blocks: str = NONE
    parameters: str = NONE
    arithmetic: str = NONE
    depth: str = NONE
    freeze: str = NONE
    checkpointing: str = NONE
    notes: str = ""

    def __str__(self) -> str:
        cells = (f"`{self.model_type}`", f"`{self.model_class}`", *list(vars(self).values())[2:])
        return f"| {' | '.join(cells)} |"


def classes() -> Iterator[tuple[str, str]]:
    """Yield the model type and class of every image classifier."""
    for model_type, names in sorted(MAPPING.items()):
        for name in (names,) if isinstance(names, str) else names:
            yield model_type, name


def build(model_type: str, model_class: str, device: str) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type](**OVERRIDES.get(model_class, {}))
    with torch.device(device):
        return getattr(transformers, model_class)(config)


def batch(model: PreTrainedModel) -> dict:
    """Return a batch of one with the shape of the default preprocessing."""
    config, device = model.config, model.device
    if config.model_type == "imagegpt":
        return {"input_ids": torch.zeros(1, config.n_positions, dtype=torch.long, device=device), "use_cache": False}
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    if config.model_type == "siglip2":
        side = int(vision.num_patches**0.5)
        return {
            "pixel_values": torch.zeros(1, vision.num_patches, 3 * vision.patch_size**2, device=device),
            "pixel_attention_mask": torch.ones(1, vision.num_patches, dtype=torch.long, device=device),
            "spatial_shapes": torch.full((1, 2), side),
        }
    if config.model_type == "shieldgemma2":
        return {"input_ids": torch.ones(1, 256, dtype=torch.long, device=device), "use_cache": False}
    return {"pixel_values": torch.zeros(1, 3, height, width, device=device)}


def report(model: PreTrainedModel) -> ModelReport:
    return inspect_model(model, inputs=batch(model), drop_rate=0.5, drop_rate_schedule="uniform")


def row(model_type: str, model_class: str) -> Row:
    """Return the facts about one class."""
    notes = [NOTES[model_class]] if model_class in NOTES else []
    try:
        model = build(model_type, model_class, "meta")
    except ImportError as error:
        package = next(line for line in str(error).splitlines() if line).partition("requires the ")[2].split(" ")[0]
        return Row(model_type, model_class, notes=f"needs the package `{package}`, absent here")
    checkpointing = "yes" if model.supports_gradient_checkpointing else "no"
    try:
        found = report(model)
    except BlockError as error:
        if error.__cause__ is None:
            return Row(model_type, model_class, "0", checkpointing=checkpointing, notes="; ".join(notes))
        model = build(model_type, model_class, "cpu")
        found = report(model)
        notes.append("counted on the CPU with random weights: its forward fails on the meta device")
    return measured(Row(model_type, model_class, checkpointing=checkpointing), model, found, notes)


def measured(empty: Row, model: PreTrainedModel, found: ModelReport, notes: list[str]) -> Row:
    """Return the table row of a report."""
    try:
        default = [block.name for block in find_residual_blocks(model)]
    except BlockError:
        default = []
    if default != [block.name for block in found.blocks]:
        notes.append("pass a small batch as `inputs`")
    arithmetic = NONE
    if found.costs:
        arithmetic = f"{sum(block.share_of_arithmetic or 0 for block in found.blocks):.0%}"
    else:
        notes.append("the arithmetic cannot be counted")
    return Row(
        empty.model_type,
        empty.model_class,
        str(len(found.blocks)),
        f"{sum(block.parameters for block in found.blocks) / found.parameters:.0%}",
        arithmetic,
        f"{found.costs['stochastic_depth']:.2f}" if found.costs else NONE,
        f"{found.costs['masked_freeze']:.2f}" if found.costs else NONE,
        empty.checkpointing,
        "; ".join(notes),
    )


def page() -> str:
    made = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "hf_featreuse"))
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    for model_type, model_class in classes():
        lines.append(str(row(model_type, model_class)))
        print(lines[-1], file=sys.stderr)
    return f"{TEXT}Written by `{COMMAND}` with {made}.\n\n" + "\n".join(lines) + "\n" + BEYOND


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page())


if __name__ == "__main__":
    main()
