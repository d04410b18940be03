"""Choose the rows for validation if the data has no validation split: stratified by class, by the seed."""

from __future__ import annotations

import numpy as np


def held_out_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose rows, stratified by class, as a function of only the labels, their number and the seed.

    Each class keeps a row for training if possible. Lists and floating-point numbers are not stratified. `datasets`
    and scikit-learn cannot be used here: they raise for classes of one row.

    Args:
        labels (`numpy.ndarray`): of all rows, as Python objects.
        count (`int`): how many rows to choose, fewer than there are.
        seed (`int`): non-negative.

    Returns:
        `numpy.ndarray`: the rows, ascending.

    Example:
        >>> import numpy as np
        >>> from hf_featreuse.data.splitting import held_out_rows
        >>> labels = np.array(["cat"] * 6 + ["dog"] * 3, dtype=object)
        >>> labels[held_out_rows(labels, 3, seed=0)].tolist()
        ['cat', 'cat', 'dog']
    """
    generator = np.random.default_rng([seed, 0])
    rows = generator.permutation(len(labels))
    if any(isinstance(label, (list, float)) for label in labels.tolist()):
        return np.sort(rows[:count])
    known = {label: index for index, label in enumerate(sorted(set(labels.tolist()), key=_order))}
    classes = np.array([known[label] for label in labels.tolist()])
    sizes = np.bincount(classes)
    shares = sizes * (count / len(labels))
    chosen = np.minimum(np.floor(shares), sizes - 1).astype(np.int64)
    # Largest remainders first; equal ones are drawn.
    by_remainder = np.lexsort((generator.permutation(len(sizes)), np.floor(shares) - shares))
    for most in (sizes - 1, sizes):
        while chosen.sum() < count and (open_classes := by_remainder[(chosen < most)[by_remainder]]).size:
            chosen[open_classes[: count - int(chosen.sum())]] += 1
    # Rows by class, in the drawn order, and the first few of each.
    by_class = rows[np.argsort(classes[rows], kind="stable")]
    place = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(by_class[place < np.repeat(chosen, sizes)])


def _order(label: object) -> tuple[str, str]:
    return type(label).__name__, str(label)
