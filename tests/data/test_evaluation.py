"""Which images a checkpoint is measured on, in which order, and whose class ids their labels are."""

import pytest
import torch
from tiny_checkpoints import DIGITS, save

from hf_featreuse.data import load_image_data
from hf_featreuse.data.evaluation import class_ids_of, class_notes, evaluation_loader, open_classifier
from hf_featreuse.errors import DataError

pytest.importorskip("sklearn", reason="the digits need the extra `examples`")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return open_classifier(save(tmp_path_factory.mktemp("models") / "tiny"))


def labels(opened, split, seed: int, max_samples: int = 1000, num_workers: int = 0) -> list[int]:
    options = {"batch_size": 100, "max_samples": max_samples, "seed": seed, "num_workers": num_workers}
    batches = evaluation_loader(opened, split, DIGITS, **options)
    return torch.cat([batch["labels"] for batch in batches]).tolist()


def test_order_is_random_and_depends_on_the_seed_alone(opened):
    split = load_image_data().splits["validation"]
    stored = split.labels.tolist()
    first, again, other = (labels(opened, split, seed) for seed in (1, 1, 2))
    assert sorted(first) == sorted(other) == sorted(stored)
    assert first == again != other
    assert stored not in (first, other)
    assert labels(opened, split, 1, max_samples=50) == first[:50]


def test_workers_give_the_same_batches(opened):
    split = load_image_data().splits["validation"]
    assert labels(opened, split, 1, num_workers=1) == labels(opened, split, 1)


@pytest.mark.parametrize(
    ("own", "data", "ids", "note"),
    [
        (["cat", "dog", "emu"], ["emu", "cat", "dog"], [2, 0, 1], ""),
        (["cat", "dog", "emu"], ["dog"], [1], ""),
        (["LABEL_0", "LABEL_1"], ["cat", "dog"], [0, 1], ""),
        (["chat", "chien"], ["cat", "dog"], [0, 1], "chat, chien and the data cat, dog"),
    ],
)
def test_classes_go_by_name_or_else_by_order(tmp_path, own, data, ids, note):
    opened = open_classifier(save(tmp_path / "pets", labels=own))
    assert class_ids_of(opened, data) == ids
    assert bool(note) == bool(class_notes(opened, data))
    assert note in "".join(class_notes(opened, data))


@pytest.mark.parametrize(
    ("own", "data"), [(["cat", "dog"], ["cat", "emu"]), (["cat", "dog", "emu"], ["a", "b"]), (["LABEL_0"], ["a", "b"])]
)
def test_classes_that_differ_are_refused(tmp_path, own, data):
    opened = open_classifier(save(tmp_path / "pets", labels=own))
    with pytest.raises(DataError, match=f"has {len(own)} class.* and the data {len(data)} "):
        class_ids_of(opened, data)
