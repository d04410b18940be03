"""The verbs `train` and `env`, and what all verbs share: the version, dashes in flags, exit codes."""

import os
import re
import subprocess
import sys

import pytest

import hf_featreuse
from hf_featreuse.cli import main


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"featreuse {hf_featreuse.__version__}\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--drop-rat", "0.3"], 2, "Did you mean --drop_rate"),
        (["--max-steps", "x"], 2, "invalid int value"),
        (["--drop-rate", "3"], 1, "`drop_rate=3.0` is not a probability"),
        (["--output-dir", ""], 1, "is empty"),
        (["--config", "no/such.yaml"], 1, "`no/such.yaml` cannot be read"),
        (["--dataset-name", "\x1b[31mred"], 1, "red"),
    ],
)
def test_wrong_flags_of_train_end_in_one_line(words, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--use_cpu", "--model_type", "vit", *words]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err[:-1].isprintable()
    assert err.startswith("featreuse: ") and message in err
    assert list(tmp_path.iterdir()) == []


def test_dashes_work_in_every_verb(capsys):
    assert main(["inspect", "vit", "--drop-rate=0.2", "--drop-rate-schedule", "uniform", "--json"]) == 0
    dashed = capsys.readouterr().out
    assert main(["inspect", "vit", "--drop_rate=0.2", "--drop_rate_schedule", "uniform", "--json"]) == 0
    assert capsys.readouterr().out == dashed


def test_values_keep_their_dashes(capsys):
    assert main(["inspect", "no-such-model"]) == 1
    assert "no-such-model" in capsys.readouterr().err
    assert main(["inspect", "vit", "--target-blocks=a--b-c"]) == 1
    assert "a--b-c" in capsys.readouterr().err


def test_env_tells_versions_and_no_secrets(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for package in ("torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "numpy"):
        assert re.search(rf"^{package} +\d+\.", text, re.MULTILINE), package
    assert re.search(rf"^hf_featreuse +{re.escape(hf_featreuse.__version__)}$", text, re.MULTILINE)
    assert re.search(r"^(Python|platform|GPUs) ", text, re.MULTILINE)
    assert "hf_secret_of_mine" not in text and os.path.expanduser("~") not in text and sys.prefix not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.slow
def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "hf_featreuse", "train", "--drop-rat", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("featreuse: `--drop_rat 1` is not a flag.")
