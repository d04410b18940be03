"""The model card shows what was stated, can be parsed and invents nothing."""

import os
import re
import socket
from typing import Any, cast

import numpy as np
import pytest
from hub_card_rules import card_problems
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tiny_models import build as build_model
from tiny_models import examples
from training_runs import config

from hf_featreuse import FeatureReuseArguments, FeatureReuseTrainer
from hf_featreuse.errors import ConfigurationError
from hf_featreuse.hub import build_model_card

TAGS = ["hf_featreuse", "feature-reuse", "stochastic-depth", "image-classification"]


@pytest.fixture(autouse=True)
def _empty_folder_and_no_network(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the card touched the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def results(card: ModelCard) -> list[EvalResult]:
    """Results in the metadata of the card's text."""
    return cast(ModelCardData, ModelCard(str(card)).data).eval_results or []


def build(**changes: Any) -> ModelCard:
    arguments: dict[str, Any] = {
        "model_name": "ada/vit-digits",
        "settings": {"drop_rate": 0.5, "drop_rate_schedule": "linear", "target_blocks": None},
        "metrics": {},
        "architecture": "ViTForImageClassification",
        "block_names": ["vit.layers.0", "vit.layers.1"],
        "training": {"learning_rate": 1e-3, "optim": "adamw_torch"},
    }
    return build_model_card(**{**arguments, **changes})


METRICS = {"eval_loss": 0.25, "eval_accuracy": 0.975, "eval_top5_accuracy": 1.0, "eval_runtime": 3.5, "epoch": 2.0}


def test_card_of_a_named_data_set_parses_back():
    card = build(
        dataset_name="uoft-cs/cifar10",
        dataset_split="test",
        metrics=METRICS,
        license="apache-2.0",
        base_model="google/vit-base-patch16-224",
        plot_file="training plot.png",
    )
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert str(again) == str(card)
    assert card_problems(str(card)) == []
    metadata = again.data.to_dict()
    assert metadata["tags"] == TAGS
    assert (metadata["pipeline_tag"], metadata["library_name"]) == ("image-classification", "transformers")
    assert (metadata["license"], metadata["base_model"]) == ("apache-2.0", "google/vit-base-patch16-224")
    assert (metadata["datasets"], metadata["metrics"]) == (["uoft-cs/cifar10"], ["accuracy"])
    assert metadata["model-index"][0]["name"] == "vit-digits"
    found = {result.metric_type: result.metric_value for result in results(again)}
    assert found == {"loss": 0.25, "accuracy": 0.975, "top5_accuracy": 1.0}
    for result in results(again):
        assert (result.task_type, result.dataset_type, result.dataset_split) == (
            "image-classification",
            "uoft-cs/cifar10",
            "test",
        )
    for words in (
        "fine-tuned from [google/vit-base-patch16-224](https://huggingface.co/google/vit-base-patch16-224)",
        "on [uoft-cs/cifar10](https://huggingface.co/datasets/uoft-cs/cifar10)",
        "the `test` split",
        "| Accuracy (top-1) | 97.50 % |",
        "| Loss | 0.25 |",
        "](training%20plot.png)",
        'repository = "ada/vit-digits"\nclassifier = pipeline("image-classification", model=repository)',
        "| `drop_rate` | 0.5 | probability",
        "| `target_blocks` | none given |",
        "| `learning_rate` | 0.001 |",
        "`vit.layers.0`, `vit.layers.1`",
        "2411.09475",
        "- transformers ",
    ):
        assert words in card.text
    assert "runtime" not in str(card) and "epoch" not in str(card)


def test_training_from_scratch_on_a_folder_invents_nothing(tmp_path):
    (tmp_path / "photos").mkdir()
    for dataset_name in (None, "", str(tmp_path), "./photos", "photos", "../photos", r"C:\photos"):
        card = build(dataset_name=dataset_name, metrics=METRICS)
        metadata = card.data.to_dict()
        assert not {"model-index", "datasets", "base_model", "license", "model_name"} & set(metadata)
        assert (
            f"trained from scratch on {'a local data set' if dataset_name else 'data that is not named'}" in card.text
        )
        assert "| Accuracy (top-1) | 97.50 % |" in card.text
        assert "photos" not in str(card) and str(tmp_path) not in str(card)
        assert "]()" not in str(card) and "None" not in str(card) and "co/)" not in str(card)


def test_plain_name_is_not_linked():
    card = build(dataset_name="handwritten digits of scikit-learn", metrics={"accuracy": 0.9})
    assert "from scratch on handwritten digits of scikit-learn with" in card.text
    assert "datasets" not in card.data.to_dict()
    assert [(result.dataset_name, result.dataset_type) for result in results(card)] == [
        ("handwritten digits of scikit-learn", "handwritten-digits-of-scikit-learn")
    ]


def test_local_weights_are_not_named(tmp_path):
    card = build(base_model=str(tmp_path / "weights"))
    assert "fine-tuned from local weights" in card.text
    assert "base_model" not in card.data.to_dict() and str(tmp_path) not in str(card)


def test_name_of_a_path_is_its_last_part(tmp_path):
    card = build(model_name=str(tmp_path / "vit-digits") + os.sep, plot_file=tmp_path / "training.png")
    assert "# vit-digits\n" in card.text
    assert 'repository = "vit-digits"' in card.text and "](training.png)" in card.text
    assert str(tmp_path) not in str(card)


PLAIN = [TAGS[0], TAGS[3]]
STEPS = ("*stochastic-depth*", "*masked-freeze*")


@pytest.mark.parametrize(
    ("settings", "tags", "present", "absent"),
    [
        ({}, TAGS, ["two kinds of step", *STEPS], ["outside", "scaled", "divided", "plain"]),
        ({"train_trunk": True}, TAGS, ["of that set and the layers outside the residual blocks are trained"], []),
        ({"train_trunk": False}, TAGS, ["only the blocks of that set are trained"], ["outside"]),
        ({"train_trunk": "all"}, TAGS, ["of that set and the layers outside the residual blocks are trained"], []),
        ({"train_trunk": "head"}, TAGS, ["of that set and the layers after the last block are trained"], ["outside"]),
        ({"train_trunk": "none"}, TAGS, ["only the blocks of that set are trained"], ["outside"]),
        ({"masked_freeze_steps": 0}, [TAGS[0], *TAGS[2:]], ["In each *stochastic-depth*"], [STEPS[1], "ResidualDrop"]),
        ({"stochastic_depth_steps": 0}, PLAIN, ["In each *masked-freeze*", "if the set is empty"], [STEPS[0]]),
        ({"stochastic_depth_steps": 0, "masked_freeze_steps": 0}, PLAIN, ["trained in the usual way"], [*STEPS]),
        ({"drop_rate": 0.0, "vanilla_steps": 2, "reuse_end": 0.5}, PLAIN, ["in the usual way"], [*STEPS, "begins"]),
        ({"vanilla_steps": 1}, TAGS, ["Each cycle begins with 1 plain step."], []),
        (
            {"vanilla_steps": 3, "stochastic_depth_steps": 0},
            PLAIN,
            ["Each cycle begins with 3 plain steps. In each *masked-freeze*"],
            ["two kinds"],
        ),
        ({"scale_kept": True}, TAGS, ["adds to its input is divided by the probability that it is kept"], ["scaled"]),
        ({"scale_kept": False}, TAGS, ["adds to its input is not scaled"], ["divided"]),
        ({"scale_kept": True, "stochastic_depth_steps": 0}, PLAIN, [], ["divided", "scaled"]),
        ({"drop_rate_over_time": "constant", "reuse_start": 0.0, "reuse_end": 1.0}, TAGS, [], ["linearly", " % of"]),
        ({"drop_rate_over_time": "rising"}, TAGS, ["rises linearly from 0 over training."], ["plain"]),
        (
            {"drop_rate_over_time": "falling", "reuse_end": 0.175},
            TAGS,
            [
                "This holds from 0 % to 17.5 % of training; all other steps are plain.",
                "falls linearly to 0 over this part",
            ],
            ["rises"],
        ),
        ({"reuse_start": 0.2}, TAGS, ["from 20 % to 100 % of training; all other steps are plain"], ["linearly"]),
        ({"drop_granularity": "sample"}, TAGS, ["Each sample of a batch has its own set."], []),
        ({"drop_granularity": "batch"}, TAGS, [], ["Each sample"]),
    ],
    ids=str,
)
def test_the_method_describes_the_steps_that_took_place(settings, tags, present, absent):
    card = build(settings=settings)
    assert card.data.to_dict()["tags"] == tags
    # Without the table of settings, whose meanings name everything.
    text = card.text.partition("## Method")[2].partition("| setting |")[0].partition("<details>")[0]
    assert [words for words in present if words not in text] == []
    assert [words for words in absent if words in text] == []
    assert "Evaluation and prediction use the whole network." in text or "usual way" in text


def test_every_option_has_a_meaning():
    settings = FeatureReuseArguments().settings()
    card = build(settings=settings)
    explained = re.findall(r"^\| `(\w+)` \| [^|]+ \| \w[^|]+ \|$", card.text, flags=re.MULTILINE)
    assert explained == list(settings)
    assert "| `train_trunk` | all |" in card.text and "| `scale_kept` | True |" in card.text


def test_values_that_would_break_the_card_are_tamed():
    card = build(
        dataset_name="ada/digits",
        metrics={"eval_accuracy": np.float32(0.5), "eval_loss": float("nan")},
        training={"note": "a|b\nc", "template": "{{ card_data }}"},
    )
    again = ModelCard(str(card))
    assert [result.metric_type for result in results(again)] == ["accuracy"]
    assert "| Loss | nan |" in card.text
    assert "| `note` | a\\|b c |" in card.text and "| `template` | {{ card_data }} |" in card.text


def test_empty_parts_are_left_out():
    card = build(settings={}, block_names=[], training={})
    assert "No evaluation was recorded." in card.text and "No hyperparameters were recorded." in card.text
    assert "<details>" not in card.text and "![" not in card.text and "| setting |" not in card.text


def test_unusable_arguments_are_refused():
    with pytest.raises(ConfigurationError, match="does not name a model"):
        build(model_name=" ")
    with pytest.raises(ConfigurationError, match="eval_accuracy='high'"):
        build(metrics={"eval_accuracy": "high"})


def test_a_card_without_a_record_says_nothing_of_training():
    card = build(settings=None, block_names=[], training={})
    assert "An image classifier (`ViTForImageClassification`).\n" in card.text
    assert "was not recorded" in card.text and "## Versions" not in card.text
    for claim in ("from scratch", "local data set", "*stochastic-depth*"):
        assert claim not in card.text
    assert card.data.to_dict()["tags"] == ["hf_featreuse", "image-classification"]
    assert card_problems(str(card)) == []


def test_an_adapter_is_called_one():
    card = build(adapter="LORA", base_model="google/vit-base-patch16-224", dataset_name="ada/digits", metrics=METRICS)
    metadata = card.data.to_dict()
    assert (metadata["library_name"], metadata["base_model"]) == ("peft", "google/vit-base-patch16-224")
    assert {"lora", "base_model:adapter:google/vit-base-patch16-224"} <= set(metadata["tags"])
    assert "A LORA adapter for an image classifier" in card.text and "- peft " in card.text
    assert "PeftModel.from_pretrained(model, repository)" in card.text
    assert card_problems(str(card)) == []
    local = build(adapter="LORA", base_model="./weights")
    assert "base_model" not in local.data.to_dict() and "./weights" not in str(local)


def test_the_rules_of_the_hub_are_not_always_met():
    good = str(build(dataset_name="ada/digits", metrics=METRICS, license="apache-2.0"))
    for line, bad in {
        "license: apache-2.0": "license: My own",
        "  - task:": "  - job:",
        "      value: 0.25": "      value: .nan",
        "- ada/digits": "- ada/digits/x",
        "pipeline_tag: image-classification": "base_model: /home/ada/weights",
    }.items():
        assert line in good
        assert card_problems(good.replace(line, bad, 1)), bad
    assert card_problems("# no metadata")


def test_the_recipe_is_listed_if_it_is_used(tmp_path):
    for changed, listed in (({}, False), ({"mixup_alpha": 0.8, "ema_decay": 0.99}, True)):
        trainer = FeatureReuseTrainer(
            build_model("vit"), config(tmp_path, **changed), train_dataset=examples(), eval_dataset=examples(4)
        )
        trainer.train()
        trainer.create_model_card()
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert ("mixup_alpha" in card and "ema_decay" in card) == listed
        assert "cutmix_alpha" not in card


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
def test_gradual_unfreezing_is_described(drop_rate):
    from hf_featreuse.hub.card_text import method_text

    said = method_text({"drop_rate": drop_rate, "unfreeze_at": 0.3}, 4)
    assert "until everything was trained from 30 % of training on" in said
    assert "At first" not in method_text({"drop_rate": drop_rate, "unfreeze_at": None}, 4)
