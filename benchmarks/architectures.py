"""Write docs/architectures.md: the residual blocks of every image classifier of transformers, and what steps cost.

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
    "ImageGPTForImageClassification": "takes color clusters as `input_ids`: 1,024 of them",
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
    "TextNetForImageClassification": "its identity branch is a batch normalization, not a shortcut",
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
TEXT = f"""# Supported architectures

Every image classifier of transformers, in its default configuration. Blocks are found by structure, not from a list of
classes: a residual block is a module whose output is its input plus a branch. Everything else, such as a layer with a
projection or downsampling shortcut, belongs to the trunk, which always runs. [Inspect](inspect.md) your own model to
see its blocks.

- *blocks*: residual blocks, which can be skipped, frozen and [scaled](method.md#scaling).
- *parameters in them*, *arithmetic in them*: as a share of the model and of a plain step.
- *stochastic depth*, *masked freeze*: expected arithmetic as a share of a plain step, at a uniform drop rate of 0.5
  with `train_trunk="all"`; {NONE} if it cannot be counted.
- *checkpointing*: whether transformers offers gradient checkpointing for the class.

Images have the size in the configuration, or {IMAGE_SIZE} pixels. In ResNet, RegNet and BiT with
`layer_type="bottleneck"`, an activation follows the addition; such blocks are scaled before it. With ReLU, as here,
skipping them is exact; with GELU it is refused.

"""
BEYOND = """
## timm

timm checkpoints load as `TimmWrapperForImageClassification` with `pip install "hf_featreuse[timm]"`. If your torch is
not from the default package index (for example a CPU build), install torchvision from torch's own index first.
`tests/method/test_timm.py` checks these families of timm 1.0.31:

| families | blocks |
|---|---|
| ViT, DeiT III, BEiT, EVA, XCiT, MLP-Mixer, ResMLP | every block |
| CaiT | every block; in those of class attention the stream is the second argument |
| ConvNeXt, ConvNeXt V2, Swin, DaViT, PVTv2, LeViT, EdgeNeXt, PoolFormer | every block |
| ResNet, ResNetV2, RegNet, EfficientNet, MobileNetV3, MViTv2, Hiera | all but those that change width or resolution |
| TNT | every block, with `allow_inexact_skip=True`: only the first of its two streams is known to be kept |
| CAFormer | those of the first two stages; in the others the shortcut is scaled: name them in `target_blocks` |
| DLA, legacy Xception, RepViT | none found: name them in `target_blocks` |
| ReXNet, DPN | none, and none can be named: every block widens the stream |
| VGG, LCNet, DenseNet | none: no addition to a stream |

The training example needs an image processor with sizes and normalization, which timm's wrapper does not give. Pass
`--image_processor_name` with, for example, a `ViTImageProcessor` saved with the values of the checkpoint's
`pretrained_cfg`.

On the CPU, torch 2.13 crashes in the backward of a GroupNorm layer that trains on a channels-last input without a
gradient. With `train_trunk="head"` or `"none"`, the lowest block that trains can begin with such a layer.

## Naming blocks that are not found

```python
from hf_featreuse import FeatureReuseConfig

config = FeatureReuseConfig("outputs/dla", target_blocks=["level2.tree2", "level3.tree2.tree2"])
```

An entry of `target_blocks` that matches no found block may name any other module whose every call takes one tensor of
the shape and dtype of its first output. Others are refused with the reason.

- If the autograd graph shows an input plus something, as in DLA, it is a block like any other.
- If not, as with a scaled shortcut, training also needs `allow_inexact_skip=True`. If dropped, it returns its input.

To combine found and named blocks, pass a list. Named blocks must not contain each other or found blocks.

## Outside image classification

Nothing is specific to images. `tests/method/test_other_models.py` runs these on tiny random models; whether feature
reuse helps them has not been studied.

| model | blocks | notes |
|---|---|---|
| Llama | every decoder layer | pass `use_cache=False` among the inputs, as Trainer does |
| RoBERTa-PreLayerNorm | every layer | pre-norm, as ViT |
| Whisper encoder | every encoder layer | pass a small batch as `inputs`: none can be made from the configuration |
| BERT, DistilBERT | none | a layer is LayerNorm(x + f(x)), so no shortcut is an identity |
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
