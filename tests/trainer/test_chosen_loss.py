"""Losses and class weights inside the Trainer: accumulation, mixing, evaluation, resume, and what is refused."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import batch, build, examples
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from training_runs import config, losses, options, same_bits, state_of, train

from hf_featreuse import BatchMixer, ConfigurationError, FeatureReuseConfig, FeatureReuseTrainer, mix_losses
from hf_featreuse.recipe.losses import ImageLoss
from hf_featreuse.trainer.class_weights import class_weights, labels_of

WEIGHTS = [0.2, 1.0, 3.0]
NAMES = ["a", "b", "c"]


def weighted(logits, labels):
    return (cross_entropy(logits, labels, reduction="none") * torch.tensor(WEIGHTS)[labels]).mean()


def binary(logits, labels):
    return binary_cross_entropy_with_logits(logits, one_hot(labels, 3).float())


def model_for(problem, outputs=3):
    model = build("vit")
    model.config.problem_type = problem
    if outputs == 1:
        model.classifier, model.num_labels = torch.nn.Linear(model.config.hidden_size, 1), 1
        model.config.id2label = {0: "value"}
    return model


def several(count=64):
    return [{**item, "labels": torch.tensor([i % 2, i % 3 == 0, 1.0])} for i, item in enumerate(examples(count))]


def values(count=64):
    return [{**item, "labels": float(i % 5)} for i, item in enumerate(examples(count))]


def trainer_of(folder, model=None, data=None, **changed):
    data = examples() if data is None else data
    return FeatureReuseTrainer(
        model or build("vit"), config(folder, **changed), train_dataset=data, eval_dataset=data[:8]
    )


def several_model():
    return model_for("multi_label_classification")


CASES = {
    "cross-entropy": (lambda: build("vit"), examples, {"loss": "cross_entropy", "class_weights": WEIGHTS}),
    "binary": (lambda: build("vit"), examples, {"loss": "bce", "label_smoothing_factor": 0.1}),
    "focal": (lambda: build("vit"), examples, {"loss": "focal", "class_weights": "balanced"}),
    "mixed": (lambda: build("vit"), examples, {"class_weights": WEIGHTS, "drop_granularity": "sample"}),
    "several": (several_model, several, {"loss": "bce"}),
    "several, focal": (
        several_model,
        several,
        {"loss": "focal", "focal_gamma": 1.0},
    ),
    "regression": (lambda: model_for("regression", 1), values, {"loss": "mse"}),
}


@pytest.mark.parametrize("name", CASES)
def test_accumulating_two_batches_of_four_is_one_of_eight(tmp_path, name):
    make_model, make_data, changed = CASES[name]
    runs = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        trainer = train(trainer_of(
            tmp_path, make_model(), make_data(), **changed, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation, max_steps=4, optim="sgd",
        ))  # fmt: skip
        runs.append((losses(trainer), state_of(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], tensor, rtol=1e-4, atol=1e-6)


def first_logits(model, data):
    model.train()
    with torch.no_grad():
        return model(torch.stack([item["pixel_values"] for item in data])).logits


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"class_weights": WEIGHTS}, weighted),
        ({"loss": "bce"}, binary),
        ({"loss": "focal", "focal_gamma": 1.5}, ImageLoss("focal", None, 1.5)),
        ({"loss": "cross_entropy"}, cross_entropy),
    ],
)  # fmt: skip
def test_the_first_loss_and_that_of_evaluation_are_the_chosen_ones(tmp_path, changed, expected):
    data = examples(8)
    trainer = trainer_of(tmp_path, data=data, drop_rate=0.0, per_device_train_batch_size=8, max_steps=1, **changed)
    logits, labels = first_logits(trainer.model, data), torch.tensor([item["labels"] for item in data])
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(float(expected(logits, labels)), rel=1e-5)
    assert losses(train(trainer)) == pytest.approx([found], rel=1e-5)


def test_mixed_images_have_the_loss_of_both_labels(tmp_path):
    data, seen = examples(8), []

    class Sees(FeatureReuseTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            labels = inputs["labels"]
            handle = self.model.register_forward_hook(lambda _, __, outputs: seen.append((outputs.logits, labels)))
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            handle.remove()
            seen[-1] += (loss.detach(),)
            return loss

    args = config(tmp_path, mixup_alpha=0.8, loss="focal", class_weights=WEIGHTS, max_steps=1, drop_rate=0.0)
    trainer = Sees(build("vit"), args, train_dataset=data)
    trainer.train()
    ((logits, labels, found),) = seen
    _, share = BatchMixer(0.8, 0.0, args.seed)(batch()["pixel_values"], 0)
    loss = ImageLoss("focal", WEIGHTS)
    torch.testing.assert_close(found, mix_losses(lambda y: loss(logits.detach(), y), labels, share))


def test_balanced_weights_count_the_training_labels(tmp_path):
    """Of a class with a tenth of the images, an image weighs nine times as much, and its gradient too."""
    data = [{**item, "labels": int(i >= 18)} for i, item in enumerate(examples(20))]
    trainer = trainer_of(tmp_path, data=data, class_weights="balanced", max_steps=1)
    outputs = {"logits": torch.zeros(2, 3)}
    rare, common = (trainer.compute_loss_func(outputs, torch.tensor([label, label])) for label in (1, 0))
    assert rare / common == pytest.approx(9)


def test_labels_are_found_in_any_data_set(tmp_path):
    items = examples(6)
    labels = [item["labels"] for item in items]

    class Own(torch.utils.data.Dataset):
        def __init__(self):
            self.labels = np.array(labels)

        def __getitem__(self, index):
            raise AssertionError("no image is read")

        def __len__(self):
            return len(labels)

    class Items(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return items[index]

        def __len__(self):
            return len(items)

    columns = Dataset.from_dict({"label": labels, "other": labels})
    for dataset in (items, Own(), Items(), columns):
        assert list(labels_of(dataset)) == labels
    with pytest.raises(ConfigurationError, match="stream"):
        labels_of(columns.to_iterable_dataset())
    with pytest.raises(ConfigurationError, match="needs `labels`"):
        labels_of([{"pixel_values": 0}])


def test_weights_come_from_numbers_and_files(tmp_path):
    def read(option, several=False):
        return class_weights(option, NAMES, lambda: np.array([0, 0, 1, 2]), several=several)

    assert read(["1", "2", "0.5"]) == read([1, 2, 0.5]) == [1.0, 2.0, 0.5]
    file = tmp_path / "weights.json"
    file.write_text("[1, 2, 0.5]")
    assert read(str(file)) == [1.0, 2.0, 0.5]
    file.write_text(json.dumps({"c": 4}))
    assert read(str(file)) == [1.0, 1.0, 4.0]
    assert read("balanced") == pytest.approx([2 / 3, 4 / 3, 4 / 3])
    file.write_text(json.dumps({"kat": 4}))
    with pytest.raises(ConfigurationError, match="names the class 'kat'"):
        read(str(file))
    file.write_text("nothing")
    with pytest.raises(ConfigurationError, match="cannot be read as JSON"):
        read(str(file))
    with pytest.raises(ConfigurationError, match="has 2 entries, but the model has 3 classes"):
        read([1, 2])


def test_resume_is_exact_and_a_changed_loss_is_reported(tmp_path, caplog):
    def run(folder, checkpoint=None, **changed):
        common = {"loss": "focal", "class_weights": "balanced", "save_strategy": "steps", "save_steps": 2}
        trainer = trainer_of(folder, **{**common, **changed})
        trainer.train(resume_from_checkpoint=checkpoint)
        return state_of(trainer.model)

    whole, checkpoint = run(tmp_path / "whole"), str(tmp_path / "whole" / "checkpoint-4")
    assert same_bits(run(tmp_path / "resumed", checkpoint), whole)
    with caplog.at_level("WARNING", logger="hf_featreuse"):
        assert not same_bits(run(tmp_path / "changed", checkpoint, loss="bce"), whole)
    assert "`loss='bce'` (before: 'focal')" in caplog.text


def test_the_same_weights_are_no_change(tmp_path, caplog):
    common = {"class_weights": (0.5, 1.0, 2.0), "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    train(trainer_of(tmp_path, **common))
    with caplog.at_level("WARNING", logger="hf_featreuse"):
        trainer_of(tmp_path, **common).train(resume_from_checkpoint=True)
    assert "changed" not in caplog.text


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"loss": "hinge"}, "`loss='hinge'` is unknown"),
        ({"focal_gamma": 1.0}, 'has an effect only with `loss="focal"`'),
        ({"loss": "focal", "focal_gamma": -1.0}, r"`focal_gamma=-1\.0`"),
        ({"class_weights": "no_such_file.json"}, "neither a file"),
        ({"class_weights": [1.0, -2.0]}, "not a list of numbers"),
        ({"loss": "mse", "mixup_alpha": 0.5}, "no labels to mix"),
        ({"loss": "mse", "class_weights": [1.0]}, "no classes to weigh"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(tmp_path, changed, match):
    with pytest.raises(ConfigurationError, match=match):
        FeatureReuseConfig(**options(tmp_path), **changed)


@pytest.mark.parametrize(
    ("model", "changed", "match"),
    [
        (lambda: build("vit"), {"loss": "mse"}, 'is for regression, but.*Pass "cross_entropy"'),
        (lambda: model_for("regression", 1), {"loss": "bce"}, 'is for classes, but.*Pass "mse"'),
        (lambda: model_for("regression", 1), {"class_weights": [1.0]}, "is for classes"),
        (several_model, {"loss": "cross_entropy"}, "one label per image"),
        (lambda: model_for("regression", 1), {"loss": "mse", "label_smoothing_factor": 0.1}, "Set it to 0"),
        (lambda: build("vit"), {"class_weights": [1.0, 2.0]}, "2 entries, but the model has 3 classes"),
    ],
)  # fmt: skip
def test_a_loss_that_does_not_suit_the_model_is_refused_at_construction(tmp_path, model, changed, match):
    with pytest.raises(ConfigurationError, match=match):
        trainer_of(tmp_path, model(), **changed)


def test_a_loss_of_the_users_own_is_not_overruled(tmp_path):
    with pytest.raises(ConfigurationError, match="`compute_loss_func` was passed together"):
        FeatureReuseTrainer(build("vit"), config(tmp_path, loss="bce"), compute_loss_func=lambda *_, **__: None)

    class Own(FeatureReuseTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    with pytest.raises(ConfigurationError, match=r"Own\.compute_loss"):
        Own(build("vit"), config(tmp_path, loss="focal"), train_dataset=examples()).train()


def test_evaluation_without_training_data_is_not_weighted(tmp_path, caplog):
    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path, class_weights="balanced"), eval_dataset=examples(8))
    plain = FeatureReuseTrainer(build("vit"), config(tmp_path), eval_dataset=examples(8))
    with caplog.at_level("WARNING", logger="hf_featreuse"):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    assert "no training data to count" in caplog.text
