"""Mixup and CutMix on the device, and their loss.

A mixed image has two labels. Its loss is the mean of the losses of both labels, weighted by their shares of the image,
which is cross-entropy with soft labels. Soft labels are not passed to the model: an image classifier of transformers
interprets labels that are not integers as several labels per image, and silently trains with binary cross-entropy.

Draws are a function of (seed, optimizer step, micro-batch), through NumPy's counter-based Philox: a resumed run draws
the same, and no global random state is used.

This package has its own implementation because those of timm and torchvision both need torchvision.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hf_featreuse.errors import ConfigurationError

__all__ = ["BatchMixer", "classification_loss", "mix_losses"]

# Second word of the key; the schedule and the transforms use others, so equal seeds give independent draws.
_STREAM = 0x6D6978


class BatchMixer:
    """Mix each image of a batch with the one before it, by Mixup, CutMix, or one of the two drawn per batch.

    The partner of an image is its neighbor, as a training batch is already in random order. One share is drawn per
    batch.

    Args:
        mixup_alpha (`float`, defaults to 0.0): the share of Mixup is drawn from Beta(alpha, alpha); 0 turns it off.
        cutmix_alpha (`float`, defaults to 0.0): the same for CutMix. With both above 0, each batch takes either with
            equal probability.
        seed (`int`, defaults to 0): from 0 to 2**64 - 1.

    Raises:
        ConfigurationError: an alpha is negative or not a number.

    Source: Mixup, Zhang et al. 2018 (arXiv 1710.09412); CutMix, Yun et al. 2019 (arXiv 1905.04899).

    Example:
        >>> import torch
        >>> from hf_featreuse import BatchMixer
        >>> images = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
        >>> mixed, share = BatchMixer(mixup_alpha=0.8)(images, global_step=0)
        >>> bool(torch.allclose(mixed[1], torch.full((3, 2, 2), share)))
        True
    """

    def __init__(self, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0, seed: int = 0) -> None:
        check_alpha("mixup_alpha", mixup_alpha)
        check_alpha("cutmix_alpha", cutmix_alpha)
        self.mixup_alpha, self.cutmix_alpha, self.seed = mixup_alpha, cutmix_alpha, seed

    def __call__(self, images: torch.Tensor, global_step: int, position: int = 0) -> tuple[torch.Tensor, float]:
        """Mix a micro-batch.

        Args:
            images (`torch.Tensor`): of shape (batch, channels, height, width); not changed.
            global_step (`int`): number of optimizer steps taken before this one.
            position (`int`, defaults to 0): number of the micro-batch among those of the optimizer step on all ranks.

        Returns:
            `tuple[torch.Tensor, float]`: the mixed images, and the share, from 0 to 1, of the original image in each.
        """
        generator = self._generator(global_step, position)
        alphas = (self.mixup_alpha, self.cutmix_alpha)
        # Always drawn, so that turning one of the two off does not change the shares of the other.
        second = generator.random() < 0.5
        cut = bool(alphas[1]) and (not alphas[0] or second)
        if not alphas[cut]:
            return images, 1.0
        share = float(generator.beta(alphas[cut], alphas[cut]))
        if cut:
            return _cut(images, share, generator)
        return torch.lerp(images.roll(1, 0), images, share), share

    def _generator(self, global_step: int, position: int) -> np.random.Generator:
        counter = np.array([0, position, global_step, 0], np.uint64)
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, _STREAM], np.uint64), counter=counter))


def _cut(images: torch.Tensor, share: float, generator: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Paste a rectangle of the partner, clipped at the edges; the share is that of the remaining area."""
    height, width = images.shape[-2:]
    half = (1 - share) ** 0.5 / 2
    row, column = int(generator.integers(height)), int(generator.integers(width))
    rows, columns = int(half * height), int(half * width)
    top, bottom = max(row - rows, 0), min(row + rows, height)
    left, right = max(column - columns, 0), min(column + columns, width)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def mix_losses(loss: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor, share: float) -> torch.Tensor:
    """Weigh the losses of a mixed batch for its own labels and for those of the partners.

    Args:
        loss (`Callable`): from labels, of the shape of `labels`, to a loss that is linear in the target.
        labels (`torch.Tensor`): of shape (batch,), before mixing.
        share (`float`): as returned by [`BatchMixer`]; 1 is `loss(labels)` itself.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> from hf_featreuse import mix_losses
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
        >>> loss = mix_losses(lambda labels: cross_entropy(logits, labels), labels, share=0.7)
        >>> bool(torch.isclose(loss, cross_entropy(logits, torch.tensor([[0.7, 0.3], [0.3, 0.7]]))))
        True
    """
    if share == 1:
        return loss(labels)
    return share * loss(labels) + (1 - share) * loss(labels.roll(1, 0))


def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Compute cross-entropy as the image classifiers of transformers, with torch's label smoothing.

    Args:
        logits (`torch.Tensor`): of shape (batch, classes).
        labels (`torch.Tensor`): of shape (batch,); -100 ignores an image.
        num_items (`int` or `torch.Tensor`, *optional*): images of the whole optimizer step, by which the sum is
            divided; by default the mean over the batch.
        label_smoothing (`float`, defaults to 0.0): share of the target that is spread over all classes.

    Example:
        >>> import torch
        >>> from hf_featreuse.recipe.mixing import classification_loss
        >>> classification_loss(torch.zeros(2, 4), torch.tensor([0, 3]), num_items=4)
        tensor(0.6931)
    """
    reduction = "mean" if num_items is None else "sum"
    loss = cross_entropy(logits.float(), labels, reduction=reduction, label_smoothing=label_smoothing)
    return loss if num_items is None else loss / num_items


def check_alpha(name: str, value: object) -> None:
    """Raise `ConfigurationError` unless a value is a parameter of a Beta distribution, or 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ConfigurationError(
            f"`{name}={value!r}` is not a parameter of a Beta distribution. Pass a positive number, or 0 to turn it "
            "off."
        )
