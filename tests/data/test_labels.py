"""Several labels per image and values to predict: which columns are read so, and what comes out."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, List, Value
from PIL import Image
from test_data import saved, table

from hf_featreuse.data import ImageCollator, load_image_data
from hf_featreuse.errors import DataError

SEVERAL = [[0], [1, 2], [], [0, 2]]
HOT = [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 1]]
MULTI, REGRESSION = "multi_label_classification", "regression"


def loaded(tmp_path, labels, feature, **options):
    data = saved(tmp_path, train=table(len(labels), labels=labels, feature=feature))
    return load_image_data(data, train_val_split=None, **options)


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        (SEVERAL, List(ClassLabel(names=["a", "b", "c"])), ["a", "b", "c"]),
        (SEVERAL, List(Value("int64")), ["0", "1", "2"]),
        ([["x"], ["y", "z"], [], ["x", "z"]], List(Value("string")), ["x", "y", "z"]),
        (HOT, List(Value("int8")), ["0", "1", "2"]),
        (HOT, List(Value("int8"), length=3), ["0", "1", "2"]),
        (HOT, List(Value("float32")), ["0", "1", "2"]),
        ([[bool(x) for x in row] for row in HOT], List(Value("bool")), ["0", "1", "2"]),
    ],
)
def test_lists_are_several_labels(tmp_path, labels, feature, names):
    data = loaded(tmp_path, labels, feature)
    assert (data.problem_type, data.label_names) == (MULTI, names)
    split = data.splits["train"]
    assert split.labels.dtype == np.float32
    assert split.labels.tolist() == HOT
    batch = ImageCollator((0, 0, 0), (1, 1, 1))([split[i] for i in range(4)])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == HOT
    swapped = split.with_class_ids([2, 0, 1], 4)
    assert swapped.labels.tolist() == [[b, c, a, 0] for a, b, c in HOT]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_floating_point_numbers_are_a_regression(tmp_path, dtype):
    data = loaded(tmp_path, [0.5, 2.0, -100.0, 3.0], Value(dtype))
    assert (data.problem_type, data.label_names) == (REGRESSION, ["label"])
    split = data.splits["train"]
    assert [item["labels"] for item in split] == [0.5, 2.0, -100.0, 3.0]
    batch = ImageCollator((0, 0, 0), (1, 1, 1))([split[i] for i in range(4)])
    assert (batch["labels"].dtype, tuple(batch["labels"].shape)) == (torch.float32, (4,))


def test_the_only_list_of_class_labels_is_found(tmp_path):
    data = table(4, label="attributes", labels=SEVERAL, feature=List(ClassLabel(names=["a", "b", "c"])))
    assert load_image_data(saved(tmp_path, train=data), train_val_split=None).problem_type == MULTI


def test_classes_are_read_as_before(tmp_path):
    data = loaded(tmp_path, [3, 1, 3, 7], Value("int64"))
    assert (data.problem_type, data.label_names) == ("single_label_classification", ["1", "3", "7"])
    assert data.splits["train"].labels.tolist() == [1, 0, 1, 2]


def test_a_metadata_file_may_hold_values(tmp_path):
    for i in range(4):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    lines = ["file_name,label", *(f"{i}.png,{i / 2}" for i in range(4))]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    data = load_image_data(str(tmp_path), train_val_split=0.25)
    assert data.problem_type == REGRESSION
    assert sorted([*data.splits["train"].labels, *data.splits["validation"].labels]) == [0.0, 0.5, 1.0, 1.5]


def test_the_rows_of_validation_are_selected_with_their_labels(tmp_path):
    data = load_image_data(saved(tmp_path, train=table(8, labels=SEVERAL * 2, feature=List(Value("int64")))))
    for split in data.splits.values():
        assert split.labels.tolist() == [HOT[row % 4] for row in split.rows]


@pytest.mark.parametrize(
    ("labels", "feature", "match"),
    [
        ([[0.5, 0.1], [1.0, 0.0]], List(Value("float32")), "lists of numbers other than"),
        ([[0], None], List(Value("int64")), "Row 1 of split 'train'.* has no labels: None"),
        ([0.5, None], Value("float32"), "Row 1 of split 'train'.*holds None, not a number"),
        ([0.5, float("nan")], Value("float32"), "holds nan, not a number"),
        ([{"a": 1}, {"a": 2}], {"a": Value("int64")}, "lists of them, or numbers to predict"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path, labels, feature, match):
    with pytest.raises(DataError, match=match):
        loaded(tmp_path, labels, feature)


@pytest.mark.parametrize(
    ("train", "validation", "feature", "match"),
    [
        ([["x"], ["y"]], [["x"], ["w"]], List(Value("string")), "'w', which is not one of the training labels"),
        ([[1, 0], [0, 1]], [[1, 0], [0, 1, 1]], List(Value("int64")), "2 zeros and ones per image"),
    ],
)
def test_labels_of_validation_that_training_lacks_are_named(tmp_path, train, validation, feature, match):
    splits = {
        name: table(2, labels=labels, feature=feature) for name, labels in (("train", train), ("test", validation))
    }
    with pytest.raises(DataError, match=match):
        load_image_data(saved(tmp_path, **splits), splits=("train", "test"), train_val_split=None)


def test_a_label_that_no_training_image_has_is_reported(tmp_path, caplog):
    feature = List(ClassLabel(names=["a", "b", "c"]))
    train, validation = (table(2, labels=labels, feature=feature) for labels in ([[0], [1]], [[0], [2]]))
    load_image_data(saved(tmp_path, train=train, validation=validation))
    assert "No training image" in caplog.text
    assert "has the class c" in caplog.text
