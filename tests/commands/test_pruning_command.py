"""`featreuse prune`."""

import json
from pathlib import Path

import pytest
import torch
from pruning_checks import assert_is_the_skipping_model
from tiny_models import build
from transformers import AutoConfig, AutoModelForImageClassification, ViTForImageClassification

from hf_featreuse import (
    CheckpointError,
    ConfigurationError,
    prune_blocks,
)
from hf_featreuse.cli import main
from hf_featreuse.pruning import saving
from hf_featreuse.small_models import small_config, small_image_processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A ViT for the digits, untrained, with its image processor."""
    folder = tmp_path_factory.mktemp("model") / "vit"
    names = [f"digit {index}" for index in range(10)]
    overrides = "hidden_size=16,num_hidden_layers=4,num_attention_heads=2"
    torch.manual_seed(0)
    config = small_config("vit", 8, 10, names, overrides)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    small_image_processor(config, 8).save_pretrained(folder)
    return str(folder)


def test_command_saves_an_ordinary_checkpoint(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "shallow"
    assert main(["prune", checkpoint, "--drop", "1,layers.3", "--output_dir", str(out)]) == 0
    text, err = capsys.readouterr()
    assert "4 residual blocks" in text
    assert f"saved in {out}: 2 residual blocks" in text
    assert err == ""
    config = AutoConfig.from_pretrained(out)
    assert config.num_hidden_layers == 2
    assert config.id2label[3] == "digit 3"
    loaded, report = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert type(loaded) is ViTForImageClassification
    assert not any(report.values())
    original = AutoModelForImageClassification.from_pretrained(checkpoint)
    names = ["vit.layers.1", "vit.layers.3"]
    assert_is_the_skipping_model(original, loaded, names, {"pixel_values": torch.randn(2, 3, 8, 8)})
    processor = "preprocessor_config.json"
    assert json.loads((out / processor).read_text()) == json.loads((Path(checkpoint) / processor).read_text())
    assert sorted(path.name for path in out.parent.iterdir()) == ["shallow"]


def test_command_chooses_by_accuracy(checkpoint, tmp_path, capsys):
    options = ["--budget", "2", "--data", "digits", "--max_eval_samples", "40", "--json"]
    assert main(["prune", checkpoint, *options, "--output_dir", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["blocks"] == {"before": 4, "after": 2}
    assert [round["blocks_left"] for round in report["rounds"]] == [3, 2]
    assert AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 2
    assert main(["prune", checkpoint, "--budget", "0.6", *options[2:], "--output_dir", str(tmp_path / "b")]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"][-1]["forward_share"] < 0.6


@pytest.mark.parametrize(
    "options, message",
    [
        (["--drop", "7"], "`drop` holds 7"),
        (["--keep", "nothing.*"], "matches no residual block"),
        (["--budget", "2"], "was passed without `--data`"),
        (["--budget", "two", "--data", "digits"], "`--budget two` is not a number"),
        (["--budget", "0", "--data", "digits"], "`budget=0`"),
        (["--budget", "2", "--data", "/nowhere"], "Cannot load data set '/nowhere'"),
    ],
)
def test_command_errors_are_one_line_and_leave_nothing(options, message, checkpoint, tmp_path, capsys):
    assert main(["prune", checkpoint, *options, "--output_dir", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("featreuse: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_a_folder_that_is_in_use(checkpoint, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    # Reported before anything is loaded.
    assert main(["prune", "no/such-model", "--drop", "1", "--output_dir", str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="is not empty"):
        saving.save_whole(build("vit"), None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_command_refuses_a_checkpoint_that_is_not_a_classifier(checkpoint, tmp_path, capsys):
    ViTForImageClassification.from_pretrained(checkpoint).vit.save_pretrained(tmp_path / "headless")
    assert main(["prune", str(tmp_path / "headless"), "--drop", "1", "--output_dir", str(tmp_path / "out")]) == 1
    assert "lacks 2 weights of ViTForImageClassification" in capsys.readouterr().err
    assert main(["prune", str(tmp_path / "none"), "--drop", "1", "--output_dir", str(tmp_path / "out")]) == 1
    assert "cannot be loaded as a trained image classifier" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_must_be_those_of_the_model(tmp_path, capsys):
    config = small_config("vit", 8, 3, None, "hidden_size=16,num_hidden_layers=2,num_attention_heads=2")
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "three")
    arguments = ["prune", str(tmp_path / "three"), "--budget", "1", "--data", "digits"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 1
    assert "no image processor" in capsys.readouterr().err
    small_image_processor(config, 8).save_pretrained(tmp_path / "three")
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 1
    assert "has 3 classes (LABEL_0, LABEL_1, LABEL_2) and the data 10" in capsys.readouterr().err


def test_a_failed_save_leaves_nothing(tmp_path):
    model = build("vit")
    pruned = prune_blocks(model, drop=[0])
    # The configuration does not match the weights, so the saved model cannot be loaded as this model.
    pruned.config.num_hidden_layers = 4
    with pytest.raises(CheckpointError, match="does not load as the same model"):
        saving.save_whole(pruned, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
