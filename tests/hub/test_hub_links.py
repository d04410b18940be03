"""Links in a folder that is pushed: what they may lead to, and that loops end."""

import os
from pathlib import Path

import pytest
from tiny_checkpoints import save

from hf_featreuse import CheckpointError, ConfigurationError
from hf_featreuse.hub import folders
from hf_featreuse.hub.folders import check_folder_to_push, files_to_push, push_folder


@pytest.fixture
def said(monkeypatch) -> list[str]:
    warnings: list[str] = []
    monkeypatch.setattr(folders.logger, "warning", warnings.append)
    return warnings


def test_links_that_leave_the_folder_are_skipped_with_a_warning(tmp_path, said):
    run, other = tmp_path / "run", tmp_path / "run-elsewhere"
    (other / "deep").mkdir(parents=True)
    (other / "secret.txt").write_text("secret")
    (run / "sub").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    for name, target in {
        "folder": other, "file.txt": other / "secret.txt", "sub/up": "../../run-elsewhere", "gone": "nowhere",
    }.items():  # fmt: skip
        (run / name).symlink_to(target)
    assert set(files_to_push(run)) == {"config.json"}
    assert len(said) == 4 and sum("leaves the folder" in text for text in said) == 3
    assert [text for text in said if "has no target" in text and "gone" in text]


def test_loops_of_links_end_and_links_inside_the_folder_are_followed(tmp_path, said):
    run = tmp_path / "run"
    (run / "logs" / "deep").mkdir(parents=True)
    (run / "logs" / "events.out").write_text("x")
    (run / "logs" / "deep" / "up").symlink_to(run)
    (run / "self").symlink_to(run, target_is_directory=True)
    (run / "here").symlink_to(".")
    (run / "first").symlink_to("second")
    (run / "second").symlink_to("first")
    (run / "latest").symlink_to("logs")
    (run / "alias.out").symlink_to("logs/events.out")
    assert set(files_to_push(run)) == {"logs/events.out", "latest/events.out", "alias.out"}
    assert len(said) == 2 and all("has no target" in text for text in said)


def test_a_link_to_a_file_that_is_never_pushed_is_not_pushed_under_another_name(tmp_path, said):
    run = tmp_path / "run"
    (run / ".git").mkdir(parents=True)
    (run / ".git" / "config").write_text("token")
    (run / "training_args.bin").write_bytes(b"token")
    (run / "notes.txt").symlink_to("training_args.bin")
    (run / "git").symlink_to(".git")
    (run / ".hidden").symlink_to("training_args.bin")
    assert files_to_push(run) == {}
    assert len(said) == 2 and all("never pushed" in text for text in said)


def test_a_folder_that_is_itself_a_link_is_pushed(tmp_path, said):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "latest").symlink_to("run")
    assert set(files_to_push(tmp_path / "latest")) == {"config.json"} and said == []


def test_special_files_are_left_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    assert set(files_to_push(tmp_path)) == {"config.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_that_consists_of_links_out_of_the_folder_is_refused(tmp_path, name):
    folder = Path(save(tmp_path / "snapshot"))
    (tmp_path / "blobs").mkdir()
    (folder / name).rename(tmp_path / "blobs" / "0a1b")
    (folder / name).symlink_to("../blobs/0a1b")
    with pytest.raises(ConfigurationError, match=rf"{name} only as a link that leaves it.*cp -rL"):
        push_folder(folder, "ada/x", new_card=True)


@pytest.mark.parametrize("map", ['{"a": "../model.safetensors"}', '{"a": 5}', "[1]", '"x"', "null"])
def test_an_index_that_names_no_files_of_the_folder_is_refused(tmp_path, map):
    folder = Path(save(tmp_path / "model"))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {map}}}')
    with pytest.raises(CheckpointError, match="is not an index of weights"):
        check_folder_to_push(folder, "ada/x", new_card=True)


@pytest.mark.parametrize("content", ["[]", "5", "null", '"x"', "[" * 100_000])
def test_a_configuration_of_another_kind_of_json_is_refused(tmp_path, content):
    folder = Path(save(tmp_path / "model"))
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json (holds a|is not complete)"):
        check_folder_to_push(folder, "ada/x", new_card=True)
