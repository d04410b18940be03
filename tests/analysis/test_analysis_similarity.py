"""CKA against its definition, and what it must not depend on."""

import itertools
import math

import pytest
import torch

from hf_featreuse.analysis import linear_cka
from hf_featreuse.analysis.similarity import cka, unbiased_hsic
from hf_featreuse.errors import DataError


def features(samples: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(features(width, width, seed))[0]


def hsic_from_definition(k: torch.Tensor, m: torch.Tensor) -> float:
    """The U-statistic of Song et al. 2012: the mean of a kernel over all ordered sets of four samples."""
    total = 0.0
    for i, j, q, r in itertools.permutations(range(len(k)), 4):
        total += float(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]))
    return total / math.perm(len(k), 4)


def test_hsic_is_the_u_statistic():
    first, second = features(7, 3, 0), features(7, 5, 1)
    k, m = first @ first.T, second @ second.T
    estimate = unbiased_hsic(torch.stack([k, m]))
    assert estimate[0, 1].item() == pytest.approx(hsic_from_definition(k, m), rel=1e-10)
    assert estimate[1, 1].item() == pytest.approx(hsic_from_definition(m, m), rel=1e-10)
    assert torch.equal(estimate, estimate.T)


def test_cka_of_the_definition():
    first, second = features(7, 3, 0), features(7, 5, 1)
    k, m = first @ first.T, second @ second.T
    expected = hsic_from_definition(k, m) / math.sqrt(hsic_from_definition(k, k) * hsic_from_definition(m, m))
    assert linear_cka(first, second) == pytest.approx(expected, rel=1e-9)


def test_estimate_is_unbiased():
    """The mean over many small batches is the HSIC of the whole; the biased estimator of n = 4 is far off."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    second = first[:, :2] + 0.5 * torch.randn(400, 2, generator=generator, dtype=torch.float64)
    grams = torch.stack([x @ x.T for x in (first, second)])
    whole = unbiased_hsic(grams)[0, 1]
    estimates = []
    for _ in range(4000):
        rows = torch.randperm(400, generator=generator)[:4]
        estimates.append(unbiased_hsic(grams[:, rows][:, :, rows])[0, 1])
    assert torch.stack(estimates).mean().item() == pytest.approx(whole.item(), rel=0.1)


def test_invariance_to_rotation_scale_and_shift():
    first, second = features(20, 6, 0), features(20, 9, 1)
    second[:, :3] += first[:, :3]
    expected = linear_cka(first, second)
    assert 0.1 < expected < 0.9
    assert linear_cka(first @ rotation(6, 2), second) == pytest.approx(expected, rel=1e-9)
    assert linear_cka(-3.5 * first, second) == pytest.approx(expected, rel=1e-9)
    assert linear_cka(first + 100, second) == pytest.approx(expected, rel=1e-9)
    assert linear_cka(first @ features(6, 6, 3), second) != pytest.approx(expected, rel=1e-2)


def test_same_features_are_alike_and_independent_ones_are_not():
    first = features(256, 8, 0)
    assert linear_cka(first, first @ rotation(8, 1)) == pytest.approx(1, abs=1e-12)
    assert abs(linear_cka(first, features(256, 8, 5))) < 0.05


def test_maps_are_flattened():
    maps = features(8, 24, 0)
    assert linear_cka(maps.view(8, 2, 3, 4), maps) == pytest.approx(1, abs=1e-12)


def test_constant_features_have_no_cka():
    assert math.isnan(linear_cka(torch.ones(8, 3), features(8, 3, 0)))
    assert torch.isnan(cka(torch.zeros(2, 2))).all()


@pytest.mark.parametrize("sizes", [(3, 3), (8, 7)])
def test_too_few_or_other_samples_are_refused(sizes):
    with pytest.raises(DataError, match=f"of {sizes[0]} and of {sizes[1]} samples"):
        linear_cka(features(sizes[0], 2, 0), features(sizes[1], 2, 1))
