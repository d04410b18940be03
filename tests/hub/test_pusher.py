"""The pusher: where it pushes, what a snapshot holds, and that a failure is only logged."""

from pathlib import Path

import pytest
from tiny_checkpoints import save
from training_runs import options
from transformers import AutoModelForImageClassification, TrainingArguments

from hf_featreuse.hub import Pusher, pusher


def pusher_of(folder: Path, **changed) -> Pusher:
    return Pusher(TrainingArguments(**options(folder, **changed)))


def write_card(folder: Path) -> None:
    (folder / "README.md").write_text("A card.", encoding="utf-8")


def test_given_values_take_precedence_over_the_training_arguments(tmp_path):
    one = pusher_of(tmp_path / "my-run", hub_token="hf_stored", hub_private_repo=True)
    target = one.target()
    assert (target.repo_id, target.revision, target.private, target.token) == ("my-run", None, True, "hf_stored")
    target = one.target(token="hf_given", revision="next", private=False)
    assert (target.revision, target.private, target.token) == ("next", False, "hf_given")
    one.args.hub_model_id = "ada/run"
    assert one.target().repo_id == "ada/run"
    one.repo_id = "ada/made"
    assert one.target().repo_id == "ada/made"


@pytest.mark.parametrize(
    ("strategy", "due"), [("end", False), ("every_save", True), ("checkpoint", True), ("all_checkpoints", True)]
)
def test_a_checkpoint_is_pushed_according_to_the_strategy(tmp_path, strategy, due):
    checkpoint = save(tmp_path / "checkpoint-1")
    one = pusher_of(tmp_path, hub_strategy=strategy)
    assert one.is_due(checkpoint, 1) == due
    made = one._checkpoint_jobs(Path(checkpoint), 1, write_card, None)
    folders = [prefix for _, _, _, prefix, _ in made]
    assert folders == {"checkpoint": ["", "last-checkpoint/"], "all_checkpoints": ["", "checkpoint-1/"]}.get(
        strategy, [""]
    )


def test_a_snapshot_stays_as_it_was_when_the_checkpoint_is_gone(tmp_path):
    checkpoint = Path(save(tmp_path / "checkpoint-1"))
    (checkpoint / "training_args.bin").write_bytes(b"hf_secret")
    [(snapshot, *_)] = pusher_of(tmp_path)._checkpoint_jobs(checkpoint, 1, write_card, None)
    for path in checkpoint.iterdir():
        path.unlink()
    AutoModelForImageClassification.from_pretrained(snapshot)
    assert (snapshot / "README.md").read_text(encoding="utf-8") == "A card."
    assert not (snapshot / "training_args.bin").exists()


def test_averaged_weights_are_saved_by_the_caller(tmp_path):
    checkpoint = Path(save(tmp_path / "checkpoint-1"))

    def save_averaged(folder: Path) -> None:
        save(folder, depth=3)

    [(snapshot, *_)] = pusher_of(tmp_path)._checkpoint_jobs(checkpoint, 1, write_card, save_averaged)
    assert AutoModelForImageClassification.from_pretrained(snapshot).config.num_hidden_layers == 3
    assert AutoModelForImageClassification.from_pretrained(checkpoint).config.num_hidden_layers == 2


def test_a_card_that_fails_is_logged_with_the_command_that_pushes_again(tmp_path, monkeypatch):
    checkpoint, said = save(tmp_path / "checkpoint-1"), []
    monkeypatch.setattr(pusher.logger, "error", said.append)

    def fail(folder: Path) -> None:
        raise OSError("No space left on device")

    one = pusher_of(tmp_path, hub_model_id="ada/run")
    one.push_checkpoint(checkpoint, 1, finish=fail)
    assert len(said) == 1
    assert "Step 1 is not pushed: No space left on device" in said[0]
    assert f"featreuse push {checkpoint} ada/run --new_card" in said[0]
    assert one.progress is None
