"""A checkpoint that brings its own code is loaded without running it."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_featreuse import CheckpointError, WeightAverage
from hf_featreuse.cli import main
from hf_featreuse.hub.averaged import save_averaged
from hf_featreuse.small_models import small_config, small_image_processor

CODE = """
from pathlib import Path
from transformers import ViTConfig, ViTForImageClassification

Path({marker!r}).touch()

class OwnConfig(ViTConfig):
    model_type = {model_type!r}

class OwnModel(ViTForImageClassification):
    config_class = OwnConfig
"""


def small_vit() -> PreTrainedModel:
    """With the ten classes of the digits, so that every verb can do its work."""
    return AutoModelForImageClassification.from_config(small_config("vit", 8, num_labels=10))


@pytest.fixture(params=["vit", "of_its_own"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A ViT whose configuration names classes of a file next to it, under a known or a new model type."""
    folder = tmp_path / "checkpoint"
    model = small_vit()
    model.save_pretrained(folder)
    small_image_processor(model.config, model.config.image_size).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = request.param
    config["auto_map"] = {
        "AutoConfig": "own_code.OwnConfig",
        "AutoModelForImageClassification": "own_code.OwnModel",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code = CODE.format(marker=str(tmp_path / "ran"), model_type=request.param)
    (folder / "own_code.py").write_text(code, encoding="utf-8")
    return folder


def is_unknown(checkpoint: Path) -> bool:
    return "of_its_own" in (checkpoint / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", ["inspect", "analyze", "prune"])
def test_no_verb_runs_it(verb: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    further = {
        "inspect": [],
        "analyze": ["--output_dir", str(tmp_path / "out"), "--max_samples", "8", "--random_draws", "0"],
        "prune": ["--drop", "3", "--output_dir", str(tmp_path / "out")],
    }
    code = main([verb, str(checkpoint), *further[verb]])
    message = capsys.readouterr().err
    assert not (tmp_path / "ran").exists(), message
    if is_unknown(checkpoint):
        assert code == 1
        assert "trust_remote_code" in message or "of_its_own" in message
    else:
        assert code == 0, message


def test_a_push_of_averaged_weights_does_not_run_it(checkpoint: Path, tmp_path: Path) -> None:
    WeightAverage(small_vit(), decay=0.5).save(checkpoint)
    with pytest.raises(CheckpointError, match="cannot be loaded") if is_unknown(checkpoint) else nullcontext():
        save_averaged(checkpoint, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
