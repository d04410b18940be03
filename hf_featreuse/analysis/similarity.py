"""Linear CKA between layers, from the unbiased estimator of HSIC over minibatches.

Sources: Song et al. 2012 (JMLR 13, "Feature Selection via Dependence Maximization") for the estimator; Nguyen, Raghu
and Kornblith 2021 (arXiv 2010.15327) for its average over minibatches. Only Gram matrices, samples by samples, are
compared, so the widths of layers may differ.
"""

from __future__ import annotations

import torch

from hf_featreuse.errors import DataError

# The unbiased estimator divides by n (n - 3).
SMALLEST_BATCH = 4


def linear_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """Compute the linear CKA of two sets of features of the same samples, from the unbiased estimator of HSIC.

    It is 1 for features that are equal up to an orthogonal transformation and a scale, and about 0 for independent
    ones. An estimate over few samples can lie outside [0, 1].

    Args:
        first (`torch.Tensor`): features of shape (samples, ...), one row per sample; further dimensions are flattened.
        second (`torch.Tensor`): the same for another layer; its width may differ.

    Returns:
        `float`: the similarity; NaN if the features of a layer are the same for all samples.

    Raises:
        DataError: there are fewer than four samples, or their numbers differ.

    Example:
        >>> import torch
        >>> from hf_featreuse.analysis import linear_cka
        >>> features = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        >>> round(linear_cka(features, -3 * features), 6)
        1.0
    """
    if len(first) != len(second) or len(first) < SMALLEST_BATCH:
        raise DataError(
            f"CKA got features of {len(first)} and of {len(second)} samples. Pass features of the same samples, of at "
            f"least {SMALLEST_BATCH}."
        )
    return float(cka(unbiased_hsic(torch.stack([centered_gram(first), centered_gram(second)])))[0, 1])


def centered_gram(features: torch.Tensor) -> torch.Tensor:
    """Return the inner products of the samples' centered features, float64 of shape (samples, samples), on the CPU.

    The estimator does not depend on the mean of the features, but rounding does, so the mean is subtracted.
    """
    flat = features.flatten(1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    centered = flat - flat.mean(0)
    return (centered @ centered.T).double().cpu()


def unbiased_hsic(grams: torch.Tensor) -> torch.Tensor:
    """Estimate HSIC between all pairs of layers.

    Args:
        grams (`torch.Tensor`): Gram matrices of shape (layers, n, n) over the same n samples, n at least 4.

    Returns:
        `torch.Tensor`: shape (layers, layers).
    """
    n = grams.shape[-1]
    assert n >= SMALLEST_BATCH
    without_diagonal = grams * (1 - torch.eye(n, dtype=grams.dtype))
    flat, rows = without_diagonal.flatten(1), without_diagonal.sum(2)
    sums = rows.sum(1)
    products = flat @ flat.T - 2 / (n - 2) * rows @ rows.T + torch.outer(sums, sums) / ((n - 1) * (n - 2))
    return products / (n * (n - 3))


def cka(hsic: torch.Tensor) -> torch.Tensor:
    """Normalize HSIC of all pairs by that of each layer with itself; NaN where that is not positive."""
    scale = hsic.diagonal().sqrt()
    return hsic / torch.outer(scale, scale)
