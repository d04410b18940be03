"""Which rows validate: of each class its share, a function of the seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_featreuse.data.splitting import held_out_rows


def objects(values):
    found = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):
        found[row] = value
    return found


@pytest.mark.parametrize("names", [[0, 1, 2], ["a", "b", "c"], [True, False, None]])
def test_each_class_has_its_share(names):
    labels = objects([names[0]] * 60 + [names[1]] * 30 + [names[2]] * 10)
    rows = held_out_rows(labels, 20, seed=1)
    assert [sum(labels[row] is names[i] for row in rows) for i in range(3)] == [12, 6, 2]
    assert np.array_equal(rows, held_out_rows(labels, 20, seed=1))
    assert not np.array_equal(rows, held_out_rows(labels, 20, seed=2))
    # Within a class every row may be chosen.
    assert len({row for seed in range(60) for row in held_out_rows(labels, 20, seed) if row >= 90}) == 10


def test_classes_of_one_row_stay_in_training_as_long_as_that_is_possible():
    labels = objects([0] * 16 + [1, 2, 3, 4])
    assert set(labels[held_out_rows(labels, 3, seed=0)]) == {0}
    assert len(held_out_rows(objects([0, 1, 2, 3]), 2, seed=0)) == 2


def test_remainders_are_drawn_and_not_given_to_the_first_classes():
    labels = objects([i for i in range(10) for _ in range(3)])
    chosen = {label for seed in range(40) for label in labels[held_out_rows(labels, 4, seed)]}
    assert chosen == set(range(10))


@pytest.mark.parametrize("labels", [[0.5, 1.5, 2.5, 3.5], [[0], [0, 1], [], [1]]])
def test_labels_that_are_not_classes_are_drawn_from_all_rows(labels):
    found = held_out_rows(objects(labels), 2, seed=3)
    assert np.array_equal(found, np.sort(np.random.default_rng([3, 0]).permutation(4)[:2]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=60), st.data())
def test_any_labels(labels, data):
    count = data.draw(st.integers(1, len(labels) - 1))
    rows = held_out_rows(objects(labels), count, seed=0)
    assert len(rows) == count == len(set(rows.tolist()))
    assert np.array_equal(rows, np.sort(rows))
    sizes = np.bincount(labels, minlength=7)
    found = np.bincount(np.array(labels)[rows], minlength=7)
    # No class is more than a row from its share, unless it would be left without one to train on.
    spare = np.minimum(sizes - 1, np.ceil(sizes * count / len(labels)))
    if count <= np.maximum(sizes - 1, 0).sum():
        assert (found <= np.maximum(sizes - 1, 0)).all()
    if (spare >= sizes * count / len(labels) - 1e-9)[sizes > 0].all():
        assert (abs(found - sizes * count / len(labels)) < 1 + 1e-9).all()
