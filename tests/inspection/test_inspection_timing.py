"""`inspect` with measured times. No test compares two times."""

import json

import pytest
import torch
from tiny_models import build

from hf_featreuse import ConfigurationError, inspect_model
from hf_featreuse.cli import main
from hf_featreuse.inspection import Timing


@pytest.fixture
def tiny(tmp_path):
    build("vit").config.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.mark.parametrize("named", [True, False])
def test_the_report_predicts_the_time_of_each_kind_of_step(tiny, named):
    report = inspect_model(tiny if named else build("vit"), timing=Timing(batch_size=2))
    assert set(report.times) == set(report.costs)
    assert report.step_seconds > 0 and all(value > 0 for value in report.times.values())
    assert all(block.share_of_time is not None for block in report.blocks)
    text = " ".join(str(report).split())
    assert "% of time" in text and "Expected time, vanilla step = 1:" in text
    assert "Measured on cpu, batch of 2:" in text


def test_nothing_is_timed_unless_asked(tiny):
    report = inspect_model(tiny)
    assert report.times == {} and report.step_seconds is None and report.blocks[0].share_of_time is None
    assert "% of time" not in str(report) and "Expected time" not in str(report)


def test_the_batch_has_the_size_asked_for(monkeypatch):
    from hf_featreuse.inspection import timing

    seen = {}
    real = timing.measure_step_times

    def measure(model, blocks, batch, **options):
        seen.update(size=len(batch["pixel_values"]), **options)
        return real(model, blocks, batch, repeats=1, **options)

    monkeypatch.setattr(timing, "measure_step_times", measure)
    inspect_model(build("vit"), timing=Timing(batch_size=3, bf16=True), train_trunk="head")
    assert seen == {"size": 3, "autocast": torch.bfloat16, "train_trunk": "head"}


def test_the_command_measures(tiny, capsys):
    assert main(["inspect", tiny, "--measure", "--batch_size", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["times"]["mean"] > 0 and found["options"]["timing"] == "cpu, batch of 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "2"], "`--batch_size` has no effect without `--measure`"),
        (["--compile"], "`--compile` has no effect without `--measure`"),
        (["--measure", "--batch_size", "0"], "`batch_size=0` is below 1"),
        (["--measure", "--device", "warp"], "`device='warp'` cannot be used"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(tiny, capsys, arguments, message):
    assert main(["inspect", tiny, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_batch_without_names_is_refused():
    with pytest.raises(ConfigurationError, match="Pass a dictionary of tensors"):
        inspect_model(build("vit"), inputs=torch.zeros(1, 3, 32, 32), timing=Timing())
