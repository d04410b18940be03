"""Where results may go: what is refused, with the ways out, and what is not."""

import json

import pytest

from hf_featreuse import ConfigurationError
from hf_featreuse.checkpoints.output_lock import LOCK_NAME
from hf_featreuse.program import parse_arguments
from hf_featreuse.program.output_dir import check_output_dir


def checked(folder, *words):
    return check_output_dir(parse_arguments(["--use_cpu", "--output_dir", str(folder), *words]))


def test_a_new_or_empty_folder_is_taken_and_not_made(tmp_path):
    assert checked(tmp_path / "a" / "b") is None
    assert list(tmp_path.iterdir()) == []
    assert checked(tmp_path) is None


def test_what_a_run_leaves_that_ended_before_its_first_checkpoint_is_no_obstacle(tmp_path):
    for name in (LOCK_NAME, "run.yaml"):
        (tmp_path / name).write_text("")
    assert checked(tmp_path) is None
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is not empty and contains no checkpoint"):
        checked(tmp_path)


def test_checkpoints_are_resumed_from_only_on_request(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    ways_out = r"contains checkpoints\. Pass `--resume_from_checkpoint last`.*`--overwrite_output_dir`.*another folder"
    with pytest.raises(ConfigurationError, match=ways_out):
        checked(tmp_path)
    assert checked(tmp_path, "--resume_from_checkpoint", "last") is True
    assert checked(tmp_path, "--resume_from_checkpoint", "elsewhere/checkpoint-3") == "elsewhere/checkpoint-3"
    assert checked(tmp_path, "--overwrite_output_dir") is None
    assert checked(tmp_path / "another") is None
    # Evaluation writes next to them.
    assert checked(tmp_path, "--do_eval") is None
    with pytest.raises(ConfigurationError, match="whose checkpoints `--overwrite_output_dir` deletes"):
        checked(tmp_path, "--overwrite_output_dir", "--resume_from_checkpoint", "last")


def test_a_finished_run_continues_only_for_longer(tmp_path):
    state = {"global_step": 8, "max_steps": 8, "num_train_epochs": 2}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoint-8").mkdir()
    resumes = ["--resume_from_checkpoint", "last"]
    with pytest.raises(ConfigurationError, match=r"finished run of 8 steps.*epochs and `--resume_from_checkpoint"):
        checked(tmp_path, "--num_train_epochs", "2", *resumes)
    assert checked(tmp_path, "--num_train_epochs", "3", *resumes) is True
    assert checked(tmp_path, "--max_steps", "9", *resumes) is True
    with pytest.raises(ConfigurationError, match="contains checkpoints"):
        checked(tmp_path, "--max_steps", "9")
