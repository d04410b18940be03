"""Predictions for image files."""

import csv
import json

import pytest
import torch
from PIL import Image
from tiny_checkpoints import save

from hf_featreuse import ConfigurationError, DataError
from hf_featreuse.data import EvalTransform, ImageCollator, open_classifier
from hf_featreuse.evaluation import predict_files


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return open_classifier(save(tmp_path_factory.mktemp("models") / "tiny", labels=["ant", "bee", "cat"]))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "deeper").mkdir(parents=True)
    for index, name in enumerate(("b.png", "a ü.JPG", "deeper/c.webp", "deeper/d, e.png")):
        Image.new("RGB", (20 + index, 16), (60 * index, 0, 9)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def rows_of(path):
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_rows_hold_the_probabilities_of_the_model(opened, folder, tmp_path, ending):
    done = predict_files(opened, [folder], tmp_path / f"out.{ending}", top_k=2, batch_size=3, disable_tqdm=True)
    rows = rows_of(done.output)
    files = [folder / name for name in ("a ü.JPG", "b.png", "deeper/c.webp", "deeper/d, e.png")]
    assert [row["file"] for row in rows] == [str(file) for file in files]
    transform, collator = EvalTransform(opened.processor), ImageCollator.from_processor(opened.processor)
    images = [Image.open(file).convert("RGB") for file in files]
    pixels = collator([{"pixel_values": transform(image), "labels": 0} for image in images])["pixel_values"]
    with torch.no_grad():
        scores, ids = opened.model(pixels).logits.softmax(-1).topk(2)
    for row, values, classes in zip(rows, scores.tolist(), ids.tolist(), strict=True):
        assert [row["label"], row["label_2"]] == [["ant", "bee", "cat"][index] for index in classes]
        assert [float(row["score"]), float(row["score_2"])] == pytest.approx(values, abs=1e-5)


def test_unreadable_images_are_reported_and_left_out(opened, folder, tmp_path):
    (folder / "cut.png").write_bytes((folder / "b.png").read_bytes()[:40])
    done = predict_files(opened, [folder], tmp_path / "out.csv", batch_size=1, disable_tqdm=True)
    assert done.count == 4 and len(rows_of(done.output)) == 4
    assert len(done.unreadable) == 1 and "cut.png" in done.unreadable[0]


def test_without_any_readable_image_there_is_no_file(opened, tmp_path):
    (tmp_path / "bad.png").write_text("no")
    with pytest.raises(DataError, match="None of the 1 files"):
        predict_files(opened, [tmp_path / "bad.png"], tmp_path / "out.csv", disable_tqdm=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.png"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output": "out.txt"}, ConfigurationError, "does not end in"),
        ({"output": "nowhere/out.csv"}, ConfigurationError, "folder that does not exist"),
        ({"output": "there.csv"}, ConfigurationError, "exists. Pass another file"),
        ({"top_k": 0}, ConfigurationError, "the model has 3 classes"),
        ({"top_k": 4}, ConfigurationError, "the model has 3 classes"),
        ({"batch_size": 0}, ConfigurationError, "not positive"),
        ({"files": ["missing.png"]}, DataError, "not a file or a directory"),
        ({"files": ["empty"]}, DataError, "holds no image"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    opened, folder, tmp_path, monkeypatch, options, error, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "empty").mkdir()
    options = {"files": [folder], "output": "out.csv", **options}
    with pytest.raises(error, match=message):
        predict_files(opened, disable_tqdm=True, **options)
    assert (tmp_path / "there.csv").read_text() == "mine" and not (tmp_path / "out.csv").exists()


def test_an_existing_file_is_replaced_if_asked(opened, folder, tmp_path):
    (tmp_path / "out.csv").write_text("old")
    predict_files(opened, [folder / "b.png"], tmp_path / "out.csv", overwrite=True, disable_tqdm=True)
    assert len(rows_of(tmp_path / "out.csv")) == 1
