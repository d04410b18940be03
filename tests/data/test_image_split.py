"""Items, workers, epochs, and images that cannot be decoded."""

import io
import logging
import pickle

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image

from hf_featreuse.data import load_image_data
from hf_featreuse.data.image_split import ImageSplit
from hf_featreuse.data.images import ImageCollator
from hf_featreuse.data.transforms import TrainTransform
from hf_featreuse.errors import BadImageError, DataError

COLLATOR = ImageCollator((0, 0, 0), (1, 1, 1))


@pytest.fixture(scope="module")
def digits():
    return load_image_data(max_train_samples=40).splits["train"]


def png(value: int, side: int = 6) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def split_of(stored: list, **options) -> ImageSplit:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    images = datasets.Dataset.from_dict({"image": stored}, features=features)
    count = np.arange(len(stored))
    return ImageSplit(images, count, count, "train", "data set 'made up'", **options)


def batches(split, workers: int = 0, **options):
    return torch.utils.data.DataLoader(split, batch_size=8, collate_fn=COLLATOR, num_workers=workers, **options)


def test_items_come_from_the_rows_given():
    split = split_of([{"bytes": png(value), "path": None} for value in range(5)])
    split = ImageSplit(split._images, np.array([3, 1]), np.array([7, 8]), "train", "here")
    assert len(split) == 2
    assert [(item["pixel_values"][0, 0, 0].item(), item["labels"]) for item in split] == [(3, 7), (1, 8)]
    assert split[1]["pixel_values"].dtype == torch.uint8
    assert isinstance(split[1]["labels"], int)


def test_a_plain_function_serves_as_transform(digits):
    split = digits.with_transform(lambda image: torch.full((3, 1, 1), image.width, dtype=torch.uint8))
    assert split[0]["pixel_values"].unique().tolist() == [8]
    assert digits[0]["pixel_values"].shape == (3, 8, 8)


def test_augmentation_depends_on_row_and_epoch_alone(digits):
    split = digits.with_transform(TrainTransform((8, 8)))
    reversed_split = ImageSplit(
        split._images, split.rows[::-1], split.labels[::-1], "train", "digits", TrainTransform((8, 8))
    )
    first = [item["pixel_values"] for item in split]
    assert all(map(torch.equal, first, reversed([item["pixel_values"] for item in reversed_split])))
    split.set_epoch(1)
    assert not all(map(torch.equal, first, [item["pixel_values"] for item in split]))
    assert all(map(torch.equal, first, reversed([item["pixel_values"] for item in reversed_split])))


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_epoch_and_do_not_change_the_batches(digits, persistent):
    alone, worked = digits.with_transform(TrainTransform((8, 8))), digits.with_transform(TrainTransform((8, 8)))
    loader = batches(worked, 2, persistent_workers=persistent)
    seen = []
    for epoch in range(3):
        alone.set_epoch(epoch)
        worked.set_epoch(epoch)
        seen.append([batch["pixel_values"] for batch in loader])
        assert all(map(torch.equal, seen[-1], [batch["pixel_values"] for batch in batches(alone)]))
    assert not torch.equal(seen[1][0], seen[2][0])


def test_accelerate_passes_the_epoch_on(digits):
    split = digits.with_transform(TrainTransform((8, 8)))
    loader = prepare_data_loader(batches(split), put_on_device=False)
    for epoch in (4, 0):
        loader.set_epoch(epoch)
        next(iter(loader))
        assert int(split._epoch) == epoch


def test_a_split_survives_pickling(digits):
    split = digits.with_transform(TrainTransform((8, 8)))
    split.set_epoch(3)
    copied = pickle.loads(pickle.dumps(split))
    assert torch.equal(copied[5]["pixel_values"], split[5]["pixel_values"])


BAD = {
    "not an image": (
        {"bytes": b"hello", "path": "a.png"},
        "it is damaged, or not a JPEG, PNG, WebP, BMP, GIF or TIFF file",
    ),
    "truncated": ({"bytes": png(3, 40)[:70], "path": None}, "truncated"),
    "null": (None, "the row holds no image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_by_split_row_and_source(kind):
    bad, reason = BAD[kind]
    split = split_of([{"bytes": png(0), "path": None}, bad])
    assert split[0]["labels"] == 0
    message = rf"row 1 of split 'train' of data set 'made up': .*{reason}.*--skip_bad_images"
    with pytest.raises(BadImageError, match=message) as caught:
        split[1]
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_missing_file_is_named_by_its_path(tmp_path):
    path = str(tmp_path / "gone.png")
    with pytest.raises(BadImageError, match=f"Cannot decode {path} .row 0 of split 'train'.*No such file"):
        split_of([{"bytes": None, "path": path}])[0]


def test_an_oversized_image_is_a_bad_image(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadImageError, match=r"row 0 .* exceeds limit"):
        split_of([{"bytes": png(0), "path": None}])[0]


def test_the_message_survives_a_worker():
    split = split_of([{"bytes": png(0), "path": None}, {"bytes": b"hello", "path": None}])
    batch = iter(batches(split, 1))
    with pytest.raises(
        BadImageError, match="row 1 of split 'train' of data set 'made up': it is damaged, or not a JPEG"
    ):
        next(batch)
    assert list(batch) == []  # ends the worker at once


def test_bad_images_are_left_out_counted_and_listed(tmp_path, caplog):
    good = {"bytes": png(9), "path": None}
    split = split_of([BAD["null"][0], good, {"bytes": None, "path": str(tmp_path / "gone.png")}] + [good] * 100)
    with caplog.at_level(logging.WARNING):
        kept = split.without_bad_images()
    assert (len(split), split.num_skipped) == (103, 0)
    assert (len(kept), kept.num_skipped) == (101, 2)
    assert kept.rows[:2].tolist() == kept.labels[:2].tolist() == [1, 3]
    assert next(item["labels"] for item in batches(kept))[:2].tolist() == [1, 3]
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "Left out 2 of 103 images of split 'train' of data set 'made up'" in message
    assert f"{tmp_path / 'gone.png'} (row 2" in message
    assert "the image in row 0 of split 'train'" in message


def test_the_warning_lists_ten(caplog):
    split_of([{"bytes": b"", "path": None}] * 12 + [{"bytes": png(0), "path": None}]).without_bad_images()
    message = caplog.records[-1].getMessage()
    assert "row 9 " in message
    assert "row 10 " not in message
    assert message.endswith("...")


def test_nothing_is_left_out_of_good_data(digits, caplog):
    kept = digits.without_bad_images()
    assert np.array_equal(kept.rows, digits.rows)
    assert not caplog.records


def test_only_bad_images_are_an_error():
    with pytest.raises(DataError, match="None of the 2 images of split 'train'"):
        split_of([None, None]).without_bad_images()
