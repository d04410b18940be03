"""Streams: the same images as loaded data, shuffled by seed and epoch, in workers, resumed, and WebDataset files."""

import io
import itertools
import json
import tarfile

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_data import table, write_images
from torch.utils.data import DataLoader

from hf_featreuse.data import ImageCollator, TrainTransform, load_image_data
from hf_featreuse.data.streaming import _is_on_the_hub, stream_image_data
from hf_featreuse.errors import BadImageError, DataError


@pytest.fixture
def folder(tmp_path):
    for name, count in (("train", 12), ("validation", 4)):
        (tmp_path / "data").mkdir(exist_ok=True)
        table(count).to_parquet(str(tmp_path / "data" / f"{name}.parquet"))
    return str(tmp_path / "data")


def reds(items):
    return [item["pixel_values"][0, 0, 0].item() for item in items]


def test_a_stream_has_the_images_labels_and_classes_of_the_data(folder):
    streamed, loaded = stream_image_data(folder), load_image_data(folder)
    assert (streamed.label_names, streamed.name, streamed.problem_type) == (["no", "yes"], None, loaded.problem_type)
    assert sorted(reds(streamed.splits["train"])) == list(range(12))
    assert reds(streamed.splits["validation"]) == reds(loaded.splits["validation"])
    assert all(item["labels"] == red % 2 for item in streamed.splits["train"] for red in reds([item]))


def test_the_order_is_a_function_of_seed_and_epoch(folder):
    train = stream_image_data(folder, seed=1).splits["train"]
    first, again = reds(train), reds(train)
    assert first == again == reds(stream_image_data(folder, seed=1).splits["train"])
    train.set_epoch(1)
    assert sorted(reds(train)) == sorted(first) != reds(train) != first
    assert reds(stream_image_data(folder, seed=2).splits["train"]) != first
    assert len(reds(stream_image_data(folder, max_train_samples=5).splits["train"])) == 5


def test_random_transforms_repeat_and_change_with_the_epoch(folder):
    train = stream_image_data(folder).splits["train"].with_transform(TrainTransform((8, 8), seed=1))
    collate = ImageCollator((0, 0, 0), (1, 1, 1))
    batches = [torch.cat([b["pixel_values"] for b in DataLoader(train, 4, collate_fn=collate)]) for _ in range(2)]
    assert torch.equal(*batches)
    assert batches[0].shape == (12, 3, 8, 8)


def test_workers_read_each_image_once(folder):
    train = stream_image_data(folder).splits["train"]
    found = reds(itertools.chain(*DataLoader(train, 2, num_workers=1, collate_fn=list)))
    assert sorted(found) == list(range(12))


def test_class_ids_can_change(folder):
    validation = stream_image_data(folder).splits["validation"].with_class_ids([5, 3])
    assert [item["labels"] for item in validation] == [5, 3, 5, 3]
    assert [item["labels"] for item in validation.with_class_ids([0, 0, 0, 9, 0, 8])] == [8, 9, 8, 9]


def test_folders_of_images_can_be_streamed(tmp_path):
    data = stream_image_data(write_images(tmp_path / "photos", {"cat": 3, "dog": 2}))
    assert data.label_names == ["cat", "dog"]
    assert sorted(item["labels"] for item in data.splits["train"]) == [0, 0, 0, 1, 1]


def test_rows_that_name_other_files_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    (tmp_path / "data").mkdir()
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}], "label": [0]}
    stored = datasets.Dataset.from_dict(rows, features=features)
    described = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    pq.write_table(stored.data.table.replace_schema_metadata(described), tmp_path / "data" / "train.parquet")
    with pytest.raises(DataError, match=r"secret\.png.*outside it"):
        list(stream_image_data(str(tmp_path / "data"), splits=("train",)).splits["train"])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf://datasets/ada/photos@main/cat/1.png", True),
        ("zip://cat/1.png::hf://datasets/ada/photos@main/a.zip", True),
        ("/etc/passwd", False),
        ("/etc/hf://datasets/x", False),
        ("file:///etc/passwd::hf://datasets/ada/photos", False),
        ("hf://datasets/ada/photos::file:///etc/passwd", False),
        ("https://example.org/1.png", False),
        ("hf://ada/model/1.png", False),
    ],
)
def test_of_the_hub_only_files_of_data_sets_are_read(path, expected):
    assert _is_on_the_hub(path) is expected


def test_what_cannot_be_streamed_is_named(tmp_path, folder):
    with pytest.raises(DataError, match="Cannot load"):
        stream_image_data(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="no split 'train'"):
        stream_image_data(folder, splits=("test",))
    (tmp_path / "integers").mkdir()
    table(4, labels=[3, 1, 3, 1], feature=datasets.Value("int64")).to_parquet(str(tmp_path / "integers" / "a.parquet"))
    with pytest.raises(DataError, match="a stream needs class labels"):
        stream_image_data(str(tmp_path / "integers"))


def webdataset(folder, count=6):
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for i in range(count):
            image = io.BytesIO()
            Image.new("RGB", (4, 4), (i, 0, 0)).save(image, "PNG")
            for ending, content in (("png", image.getvalue()), ("cls", str(i % 3).encode())):
                info = tarfile.TarInfo(f"{i:04d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(folder)


def test_webdataset_files_are_loaded_by_their_usual_names(tmp_path):
    data = load_image_data(webdataset(tmp_path / "web"), cache_dir=str(tmp_path / "cache"), train_val_split=None)
    assert data.label_names == ["0", "1", "2"]
    split = data.splits["train"]
    assert sorted(reds(split)) == list(range(6))
    assert all(item["labels"] == red % 3 for item, red in zip(split, reds(split), strict=True))


def test_a_bad_image_is_named_by_its_place(tmp_path):
    photos = write_images(tmp_path / "photos", {"cat": 2, "dog": 2})
    (tmp_path / "photos" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"Cannot decode image \d of split 'train'"):
        list(stream_image_data(photos).splits["train"])
