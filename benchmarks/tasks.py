"""Tasks of the accuracy study: images, architectures and the length of a plain run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_featreuse.data import RandAugment, SeededTransform, load_image_data

MODELS = ("vit", "convnext", "resnet")


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        image_size (`int`): in pixels.
        steps (`int`): optimizer steps of a plain run, of `batch_size` images.
        models (`dict[str, str]`): options of the small model of each type.
        data (`bool`): whether `--data` names the images; else they are scikit-learn's digits.
        train_images (`int`, *optional*): how many of the training images are used; `None` takes all.
        test_images (`int`, *optional*): how many of the test images are used; `None` takes all.
        classes (`tuple[int, ...]`): the classes of the task.
        start (`str`, *optional*): task whose plainly trained model the run starts from; `None` starts from scratch.
        shift (`int`): largest random shift of training images in pixels; if it is not 0, they are also flipped.
        batch_size (`int`): images in an optimizer step.
        fine_stem (`bool`): whether a ResNet starts with a 3 x 3 convolution of stride 1 and no pooling,
            as usual for 32 pixels. transformers has no option for it, so its saved models do not load.
        recipe (`dict`): what differs from `RECIPE`.
    """

    image_size: int
    steps: int
    models: dict[str, str]
    data: bool = False
    train_images: int | None = None
    test_images: int | None = None
    classes: tuple[int, ...] = field(default=tuple(range(10)))
    start: str | None = None
    shift: int = 0
    batch_size: int = 64
    fine_stem: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)


_DIGITS = {"vit": "", "convnext": "hidden_sizes=[24,48],depths=[2,4]", "resnet": ""}
_CIFAR10 = {
    "vit": "hidden_size=64,num_hidden_layers=8,num_attention_heads=2,intermediate_size=128,patch_size=8",
    "convnext": "hidden_sizes=[32,64],depths=[3,5],patch_size=4",
    "resnet": "embedding_size=16,hidden_sizes=[16,32],depths=[5,5]",
}
# 12 blocks, 15 blocks, and 27 of which 24 can be dropped.
_CIFAR10_DEEP = {
    "vit": "hidden_size=192,num_hidden_layers=12,num_attention_heads=6,intermediate_size=768,patch_size=4",
    "convnext": "hidden_sizes=[64,128,256],depths=[3,3,9],patch_size=2",
    "resnet": "embedding_size=16,hidden_sizes=[16,32,64],depths=[9,9,9]",
}
# Animals and vehicles on both sides.
_SIX, _FOUR = (0, 1, 2, 3, 4, 8), (5, 6, 7, 9)


def _finetune(images: int, steps: int) -> Task:
    """Return a task of four classes and so many images, after plain training on the six others."""
    return Task(
        32,
        steps,
        _CIFAR10,
        data=True,
        train_images=images,
        test_images=4000,
        classes=_FOUR,
        start="six-classes",
        shift=4,
        recipe={"learning_rate": 1e-3},
    )


TASKS = {
    "digits": Task(8, 400, _DIGITS),
    "digits-few": Task(8, 400, _DIGITS, train_images=150),
    "cifar10": Task(32, 600, _CIFAR10, data=True, train_images=10_000, test_images=4000, shift=4),
    # Weight decay was tuned for plain training on the validation split; see the search in docs/results.md.
    "cifar10-long": Task(
        32,
        4000,
        _CIFAR10,
        data=True,
        train_images=2000,
        test_images=4000,
        shift=4,
        recipe={"weight_decay": 0.3},
    ),
    # For a GPU.
    "cifar10-deep": Task(
        32,
        2000,
        _CIFAR10_DEEP,
        data=True,
        train_images=10_000,
        shift=4,
        batch_size=512,
        fine_stem=True,
        recipe={"weight_decay": 0.3},
    ),
    "cifar10-few": Task(32, 600, _CIFAR10, data=True, train_images=500, test_images=4000, shift=4),
    "six-classes": Task(32, 2000, _CIFAR10, data=True, classes=_SIX, test_images=4000, shift=4),
    "finetune": _finetune(400, 200),
    "finetune-more": _finetune(2000, 400),
}
# Peak learning rate, AdamW's weight decay, label smoothing, standard deviation of the initial weights, options of the
# package's recipe, operations of RandAugment, probability of random erasing (which needs torchvision).
RECIPE = {
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "label_smoothing": 0.0,
    "first_weights": None,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "ema_decay": None,
    "rand_augment_ops": 0,
    "random_erasing": 0.0,
}


# The best of three learning rates for each arm, on the validation split; see the search in docs/results.md. An option
# of the method with another rate follows the name of the arm.
_LEARNING_RATES = {
    ("cifar10-long", "vit"): {
        "vanilla": 1e-3,
        "stochastic_depth": 5e-4,
        "stochastic_depth_then_plain": 2e-3,
        "feature_reuse": 2e-3,
    },
    ("cifar10-long", "convnext"): {
        "vanilla": 5e-4,
        "stochastic_depth": 1e-3,
        "stochastic_depth_then_plain": 1e-3,
        "feature_reuse": 2e-3,
        "feature_reuse stochastic_depth_steps=1": 1e-3,
    },
    ("cifar10-long", "resnet"): {
        "vanilla": 8e-3,
        "stochastic_depth": 8e-3,
        "stochastic_depth_then_plain": 4e-3,
        "feature_reuse": 8e-3,
        "feature_reuse stochastic_depth_steps=1": 4e-3,
    },
}
# Arms without a search of their own take the rate of the arm that they are like.
_RATE_OF = {
    "stochastic_depth_unscaled": "stochastic_depth",
    "masked_freeze": "vanilla",
    "layer_drop_back": "vanilla",
    "feature_reuse_sample": "feature_reuse",
    "drop_path": "stochastic_depth",
}


def recipe_of(task: str, model_type: str, arm: str, options: str = "") -> dict[str, Any]:
    """Return the whole recipe of an arm; `options` are options of the method that differ from its defaults."""
    rates, changed = _LEARNING_RATES.get((task, model_type), {}), options.replace(" ", "").split(",")
    usual = rates.get(arm, rates.get(_RATE_OF.get(arm, "")))
    chosen = next((rates[key] for option in changed if (key := f"{arm} {option}") in rates), usual)
    return RECIPE | TASKS[task].recipe | ({} if chosen is None else {"learning_rate": chosen})


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes as numbers from -1 to 1."""
    return pixels.float().div_(127.5).sub_(1)


class Images(torch.utils.data.Dataset):
    """Decoded images, with their labels.

    Args:
        pixels (`torch.Tensor`): bytes, of shape (images, channels, height, width).
        labels (`torch.Tensor`): of shape (images,).
    """

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": scaled(self.pixels[index]), "labels": self.labels[index]}

    def rows(self, rows: np.ndarray | slice) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def of_classes(self, classes: tuple[int, ...]) -> Images:
        """Return the images of these classes, numbered from 0 in their order."""
        if len(classes) == 10:
            return self
        found = self.rows(np.flatnonzero(np.isin(self.labels.numpy(), classes)))
        return Images(found.pixels, torch.searchsorted(torch.tensor(classes), found.labels))


class ShiftedImages(Images):
    """Training images, randomly shifted by up to `shift` pixels and flipped, the same for every arm of a seed.

    Each of `augments`, such as a `RandAugment`, is applied after that.
    """

    augments: Sequence[RandAugment | SeededTransform] = ()

    def __init__(self, images: Images, shift: int, seed: int) -> None:
        padding = ((0, 0), (0, 0), (shift, shift), (shift, shift))
        super().__init__(torch.from_numpy(np.pad(images.pixels.numpy(), padding, mode="reflect")), images.labels)
        self.size, self.shift, self.generator = images.pixels.shape[-1], shift, np.random.default_rng(seed)
        self.drawn = 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        y, x, flip = self.generator.integers(0, (2 * self.shift + 1, 2 * self.shift + 1, 2))
        pixels = self.pixels[index][:, y : y + self.size, x : x + self.size]
        pixels = pixels.flip(-1) if flip else pixels
        if self.augments:
            image: Any = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            for augment in self.augments:
                [image] = augment([image], np.array([index]), self.drawn)
            is_tensor = isinstance(image, torch.Tensor)
            pixels = image if is_tensor else torch.from_numpy(np.array(image)).permute(2, 0, 1)
            self.drawn += 1
        return {"pixel_values": scaled(pixels), "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """The images of a batch at once, with the draws of one after the other."""
        if self.augments:
            return [self[index] for index in indices]
        high = (2 * self.shift + 1, 2 * self.shift + 1, 2)
        y, x, flip = torch.from_numpy(self.generator.integers(0, high, size=(len(indices), 3))).T
        windows = self.pixels.unfold(2, self.size, 1).unfold(3, self.size, 1)
        pixels = windows[torch.tensor(indices), :, y, x]
        pixels = scaled(torch.where(flip.bool()[:, None, None, None], pixels.flip(-1), pixels))
        labels = self.labels[indices]
        return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]


@functools.cache
def _decoded(data_name: str | None) -> tuple[Images, Images]:
    """Return all training and test images as bytes."""
    splits = load_image_data(data_name, splits=("train", "validation", "test")).splits
    parts = []
    for split in (splits["train"], splits.get("test") or splits["validation"]):
        rows = split.__getitems__(range(len(split)))
        parts.append(Images(torch.stack([row["pixel_values"] for row in rows]), torch.tensor(split.labels)))
    return parts[0], parts[1]


def load(task: Task, seed: int, split: str, data_name: str | None) -> tuple[Images, Images]:
    """Training images, drawn by the seed, and those that accuracy is measured on.

    With `split="validation"` these are a fifth of the training images, the same for every seed, and test images are
    not looked at.
    """
    train, test = (images.of_classes(task.classes) for images in _decoded(data_name if task.data else None))
    if split == "validation":
        rows = np.random.default_rng(0).permutation(len(train))
        held_out = len(rows) // 5
        test, train = train.rows(rows[:held_out]), train.rows(rows[held_out:])
    rows = np.random.default_rng(seed).permutation(len(train))[: task.train_images]
    train, test = train.rows(rows), test.rows(slice(task.test_images))
    return ShiftedImages(train, task.shift, seed) if task.shift else train, test
