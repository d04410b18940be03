"""The losses, against torch's own and against formulas written out."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot, softmax

from hf_featreuse import ConfigurationError, mix_losses
from hf_featreuse.recipe.losses import ImageLoss, balanced_weights
from hf_featreuse.recipe.mixing import classification_loss

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64).float()
LABELS = torch.tensor([0, 3, 1, 2, 3, 0])
HOT = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).float()
WEIGHTS = [0.5, 2.0, 1.0, 3.0]
KINDS = ["cross_entropy", "bce", "focal"]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs(smoothing):
    found = ImageLoss(label_smoothing=smoothing)(LOGITS, LABELS)
    torch.testing.assert_close(found, cross_entropy(LOGITS, LABELS, label_smoothing=smoothing))
    torch.testing.assert_close(found, classification_loss(LOGITS, LABELS, None, smoothing))


def test_weights_count_by_image_and_not_by_their_sum():
    each = cross_entropy(LOGITS, LABELS, reduction="none")
    expected = (each * torch.tensor(WEIGHTS)[LABELS]).sum() / 6
    torch.testing.assert_close(ImageLoss(class_weights=WEIGHTS)(LOGITS, LABELS), expected)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 3.5])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_focal_is_its_formula(gamma, weights):
    right = softmax(LOGITS, -1)[torch.arange(6), LABELS]
    expected = -((1 - right) ** gamma) * right.log() * (1 if weights is None else torch.tensor(weights)[LABELS])
    torch.testing.assert_close(ImageLoss("focal", weights, gamma)(LOGITS, LABELS), expected.mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_bce_of_one_label_is_torchs_against_soft_targets(smoothing, weights):
    target = one_hot(LABELS, 4) * (1 - smoothing) + smoothing / 4
    pos_weight = None if weights is None else torch.tensor(weights)
    expected = binary_cross_entropy_with_logits(LOGITS, target, pos_weight=pos_weight)
    torch.testing.assert_close(ImageLoss("bce", weights, label_smoothing=smoothing)(LOGITS, LABELS), expected)


def test_several_labels_with_unknown_ones():
    torch.testing.assert_close(ImageLoss("bce")(LOGITS, HOT), binary_cross_entropy_with_logits(LOGITS, HOT))
    torch.testing.assert_close(ImageLoss("focal", None, 0.0)(LOGITS, HOT), ImageLoss("bce")(LOGITS, HOT))
    right = torch.where(HOT == 1, LOGITS, -LOGITS).sigmoid()
    torch.testing.assert_close(ImageLoss("focal")(LOGITS, HOT), (-((1 - right) ** 2) * right.log()).mean())
    unknown = HOT.clone()
    unknown[2:, 1] = -100
    each = binary_cross_entropy_with_logits(LOGITS, HOT, reduction="none")
    torch.testing.assert_close(ImageLoss("bce")(LOGITS, unknown), each[unknown != -100].mean())


def test_squared_error():
    values = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.0])
    expected = torch.nn.functional.mse_loss(LOGITS[:, 0], values)
    torch.testing.assert_close(ImageLoss("mse")(LOGITS[:, :1], values), expected)
    torch.testing.assert_close(ImageLoss("mse")(LOGITS[:, :1], values.unsqueeze(1)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_micro_batches_add_up_and_ignored_images_do_not_count(kind, weights):
    loss, labels = ImageLoss(kind, weights, label_smoothing=0.1), LABELS.clone()
    parts = [loss(LOGITS[i : i + 2], labels[i : i + 2], num_items=6) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), loss(LOGITS, labels))
    labels[4:] = -100
    torch.testing.assert_close(loss(LOGITS, labels), loss(LOGITS[:4], LABELS[:4]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_is_linear_in_the_target(kind, smoothing):
    """The loss of both labels, weighted, is that of the soft target, which mixing relies on."""
    loss = ImageLoss(kind, WEIGHTS, label_smoothing=smoothing)
    found = mix_losses(lambda labels: loss(LOGITS, labels), LABELS, 0.7)
    soft = 0.7 * one_hot(LABELS, 4) + 0.3 * one_hot(LABELS.roll(1), 4)
    soft = soft * (1 - smoothing) + smoothing / 4
    weights, log_p = torch.tensor(WEIGHTS), LOGITS.log_softmax(-1)
    if kind == "bce":
        expected = binary_cross_entropy_with_logits(LOGITS, soft, pos_weight=weights)
    else:
        focus = (1 - log_p.exp()) ** 2 if kind == "focal" else 1.0
        expected = -(soft * weights * focus * log_p).sum() / 6
    torch.testing.assert_close(found, expected)


def test_gradients_are_finite_at_certainty():
    for kind, labels in [("focal", LABELS), ("focal", HOT), ("bce", HOT)]:
        logits = (1e3 * (2 * one_hot(LABELS, 4) - 1).float()).requires_grad_()
        (gradient,) = torch.autograd.grad(ImageLoss(kind)(logits, labels), logits)
        assert gradient.isfinite().all(), kind


def test_balanced_weights():
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    counts = [30, 10, 5]
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    expected = sklearn.compute_class_weight("balanced", classes=np.arange(3), y=np.array(labels))
    assert balanced_weights(counts) == pytest.approx(expected.tolist())
    assert balanced_weights([4, 0, 4]) == [1.0, 1.0, 1.0]
    assert balanced_weights([2, 8, 0, 10], total=10) == [4.0, 0.25, 1.0, 1.0]


def test_labels_that_a_loss_does_not_take_are_refused():
    with pytest.raises(ConfigurationError, match=r"float32 and shape \(6, 4\)"):
        ImageLoss()(LOGITS, HOT)
    with pytest.raises(ConfigurationError, match=r"shape \(6,\).*\(6, 4\)"):
        ImageLoss("bce")(LOGITS, LABELS.float())
    with pytest.raises(ConfigurationError, match="`loss='hinge'` is unknown"):
        ImageLoss("hinge")
    assert math.isfinite(ImageLoss("focal")(LOGITS, LABELS))
