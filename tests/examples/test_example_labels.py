"""Whose class ids the examples use if a trained head meets a data set: the head's, matched by name."""

import json
from dataclasses import replace

import pytest
import run_image_classification
import run_image_classification_no_trainer
import torch
from PIL import Image
from tiny_checkpoints import DIGITS, save
from transformers import AutoModelForImageClassification

from hf_featreuse import CheckpointError, ConfigurationError, DataError
from hf_featreuse.cli import main
from hf_featreuse.data import EvalTransform, ImageCollator, in_order_of, load_image_data, open_classifier
from hf_featreuse.program import ModelArguments
from hf_featreuse.program.models import load_model

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


@pytest.fixture
def pets(tmp_path):
    """Nine images of ants and three of bees, as a training or validation folder has them."""
    for name, count in (("ant", 9), ("bee", 3)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (20 * index, 0, 0)).save(tmp_path / "pets" / name / f"{index}.png")
    return str(tmp_path / "pets")


def share_right(folder: str, pets: str) -> float:
    """The share of images that a checkpoint calls by the name of their folder."""
    opened = open_classifier(folder)
    split = load_image_data(train_dir=pets, train_val_split=None).splits["train"]
    batch = ImageCollator.from_processor(opened.processor)(list(split.with_transform(EvalTransform(opened.processor))))
    ids = opened.model(pixel_values=batch["pixel_values"]).logits.argmax(-1).tolist()
    names = [opened.model.config.id2label[index] for index in ids]
    return sum(name == ("ant" if row < 9 else "bee") for row, name in enumerate(names)) / 12


@pytest.mark.parametrize("labels", [["ant", "bee"], ["bee", "ant"], ["bee", "cat", "ant"]])
@pytest.mark.parametrize("example", [run_image_classification, run_image_classification_no_trainer])
def test_do_eval_matches_a_trained_head_by_name(example, labels, pets, tmp_path):
    folder, out = save(tmp_path / "model", labels=labels), str(tmp_path / "out")
    flags = ["--do_eval", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--output_dir", out]
    example.run(["--validation_dir", pets, "--model_name_or_path", folder, *flags])
    found = json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_accuracy"]
    assert found == pytest.approx(share_right(folder, pets))
    assert found != pytest.approx(0.5)


@pytest.mark.parametrize("example", [run_image_classification, run_image_classification_no_trainer])
def test_do_eval_refuses_classes_that_the_head_does_not_know(example, pets, tmp_path):
    folder, out = save(tmp_path / "model", labels=["ant", "cat"]), str(tmp_path / "out")
    flags = ["--do_eval", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--output_dir", out]
    with pytest.raises(DataError, match=r"has 2 classes .ant, cat. and the data 2 .ant, bee.") as error:
        example.run(["--validation_dir", pets, "--model_name_or_path", folder, *flags])
    assert "ignore_mismatched_sizes" not in str(error.value)


@pytest.mark.parametrize("labels", [["ant", "bee"], ["bee", "ant"]])
def test_prune_matches_a_trained_head_by_name(labels, pets, tmp_path, capsys):
    folder, out = save(tmp_path / "model", depth=3, labels=labels), str(tmp_path / "out")
    for part in ("train", "validation"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / part).symlink_to(pets)
    data = str(tmp_path / "data")
    assert main(["prune", folder, "--budget", "1", "--data", data, "--output_dir", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rounds"][-1]["score"]
    assert found == pytest.approx(share_right(out, pets))
    assert found != pytest.approx(0.5)


def test_training_further_keeps_the_order_of_a_head_for_the_same_classes(data):
    again = in_order_of(data, DIGITS)
    assert again.label_names == DIGITS
    assert written(again, "train") == written(data, "train")
    assert in_order_of(data, ["cat", "dog"]) is data
    assert in_order_of(data, [*DIGITS, "10"]) is data
