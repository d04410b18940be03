"""What of a folder belongs on the Hub, and what is refused before anything is sent."""

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from tiny_checkpoints import save
from tiny_models import build
from training_runs import config

from hf_featreuse import CheckpointError, ConfigurationError, FeatureReuseTrainer, HubError, push_folder
from hf_featreuse.hub import hub_trainer
from hf_featreuse.hub.folders import check_folder_to_push, files_to_push
from hf_featreuse.hub.sending import Target


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


RUN = (
    "model.safetensors",
    "config.json",
    "README.md",
    "training.png",
    "runs/Nov24/events.out",
    "trainer_state.json",
)
RESUMING = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "resume_state_rank1.json")


def test_a_run_without_what_only_resuming_needs(tmp_path):
    private = ("training_args.bin", "_push-x/model.safetensors", ".git/config", ".cache/x")
    checkpoint = tuple(f"checkpoint-3/{name}" for name in (*RUN, *RESUMING, "training_args.bin"))
    folder = fill(tmp_path / "run", *RUN, *RESUMING, *private, *checkpoint)
    assert set(files_to_push(folder)) == set(RUN)
    assert set(files_to_push(folder, for_resuming=True)) == {*RUN, *RESUMING}
    kept = {name for name in checkpoint if not name.endswith("training_args.bin")}
    assert set(files_to_push(folder, checkpoints=True)) == {*RUN, *kept}


def test_the_private_names_are_those_below_the_folder_alone(tmp_path):
    folder = fill(tmp_path / "_private" / ".run", *RUN)
    assert set(files_to_push(folder)) == set(RUN)


@pytest.mark.parametrize(
    ("spoil", "repo", "error", "message"),
    [
        (lambda _: None, "ada/x/y", ConfigurationError, "no repository id.*owner/name"),
        (lambda _: None, "ada/x", ConfigurationError, "no model card.*--new_card"),
        (lambda f: (f / "model.safetensors").unlink(), "ada/x", ConfigurationError, "holds no model"),
        (lambda f: (f / "config.json").unlink(), "ada/x", ConfigurationError, "holds no model"),
        (lambda f: f.rename(f.parent / "elsewhere"), "ada/x", ConfigurationError, "is no folder"),
        (lambda f: fill(f, "adapter_config.json"), "ada/x", ConfigurationError, "adapter_model.safetensors"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
            "ada/x",
            CheckpointError,
            "model.safetensors is not whole",
        ),
        (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "ada/x", ConfigurationError, "cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_published_is_refused(tmp_path, monkeypatch, spoil, repo, error, message):
    def refuse(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    folder = Path(save(tmp_path / "model"))
    spoil(folder)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        push_folder(folder, repo)


def test_a_model_in_shards_needs_each_of_them(tmp_path):
    folder = Path(save(tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        check_folder_to_push(folder, "ada/x", new_card=True)


def test_a_short_card_says_what_the_configuration_says(tmp_path):
    card = check_folder_to_push(Path(save(tmp_path / "model")), "ada/small", new_card=True)
    assert "# small" in card and "`ViTForImageClassification`" in card and 'repository = "ada/small"' in card
    assert "scratch" not in card and str(tmp_path) not in card


def test_without_a_network_the_error_says_so_and_how_to_push_again(tmp_path):
    # The tests run with HF_HUB_OFFLINE=1.
    folder = save(tmp_path / "model")
    with pytest.raises(HubError, match=f"HF_HUB_OFFLINE is set.*featreuse push {folder} ada/x"):
        push_folder(folder, "ada/x", new_card=True)


def test_the_command_to_push_again_fits_a_shell_and_hides_the_token():
    target = Target("ada/x", "v 1", True, "hf_secret")
    assert target.again("my run") == "featreuse push 'my run' ada/x --revision 'v 1' --private"


def test_a_checkpoint_in_shards_is_not_pushed_and_said(tmp_path, monkeypatch):
    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path))
    trainer.push_in_progress = None
    said = []
    monkeypatch.setattr(hub_trainer.logger, "warning_once", said.append)
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "pytorch_model_fsdp_0").mkdir(parents=True)
    (checkpoint / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"weights")
    trainer._push_from_checkpoint(str(checkpoint))
    assert len(said) == 1 and "in shards" in said[0] and "FULL_STATE_DICT" in said[0]
    assert list(tmp_path.glob("_push-*")) == []
