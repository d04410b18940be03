"""Whose class ids the examples use if a trained head meets a data set: the head's, matched by name."""

from dataclasses import replace

import pytest
import torch
from image_classification import load_model
from image_classification_arguments import ModelArguments
from tiny_checkpoints import DIGITS, save
from transformers import AutoModelForImageClassification

from hf_featreuse import CheckpointError, ConfigurationError, DataError
from hf_featreuse.data import load_image_data

pytest.importorskip("sklearn", reason="the digits need the extra `examples`")
BACKWARDS = DIGITS[::-1]


@pytest.fixture
def data():
    """The digits as another data set might have them: the same classes in the opposite order."""
    digits = load_image_data(splits=("train", "validation"))
    order = list(range(9, -1, -1))
    splits = {name: split.with_class_ids(order) for name, split in digits.splits.items()}
    return replace(digits, splits=splits, label_names=BACKWARDS)


def written(data, split: str = "validation") -> list[str]:
    """The class of each image, by name."""
    return [data.label_names[label] for label in data.splits[split].labels]


def test_evaluation_matches_classes_by_name_and_leaves_the_model_as_it_is(data, tmp_path):
    folder = save(tmp_path / "model")
    expected = AutoModelForImageClassification.from_pretrained(folder)
    own, model, processor = load_model(ModelArguments(model_name_or_path=folder), data, trains=False)
    assert [model.config.id2label[index] for index in range(10)] == own.label_names == DIGITS
    assert written(own) == written(data)
    assert own.splits["validation"].labels.tolist() == [int(name) for name in written(data)]
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    assert processor.size["height"] == 8


def test_training_on_from_a_head_for_the_same_classes_keeps_their_order(data, tmp_path):
    folder = save(tmp_path / "model")
    own, model, _ = load_model(ModelArguments(model_name_or_path=folder), data, trains=True)
    assert [model.config.id2label[index] for index in range(10)] == own.label_names == DIGITS
    assert written(own, "train") == written(data, "train")


def test_training_on_other_classes_takes_those_of_the_data(data, tmp_path):
    folder = save(tmp_path / "model", labels=["cat", "dog"])
    options = ModelArguments(model_name_or_path=folder, ignore_mismatched_sizes=True)
    own, model, _ = load_model(options, data, trains=True)
    assert [model.config.id2label[index] for index in range(10)] == own.label_names == BACKWARDS
    with pytest.raises(ConfigurationError, match="--ignore_mismatched_sizes"):
        load_model(ModelArguments(model_name_or_path=folder), data, trains=True)


def test_evaluation_never_makes_or_suggests_a_new_head(data, tmp_path):
    folder = save(tmp_path / "pets", labels=["cat", "dog"])
    with pytest.raises(DataError, match="has 2 classes") as error:
        load_model(ModelArguments(model_name_or_path=folder), data, trains=False)
    assert "ignore_mismatched_sizes" not in str(error.value)
    model = AutoModelForImageClassification.from_pretrained(save(tmp_path / "model"))
    headless = tmp_path / "headless"
    model.vit.save_pretrained(headless)
    with pytest.raises(CheckpointError, match="lacks 2 weights"):
        load_model(ModelArguments(model_name_or_path=str(headless)), data, trains=False)
