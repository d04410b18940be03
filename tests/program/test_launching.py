"""`featreuse train --launch N`: several processes, and what is refused before any is started."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hf_featreuse import ConfigurationError
from hf_featreuse.cli import main
from hf_featreuse.program import prepare
from hf_featreuse.program.launching import check_one_gpu, without_launch

TINY = ["--config_overrides", "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=16"]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("words", [["--launch", "2"], ["--launch=2"], ["--launch=2", "--drop-rate", "0.2"]])
def test_the_processes_get_the_other_flags(words):
    assert without_launch(["--use-cpu", *words]) == ["--use_cpu", *without_launch(words)]
    assert without_launch(words) == (["--drop_rate", "0.2"] if len(words) == 3 else [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--launch", "3"], "`--launch 3` needs 3 GPUs, but there is no GPU. Pass `--use_cpu`"),
        (["--launch", "0"], "`--launch 0` is out of range"),
        (["--launch", "two"], "invalid int value"),
        (["--launch", "2", "--use_cpu", "--drop_rate", "2"], "`drop_rate=2.0`"),
        (["--launch", "2", "--use_cpu", "--output_dir", "/dev/null/x"], "cannot be written"),
    ],
)
def test_what_cannot_work_is_one_line_before_a_process_is_started(no_gpu, words, message, capsys):
    assert main(["train", *words]) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("featreuse: ") and message in err and err.count("\n") == 1


def test_fewer_gpus_than_processes(no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["train", "--launch", "4"]) == 1
    assert "there is 2 GPUs" not in (err := capsys.readouterr().err)
    assert "needs 4 GPUs, but there are 2" in err and "`--launch 2`" in err


def test_a_process_of_a_launcher_starts_none(no_gpu, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--launch", "2", "--use_cpu"]) == 1
    assert "this process was already started by a launcher" in capsys.readouterr().err


def test_the_examples_name_the_command(tmp_path):
    with (
        pytest.raises(ConfigurationError, match=r"`--launch 2` works only with `featreuse train`.*accelerate launch"),
        prepare(["--use_cpu", "--launch", "2", "--output_dir", str(tmp_path / "out")]),
    ):
        pass


def test_one_process_with_several_gpus_names_the_flag():
    with pytest.raises(ConfigurationError, match=r"sees 2 GPUs.*`--launch 2`.*CUDA_VISIBLE_DEVICES=0"):
        check_one_gpu(SimpleNamespace(n_gpu=2, alternates=True))
    check_one_gpu(SimpleNamespace(n_gpu=1, alternates=True))
    check_one_gpu(SimpleNamespace(n_gpu=2, alternates=False))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_evaluate_and_report(tmp_path):
    flags = [*TINY, "--max_steps", "3", "--eval_strategy", "no", "--max_eval_samples", "65", "--use_cpu"]
    command = [sys.executable, "-m", "hf_featreuse", "train", "--launch", "2", "--output_dir", str(tmp_path / "out")]
    # The conftest asks for errors only, and then there are no summaries.
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    environment = {name: value for name, value in environment.items() if name not in ("RANK", "LOCAL_RANK")}
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu" in done.stdout
    assert "had defaults used instead" not in done.stderr
    assert "OMP_NUM_THREADS" not in done.stderr
    found = json.loads((tmp_path / "out" / "evaluation" / "evaluation.json").read_text())
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert found["accuracy"]["total"] == 65
    assert found["accuracy"]["value"] == pytest.approx(results["eval_accuracy"])
    assert "2 processes" in (tmp_path / "out" / "run.yaml").read_text()
    # A process that fails ends the command; what it says is above.
    again = subprocess.run([*command, *flags, "--overwrite_output_dir", "--resume_from_checkpoint", "none"],
                           capture_output=True, text=True, env=environment, timeout=900)  # fmt: skip
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("featreuse: a process failed with exit code 1")
    assert "CheckpointError" not in again.stderr and "featreuse: " in again.stderr
