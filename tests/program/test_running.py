"""Whole runs: repeated from their options, stopped early, and reported on."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_featreuse.cli import main
from hf_featreuse.program import run
from hf_featreuse.program.reports import _OPTIONAL

pytest.importorskip("sklearn", reason="the digits need the extra for them")
pytest.importorskip("matplotlib", reason="plots need the extra for them")
TINY = ["--config_overrides", "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=16"]
QUICK = [*TINY, "--use_cpu", "--disable_tqdm", "true", "--max_train_samples", "96", "--max_eval_samples", "64"]


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def history(folder: Path, name: str) -> list:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run with its own options."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    words = ["--max_steps", "5", "--drop_rate", "0.7", "--mixup_alpha", "0.8", "--seed", "3", "--ema_decay", "0.6"]
    assert main(["train", "--output-dir", str(folder), *QUICK, *words]) == 0
    return folder


def test_its_options_repeat_a_run_bitwise(first, tmp_path):
    again = tmp_path / "again"
    assert main(["train", "--config", str(first / "run.yaml"), "--output_dir", str(again)]) == 0
    assert weights(again) == weights(first)
    other = tmp_path / "other"
    assert main(["train", "--config", str(first / "run.yaml"), "--output_dir", str(other), "--drop_rate", "0.1"]) == 0
    assert weights(other) != weights(first)


@pytest.mark.parametrize(
    ("rate", "warns"), [([], False), (["--drop_rate", "0.5"], True), (["--drop_rate", "0"], False)]
)
def test_fine_tuning_keeps_the_best_model_and_warns_of_a_high_rate(first, tmp_path, caplog, rate, warns):
    folder = tmp_path / "tuned"
    words = ["--model_name_or_path", str(first), "--num_train_epochs", "2", "--learning_rate", "0.05", *rate]
    assert main(["train", "--output_dir", str(folder), *QUICK[2:], *words]) == 0
    assert ("is high for fine-tuning" in caplog.text) is warns
    state = json.loads((folder / "trainer_state.json").read_text())
    assert len(history(folder, "eval_loss")) >= 2, "after every epoch"
    assert results(folder)["eval_loss"] == pytest.approx(state["best_metric"])
    assert state["best_metric"] == pytest.approx(min(history(folder, "eval_loss")))


def test_the_report_is_that_of_the_command_evaluate(first, tmp_path, capsys):
    found = json.loads((first / "evaluation" / "evaluation.json").read_text())
    accuracy = found["accuracy"]
    assert accuracy["value"] == pytest.approx(results(first)["eval_accuracy"])
    assert found["loss"] == pytest.approx(results(first)["eval_loss"], rel=1e-5)
    assert accuracy["total"] == 64
    assert (first / "evaluation" / "index.html").stat().st_size > 1000
    # --max_eval_samples takes other images than --max_samples; without either they are the same ones.
    whole = ["--do_eval", "--model_name_or_path", str(first), "--output_dir", str(tmp_path / "whole"), "--use_cpu"]
    assert main(["train", *whole, "--disable_tqdm", "true"]) == 0
    command = ["--output_dir", str(tmp_path / "command"), "--device", "cpu", "--disable_tqdm"]
    assert main(["evaluate", str(first), *command]) == 0
    capsys.readouterr()
    one, two = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("whole/evaluation", "command")
    )
    assert one["confusion"] == two["confusion"]
    assert (one["accuracy"], one["calibration"]) == (two["accuracy"], two["calibration"])


def test_what_a_report_needs_is_named_if_it_is_missing(first, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(_OPTIONAL, "no_such_module", "no-such-package")
    out = tmp_path / "out"
    run(["--do_eval", "--model_name_or_path", str(first), "--output_dir", str(out), *QUICK[2:]])
    assert "No report in evaluation/: no-such-package is not installed. Run `pip install" in caplog.text
    assert "eval_accuracy" in results(out)
    assert not (out / "evaluation").exists()


def test_predictions_have_a_row_for_each_image_of_the_test_split(first, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    noise = np.random.default_rng(0)
    for index in range(20):
        file = tmp_path / "data" / "test" / str(index % 10) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file)
    out = tmp_path / "out"
    words = ["--do_predict", "--eval_strategy", "no", "--dataset_name", str(tmp_path / "data"), *QUICK[2:]]
    run([*words, "--model_name_or_path", str(first), "--output_dir", str(out)])
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    hits = [row["label"] == Path(row["file"]).parent.name for row in rows]
    assert sum(hits) / 20 == pytest.approx(results(out)["predict_accuracy"])
    # The command predict gives the same.
    table = tmp_path / "files.csv"
    assert main(["predict", str(first), str(tmp_path / "data"), "--output", str(table), "--device", "cpu"]) == 0
    with table.open() as file:
        expected = {row["file"]: (row["label"], row["score"]) for row in csv.DictReader(file)}
    assert {row["file"]: row["label"] for row in rows} == {name: label for name, (label, _) in expected.items()}
    assert not (out / "run.yaml").exists()


STOPPING = ["--early_stopping_patience", "2", "--max_steps", "20", "--eval_strategy", "steps", "--eval_steps", "1"]


def test_training_stops_when_the_metric_gets_no_better(tmp_path):
    # Nothing learns at this rate, so the first evaluation stays the best one.
    words = [*STOPPING, "--learning_rate", "0", "--early_stopping_threshold", "0.001", "--save_total_limit", "9"]
    run(["--output_dir", str(tmp_path / "out"), *QUICK, *words])
    assert len(history(tmp_path / "out", "eval_accuracy")) == 3
    resumed = [*words, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")]
    run(["--output_dir", str(tmp_path / "resumed"), *QUICK, *resumed])
    assert len(history(tmp_path / "resumed", "eval_accuracy")) == 3
    run(["--output_dir", str(tmp_path / "longer"), *QUICK, *words, "--early_stopping_patience", "4"])
    assert len(history(tmp_path / "longer", "eval_accuracy")) == 5


def test_nothing_of_the_data_is_pushed(first):
    from hf_featreuse.hub.folders import files_to_push

    pushed = set(files_to_push(first))
    assert {"model.safetensors", "README.md", "training.png"} <= pushed
    assert not [name for name in pushed if name.startswith(("run.yaml", "evaluation", "predictions"))]
