"""Sources, splits, columns and labels."""

import logging
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_featreuse.data import load_image_data
from hf_featreuse.errors import BadImageError, DataError


def write_images(folder, counts: dict[str, int]) -> str:
    """One folder for each class, its images of one color each."""
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (5, 4), (i, len(label), 0)).save(folder / label / f"{i}.png")
    return str(folder)


def table(count: int = 10, image: str = "image", label: str | None = "label", labels=None, feature=None, more=None):
    """A data set of `count` images whose red is the row."""
    columns = {image: [np.full((2, 2, 3), i, np.uint8) for i in range(count)]}
    features = {image: datasets.Image()}
    if label is not None:
        columns[label] = [i % 2 for i in range(count)] if labels is None else labels
        features[label] = feature or datasets.ClassLabel(names=["no", "yes"])
    for name, (values, kind) in (more or {}).items():
        columns[name], features[name] = values, kind
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def saved(tmp_path, **splits) -> str:
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


def reds(split) -> list[int]:
    return [item["pixel_values"][0, 0, 0].item() for item in split]


# Sources


def test_digits_are_the_default_and_split_by_class():
    data = load_image_data()
    assert data.name == "scikit-learn digits"
    assert data.label_names == list("0123456789")
    train, validation = data.splits["train"], data.splits["validation"]
    assert (len(train), len(validation)) == (1437, 360)
    assert sorted([*train.rows, *validation.rows]) == list(range(1797))
    assert np.bincount(validation.labels).min() >= 34
    from sklearn.datasets import load_digits

    row = int(train.rows[5])
    assert train.labels[5] == load_digits().target[row]
    assert np.allclose(train[5]["pixel_values"][0] / 255, load_digits().images[row] / 16, atol=1 / 255)
    assert np.array_equal(load_image_data().splits["train"].rows, train.rows)
    assert not np.array_equal(load_image_data(seed=1).splits["train"].rows, train.rows)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"hf_featreuse\[plot\]"):
        load_image_data()


def test_image_folders(tmp_path):
    train = write_images(tmp_path / "train", {"cat": 6, "dog": 4})
    validation = write_images(tmp_path / "validation", {"cat": 1, "dog": 2})
    data = load_image_data(train_dir=train, validation_dir=validation, cache_dir=str(tmp_path / "cache"))
    assert data.name is None
    assert data.label_names == ["cat", "dog"]
    assert np.bincount(data.splits["train"].labels).tolist() == [6, 4]
    assert np.bincount(data.splits["validation"].labels).tolist() == [1, 2]
    assert data.splits["train"][0]["pixel_values"].shape == (3, 4, 5)


def test_a_corrupt_file_of_a_folder_is_named_or_left_out(tmp_path):
    train = write_images(tmp_path / "train", {"cat": 3, "dog": 3})
    bad = tmp_path / "train" / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    options = {"train_dir": train, "train_val_split": None, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(BadImageError, match=f"Cannot decode {bad} "):
        list(load_image_data(**options).splits["train"])
    split = load_image_data(**options, skip_bad_images=True).splits["train"]
    assert (len(list(split)), split.num_skipped) == (5, 1)


def test_rows_that_name_files_outside_the_folder_are_refused(tmp_path):
    """A Parquet file of a stranger could otherwise have any image of the machine read, or a pipe waited for."""
    outside = write_images(tmp_path / "outside", {"cat": 2})
    stored = [{"bytes": None, "path": f"{outside}/cat/{i}.png"} for i in range(2)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    (tmp_path / "data").mkdir()
    rows = datasets.Dataset.from_dict({"image": stored, "label": [0, 1]}, features=features)
    rows.to_parquet(str(tmp_path / "data" / "train.parquet"))
    options = {"cache_dir": str(tmp_path / "cache"), "train_val_split": None}
    with pytest.raises(DataError, match=r"names the file '.*/outside/cat/0.png', which is outside it"):
        load_image_data(str(tmp_path / "data"), **options)
    write_images(tmp_path / "data" / "images", {"cat": 2})
    inside = [{"bytes": None, "path": f"{tmp_path}/data/images/cat/{i}.png"} for i in range(2)]
    rows = datasets.Dataset.from_dict({"image": inside, "label": [0, 1]}, features=features)
    rows.to_parquet(str(tmp_path / "data" / "train.parquet"))
    assert reds(load_image_data(str(tmp_path / "data"), **options).splits["train"]) == [0, 1]


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "place", ["https://example.org/x.parquet", "hf://datasets/a/b/x.parquet", "../x.parquet", "/x.parquet", "z::x.zip"]
)
def test_a_data_card_that_names_files_outside_the_folder_is_refused(tmp_path, name, place):
    table(2).to_parquet(str(tmp_path / "train.parquet"))
    header = (
        f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [train.parquet, '{place}']\n"
    )
    (tmp_path / name).write_text(f"---\n{header}---\n" if name.endswith(".md") else header)
    with pytest.raises(DataError, match=rf"{name}` of data set .* under `configs`, which is not inside the folder"):
        load_image_data(str(tmp_path), cache_dir=str(tmp_path / "cache"))


def test_a_data_card_of_the_folder_itself_is_followed(tmp_path):
    table(4).to_parquet(str(tmp_path / "part.parquet"))
    header = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: part.parquet\n"
    (tmp_path / "README.md").write_text(f"---\n{header}---\n")
    assert len(load_image_data(str(tmp_path), cache_dir=str(tmp_path / "c"), train_val_split=0).splits["train"]) == 4


def test_tables_that_datasets_assigns_to_no_split_are_named(tmp_path, caplog):
    for name in ("view_train", "rest"):
        table(4).to_parquet(str(tmp_path / f"{name}.parquet"))
    data = load_image_data(str(tmp_path), cache_dir=str(tmp_path / "cache"), train_val_split=None)
    assert len(data.splits["train"]) == 4
    assert f"Left out of {tmp_path}: 1 that `datasets` assigns to no split: rest.parquet." in caplog.text


def test_a_folder_of_tables_whose_path_is_a_pattern_is_refused(tmp_path):
    (tmp_path / "c*d").mkdir()
    table(4).to_parquet(str(tmp_path / "c*d" / "train.parquet"))
    with pytest.raises(DataError, match=r"takes for a pattern or a URL. Rename the folder"):
        load_image_data(str(tmp_path / "c*d"), cache_dir=str(tmp_path / "cache"))


def test_a_local_folder_of_parquet_is_loaded_and_has_no_hub_name(tmp_path):
    (tmp_path / "data").mkdir()
    table().to_parquet(str(tmp_path / "data" / "train.parquet"))
    table(4).to_parquet(str(tmp_path / "data" / "test.parquet"))
    cache = str(tmp_path / "cache")
    data = load_image_data(str(tmp_path / "data"), cache_dir=cache, splits=("train", "validation", "test"))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 8, "validation": 2, "test": 4}
    assert data.name is None
    assert data.label_names == ["no", "yes"]
    assert "test" not in load_image_data(str(tmp_path / "data"), cache_dir=cache).splits


def test_a_single_saved_data_set_is_the_training_split(tmp_path):
    table().select([9, 8, 7, 6]).save_to_disk(str(tmp_path / "one"))
    split = load_image_data(str(tmp_path / "one"), train_val_split=0).splits["train"]
    assert reds(split) == [9, 8, 7, 6]
    assert split.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_dir": "no/such/folder"}, r"train_dir='no/such/folder' \(--train_dir\) is not a directory"),
        ({"validation_dir": "gone"}, "validation_dir='gone'"),
        ({"dataset_name": "x", "train_dir": "y"}, "dataset_name='x' and train_dir='y'"),
        ({"train_val_split": 1.0}, "train_val_split=1.0"),
        ({"train_val_split": -0.1}, "train_val_split=-0.1"),
        ({"max_train_samples": 0}, "max_train_samples=0"),
        ({"max_eval_samples": -3}, "max_eval_samples=-3"),
        ({"seed": -1}, "seed=-1"),
        ({"splits": "train"}, "splits='train'"),
        ({"splits": ("training",)}, "splits="),
        ({"splits": ("test",)}, "none of the splits"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(DataError, match=message):
        load_image_data(**options)


def test_a_missing_data_set_keeps_its_cause(tmp_path):
    name = str(tmp_path / "missing")
    with pytest.raises(DataError, match=f"Cannot load data set '{name}': ") as caught:
        load_image_data(name)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty` holds no images.*named after the class"):
        load_image_data(train_dir=str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"empty' holds no images and no Parquet or Arrow files"):
        load_image_data(str(tmp_path / "empty"))


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_an_empty_split_is_named(tmp_path, empty):
    for split in ("train", "validation"):
        table().select([] if split == empty else range(10)).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(DataError, match=f"Cannot load data set '{tmp_path}': .*\"{empty}\".* Is a split empty"):
        load_image_data(str(tmp_path), cache_dir=str(tmp_path / "cache"))


def test_an_empty_split_that_was_saved_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"Cannot load data set '.*saved': .* Is a split empty"):
        load_image_data(saved(tmp_path, train=table(), validation=table().select([])))
    path = str(tmp_path / "one shard")
    table().select([]).save_to_disk(path, num_shards=1)
    with pytest.raises(DataError, match=f"Split 'train' of data set '{path}' is empty"):
        load_image_data(path)


def test_trust_remote_code_logs_that_it_has_no_effect(caplog):
    load_image_data(trust_remote_code=True)
    assert "trust_remote_code has no effect" in caplog.text


# Splits


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_validation_splits_are_known_by_several_names(tmp_path, name):
    data = load_image_data(saved(tmp_path, train=table(), **{name: table(3)}))
    assert {part: len(split) for part, split in data.splits.items()} == {"train": 10, "validation": 3}


def test_validation_is_split_off_by_seed(tmp_path):
    name = saved(tmp_path, train=table(20))
    data = load_image_data(name)
    train, validation = data.splits["train"], data.splits["validation"]
    assert (len(train), len(validation)) == (17, 3)  # 15 % of 20
    assert sorted(reds(train) + reds(validation)) == list(range(20))
    assert reds(train) == train.rows.tolist()
    assert (train.labels == train.rows % 2).all()
    assert np.array_equal(load_image_data(name).splits["train"].rows, train.rows)
    assert not np.array_equal(load_image_data(name, seed=1).splits["train"].rows, train.rows)
    alone = load_image_data(name, splits=("validation",)).splits
    assert list(alone) == ["validation"]
    assert np.array_equal(alone["validation"].rows, validation.rows)


@pytest.mark.parametrize("fraction", [None, 0, 0.0])
def test_no_fraction_means_no_validation(tmp_path, fraction):
    assert list(load_image_data(saved(tmp_path, train=table()), train_val_split=fraction).splits) == ["train"]


def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"train_val_split=0.9 of the 2 rows .* leaves none"):
        load_image_data(saved(tmp_path, train=table(2)), train_val_split=0.9)


def test_a_missing_training_split_is_named(tmp_path):
    name = saved(tmp_path, test=table())
    with pytest.raises(DataError, match=r"no split 'train', only \['test'\]"):
        load_image_data(name)
    assert len(load_image_data(name, splits=("test",)).splits["test"]) == 10


def test_samples_are_drawn_by_seed(tmp_path):
    name = saved(tmp_path, train=table(30), validation=table(20))
    data = load_image_data(name, max_train_samples=12, max_eval_samples=7)
    rows = data.splits["train"].rows
    assert (len(rows), len(data.splits["validation"])) == (12, 7)
    assert sorted(rows) != list(range(12))
    assert len(set(rows)) == 12
    assert np.array_equal(rows, load_image_data(name, max_train_samples=20).splits["train"].rows[:12])
    assert not np.array_equal(rows, load_image_data(name, max_train_samples=12, seed=1).splits["train"].rows)


def test_more_samples_than_there_are_take_all_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = load_image_data(saved(tmp_path, train=table()), max_train_samples=99, train_val_split=None)
    assert len(data.splits["train"]) == 10
    assert "max_train_samples=99, but split 'train' has only 10 images" in caplog.text


# Columns


def test_columns_are_found_by_type(tmp_path):
    data = load_image_data(saved(tmp_path, train=table(image="scan", label="kind")), train_val_split=None)
    assert reds(data.splits["train"]) == list(range(10))
    assert data.label_names == ["no", "yes"]


def test_columns_are_taken_as_passed(tmp_path):
    again = ([np.full((2, 2, 3), 200 + i, np.uint8) for i in range(10)], datasets.Image())
    other = (list("ababababab"), datasets.Value("string"))
    name = saved(tmp_path, train=table(more={"second": again, "letter": other}))
    data = load_image_data(name, image_column_name="second", label_column_name="letter", train_val_split=None)
    assert reds(data.splits["train"])[0] == 200
    assert data.label_names == ["a", "b"]


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_column_that_does_not_exist_is_named_with_the_flag(tmp_path, kind):
    message = rf"{kind}_column_name='nope' \(--{kind}_column_name\) is not a column .*\['image', 'label'\]"
    with pytest.raises(DataError, match=message):
        load_image_data(saved(tmp_path, train=table()), **{f"{kind}_column_name": "nope"})


def test_several_image_columns_are_an_error(tmp_path):
    again = ([np.zeros((2, 2, 3), np.uint8)] * 10, datasets.Image())
    two = table(image="left", more={"right": again})
    with pytest.raises(DataError, match=r"several columns are of type an Image.*--image_column_name"):
        load_image_data(saved(tmp_path, train=two))


def test_no_label_column_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no column is of type a ClassLabel.*--label_column_name"):
        load_image_data(saved(tmp_path, train=table(label=None)))


def test_a_column_of_something_else_is_no_image_column(tmp_path):
    with pytest.raises(DataError, match=r"Column 'label' contains ClassLabel.*not images.*--image_column_name"):
        load_image_data(saved(tmp_path, train=table()), image_column_name="label")


def test_splits_with_other_classes_are_refused(tmp_path):
    other = table(feature=datasets.ClassLabel(names=["yes", "no"]))
    with pytest.raises(DataError, match="Column 'label' of split 'validation'"):
        load_image_data(saved(tmp_path, train=table(), validation=other))


# Labels


@pytest.mark.parametrize(
    ("values", "kind", "names", "ids"),
    [
        ([2, 0, 1, 0], "int64", ["0", "1", "2"], [2, 0, 1, 0]),
        ([30, 7, 30, 9], "int32", ["7", "9", "30"], [2, 0, 2, 1]),
        (["b", "c", "a", "b"], "string", ["a", "b", "c"], [1, 2, 0, 1]),
    ],
)
def test_integers_and_strings_become_classes(tmp_path, values, kind, names, ids):
    data = table(4, label="labels", labels=values, feature=datasets.Value(kind))
    loaded = load_image_data(saved(tmp_path, train=data), train_val_split=None)
    assert loaded.label_names == names
    assert loaded.splits["train"].labels.tolist() == ids


def test_a_class_absent_from_training_is_named(tmp_path, caplog):
    data = load_image_data(saved(tmp_path, train=table(3, labels=[0, 0, 0]), validation=table(2, labels=[1, 0])))
    assert data.splits["validation"].labels.tolist() == [1, 0]
    assert data.label_names == ["no", "yes"]
    assert "has the class yes, which the validation images have: the model cannot learn it" in caplog.text


def test_a_string_absent_from_training_is_an_error(tmp_path):
    text = datasets.Value("string")
    splits = {"train": table(2, labels=["a", "b"], feature=text), "dev": table(2, labels=["b", "z"], feature=text)}
    with pytest.raises(DataError, match=r"Row 1 of split 'dev' of data set .* has the label 'z', which is not one of"):
        load_image_data(saved(tmp_path, **splits))


@pytest.mark.parametrize("missing", [None, -1])
@pytest.mark.parametrize("feature", [datasets.ClassLabel(names=["no", "yes"]), datasets.Value("int64")])
def test_a_missing_label_is_an_error(tmp_path, missing, feature):
    data = table(4, labels=[0, 1, missing, 0], feature=feature)
    with pytest.raises(DataError, match=rf"Row 2 of split 'train' .* has no label: {missing}"):
        load_image_data(saved(tmp_path, train=data), train_val_split=None)


def test_labels_of_other_types_are_refused(tmp_path):
    data = table(2, labels=[b"a", b"b"], feature=datasets.Value("binary"))
    with pytest.raises(DataError, match=r"labels are class labels, integers or strings.*--label_column_name"):
        load_image_data(saved(tmp_path, train=data))
