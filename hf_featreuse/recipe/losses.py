"""Losses of image classifiers: cross-entropy, binary cross-entropy and focal loss with class weights; squared error.

All are sums over the items of a batch, divided by a number of items, so the loss of an optimizer step does not depend
on how its batch is divided into micro-batches and processes. The binary cross-entropy and squared error of
transformers are means over the micro-batch, which Trainer sums over the micro-batches of a step (transformers 5.24).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, log_softmax, one_hot

from hf_featreuse.errors import ConfigurationError

__all__ = ["ImageLoss", "balanced_weights"]

LossKind = Literal["cross_entropy", "bce", "focal", "mse"]
DEFAULT_GAMMA = 2.0
IGNORED = -100


class ImageLoss:
    """Compute the loss of a batch from logits and labels.

    Labels are class ids of shape (batch,), or, for several labels per image, zeros and ones of shape (batch, classes)
    and a floating-point type. A label of -100 leaves an image, or one label of an image, out.

    Args:
        kind (`"cross_entropy"`, `"bce"`, `"focal"` or `"mse"`, defaults to `"cross_entropy"`): `"bce"` is binary
            cross-entropy of each class, its mean over the classes; `"focal"` weighs each term of the cross-entropy, or
            of the binary one with several labels, by `(1 - p) ** focal_gamma`, p being the probability of the target;
            `"mse"` is the squared error of a regression.
        class_weights (`Sequence[float]`, *optional*): one weight per class, of the images of that class; in binary
            cross-entropy, of its positive labels.
        focal_gamma (`float`, defaults to 2.0): 0 or more; with 0 all images count equally.
        label_smoothing (`float`, defaults to 0.0): share of the target that is spread over all classes; only for class
            ids.

    Raises:
        ConfigurationError: the kind is unknown, or it does not take the labels of a batch.

    Source: focal loss, Lin et al. 2017 (arXiv 1708.02002); binary cross-entropy for one label per image, Wightman et
    al. 2021 (arXiv 2110.00476).

    Example:
        >>> import torch
        >>> from hf_featreuse.recipe.losses import ImageLoss
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
        >>> ImageLoss("focal")(logits, labels) < ImageLoss("cross_entropy")(logits, labels)
        tensor(True)
    """

    def __init__(
        self,
        kind: LossKind = "cross_entropy",
        class_weights: Sequence[float] | None = None,
        focal_gamma: float = DEFAULT_GAMMA,
        label_smoothing: float = 0.0,
    ) -> None:
        check_loss(kind)
        self.kind, self.focal_gamma, self.label_smoothing = kind, focal_gamma, label_smoothing
        self._weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Compute the loss.

        Args:
            logits (`torch.Tensor`): of shape (batch, classes).
            labels (`torch.Tensor`): as above.
            num_items (`int` or `torch.Tensor`, *optional*): labels of the whole optimizer step, -100 not counted, by
                which the sum is divided; by default those of the batch.
        """
        logits, labels = logits.float(), labels.to(logits.device)
        if self.kind == "mse":
            squared = (logits.reshape(labels.shape) - labels.float()).square()
            return squared.sum() / (labels.numel() if num_items is None else num_items)
        weights = None if self._weights is None else self._weights.to(logits.device)
        if labels.is_floating_point():
            total = self._of_several_labels(logits, labels, weights)
        else:
            total = self._of_one_label(logits, labels, weights)
        # Counted on the device: reading the count on the host would synchronize.
        return total / ((labels != IGNORED).sum() if num_items is None else num_items)

    def _of_one_label(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        smoothing, classes, labels = self.label_smoothing, logits.shape[-1], labels.long()
        if self.kind == "cross_entropy":
            return cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=smoothing)
        labeled = (labels != IGNORED).unsqueeze(1)
        target = one_hot(labels.clamp_min(0), classes) * (1 - smoothing) + smoothing / classes
        if self.kind == "bce":
            terms = binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=weights) / classes
        else:
            log_probability = log_softmax(logits, -1)
            terms = -target * (1 - log_probability.exp()).pow(self.focal_gamma) * log_probability
            terms = terms if weights is None else terms * weights
        return (terms * labeled).sum()

    def _of_several_labels(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        if self.kind == "cross_entropy" or labels.shape != logits.shape:
            raise ConfigurationError(
                f'`loss="{self.kind}"` got labels of type {labels.dtype} and shape {tuple(labels.shape)} for logits '
                f"of shape {tuple(logits.shape)}. Several labels per image are zeros and ones for each class, with "
                '"bce" or "focal"; one label per image is a whole number.'
            )
        known = labels != IGNORED
        target = labels * known
        terms = binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=weights)
        if self.kind == "focal":
            right = torch.sigmoid(logits * (2 * target - 1))
            terms = terms * (1 - right).pow(self.focal_gamma)
        return (terms * known).sum()


def balanced_weights(counts: Sequence[int], total: int | None = None) -> list[float]:
    """Weigh classes so that each contributes equally.

    Args:
        counts (`Sequence[int]`): images of each class.
        total (`int`, *optional*): total number of images, with several labels per image: the weight is then that of
            positive labels, `(total - count) / count`. By default the weight is `images / (classes * count)`, as in
            scikit-learn's `class_weight="balanced"`; classes without images are not counted.

    Returns:
        `list[float]`: one for each class; 1 for a class without images.

    Example:
        >>> from hf_featreuse.recipe.losses import balanced_weights
        >>> balanced_weights([30, 10])
        [0.6666666666666666, 2.0]
    """
    if total is not None:
        return [(total - count) / count if 0 < count < total else 1.0 for count in counts]
    classes = sum(count > 0 for count in counts)
    return [sum(counts) / (classes * count) if count else 1.0 for count in counts]


def check_loss(kind: object, focal_gamma: object = None) -> None:
    """Raise `ConfigurationError` for an unknown loss, or for a gamma that is invalid or has no effect."""
    if kind not in get_args(LossKind):
        raise ConfigurationError(f"`loss={kind!r}` is unknown. Pass one of {get_args(LossKind)}.")
    if focal_gamma is None:
        return
    if kind != "focal":
        raise ConfigurationError(
            f'`focal_gamma={focal_gamma!r}` has an effect only with `loss="focal"`, but `loss` is {kind!r}. Leave it '
            'unset, or set `loss="focal"`.'
        )
    if isinstance(focal_gamma, bool) or not isinstance(focal_gamma, (int, float)) or not 0 <= focal_gamma < 100:
        raise ConfigurationError(
            f"`focal_gamma={focal_gamma!r}` is not an exponent. Pass a number of at least 0, such as 2."
        )
