"""Exports of tiny models: files, logits, batches of any size, and what is refused."""

import importlib.util
import json

import pytest
import torch
import transformers
from tiny_models import batch, build
from torch import nn

from hf_featreuse import CheckpointError, ConfigurationError, IncompatibleVersionError
from hf_featreuse.cli import main
from hf_featreuse.evaluation import export_model, exporting
from hf_featreuse.evaluation.exporting import FORMATS
from hf_featreuse.small_models import small_image_processor

OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
needs_exporters = pytest.mark.skipif(OLD, reason="transformers before 5.23 cannot save and run exports")


def each_format():
    """Every format; skipped if its packages are not installed."""
    for name, packages in FORMATS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        skip = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")
        yield pytest.param(name, marks=skip)


def refuse_to_be_called(*args, **options):
    raise AssertionError("Nothing may be loaded or traced before the options are checked.")


@pytest.mark.slow
@needs_exporters
@pytest.mark.parametrize("format", each_format())
def test_an_export_gives_the_logits_for_any_batch(format, tmp_path):
    from transformers.exporters.base import ExportedModel

    model = build("vit").eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    exported = export_model(model, format, tmp_path / "out", repeats=3)
    assert exported.difference <= 1e-5 * exported.largest_logit
    assert exported.model_ms > 0 < exported.export_ms
    assert exported.files == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    again = ExportedModel.from_pretrained(tmp_path / "out", device="cpu", trust_remote_code=True)
    for size in (1, 7):
        inputs = {"pixel_values": batch(size, seed=size)["pixel_values"]}
        with torch.no_grad():
            expected = model(**inputs).logits
        # OpenVINO computes in bfloat16 if the processor can, unless it is told otherwise.
        atol = 0.05 if format == "openvino" else 1e-4
        torch.testing.assert_close(again(**inputs).logits, expected, atol=atol, rtol=0)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
@needs_exporters
def test_command_writes_an_export_with_its_processor(tmp_path, capsys):
    # A name with a space and letters of other scripts.
    folder = tmp_path / "mein Modell ü 模型"
    model = build("resnet")
    model.save_pretrained(folder)
    small_image_processor(model.config, 32).save_pretrained(folder)
    out = tmp_path / "neu ß" / "export"
    arguments = ["export", str(folder), "--format", "dynamo", "--repeats", "2", "--output_dir", str(out)]
    capsys.readouterr()
    assert main(arguments) == 0
    text, err = capsys.readouterr()
    assert f"saved in {out}: model.pt2" in text
    assert "latency of 1 image: " in text
    assert err == ""
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "export.json", "model.pt2", "preprocessor_config.json"),
    }
    assert main([*arguments[:-1], str(tmp_path / "second"), "--batch_size", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["batch_size"], report["repeats"], report["format"]) == (3, 2, "dynamo")
    assert report["difference"] <= 1e-5 * report["largest_logit"]


@pytest.mark.slow
@needs_exporters
def test_an_export_with_other_logits_is_not_saved(tmp_path, monkeypatch):
    model = build("vit").eval()
    write = exporting._write

    def write_another(model, format, folder):
        other = build("vit").eval()
        nn.init.constant_(other.classifier.bias, 0.1)
        write(other, format, folder)

    monkeypatch.setattr(exporting, "_write", write_another)
    with pytest.raises(CheckpointError, match=r"by 0\.1\S* on a batch of 1"):
        export_model(model, "dynamo", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_exporters
def test_an_export_for_one_batch_size_is_not_saved(tmp_path, monkeypatch):
    """A program that was traced for two images only."""
    batches = exporting._batch
    monkeypatch.setattr(torch.export.Dim, "DYNAMIC", None)
    with pytest.raises(CheckpointError, match="does not run on a batch of 1"):
        export_model(build("vit").eval(), "dynamo", tmp_path / "out")
    assert exporting._batch is batches
    assert list(tmp_path.iterdir()) == []


@needs_exporters
def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(exporting.FORMATS, "onnx", ("onnx", "no_such_runtime"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("no") else object())
    monkeypatch.setattr("hf_featreuse.data.evaluation.open_classifier", refuse_to_be_called)
    assert main(["export", "some/model", "--format", "onnx", "--output_dir", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "needs packages that are not installed: no_such_runtime. Run `pip install no_such_runtime`" in err
    assert "its extra `export`" in err
    assert not (tmp_path / "out").exists()


def test_an_old_transformers_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.transformers, "__version__", "5.22.2")
    with pytest.raises(
        IncompatibleVersionError, match=r"needs transformers 5\.23 or newer, but 5\.22\.2 is installed"
    ):
        export_model(build("vit"), "dynamo", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@needs_exporters
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onx"}, "`format='onx'` is not one of dynamo, onnx, openvino and executorch. Did you mean onnx"),
        ({"batch_size": 0}, "`batch_size=0` (--batch_size) is below 1"),
        ({"repeats": 0}, "`repeats=0` (--repeats) is below 1"),
    ],
)
def test_options_are_checked_first(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_write", refuse_to_be_called)
    with pytest.raises(ConfigurationError) as raised:
        export_model(build("vit"), **{"format": "dynamo", "folder": tmp_path / "out", **options})
    assert message in str(raised.value)


@needs_exporters
def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is not empty"):
        export_model(build("vit"), "dynamo", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
