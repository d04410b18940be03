"""A checkpoint that brings its own code is loaded without running it."""

import json
from pathlib import Path

import pytest
from tiny_models import build

from hf_featreuse.cli import main
from hf_featreuse.small_models import small_image_processor

CODE = """
from pathlib import Path
from transformers import ViTConfig, ViTForImageClassification

Path({marker!r}).touch()

class OwnConfig(ViTConfig):
    model_type = {model_type!r}

class OwnModel(ViTForImageClassification):
    config_class = OwnConfig
"""


@pytest.fixture(params=["vit", "of_its_own"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A ViT whose configuration names classes of a file beside it, under a known model type or one of its own."""
    folder = tmp_path / "checkpoint"
    model = build("vit")
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
    if "of_its_own" in (checkpoint / "config.json").read_text(encoding="utf-8"):
        assert code == 1
        assert "trust_remote_code" in message or "of_its_own" in message
