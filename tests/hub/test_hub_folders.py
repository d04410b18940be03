"""Which files of a folder belong on the Hub, and what is refused before anything is sent."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from tiny_checkpoints import save
from tiny_models import build, examples
from training_runs import config, plain_net
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_featreuse import (
    CheckpointError,
    ConfigurationError,
    FeatureReuseTrainer,
    HubError,
    WeightAverage,
    push_folder,
)
from hf_featreuse.hub import folders, pusher
from hf_featreuse.hub.averaged import save_averaged
from hf_featreuse.hub.folders import check_folder_to_push, files_to_push
from hf_featreuse.hub.run_card import write_base_config
from hf_featreuse.hub.sending import Target
from hf_featreuse.trainer import publishing


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
RESUMING = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "resume_state_rank1.json", "averaged.safetensors")


def test_a_run_without_what_only_resuming_needs(tmp_path):
    private = ("training_args.bin", "_push-x/model.safetensors", ".git/config", ".cache/x")
    checkpoint = tuple(f"checkpoint-3/{name}" for name in (*RUN, *RESUMING, "training_args.bin"))
    folder = fill(tmp_path / "run", *RUN, *RESUMING, *private, *checkpoint)
    assert set(files_to_push(folder)) == set(RUN)
    assert set(files_to_push(folder, for_resuming=True)) == {*RUN, *RESUMING}
    kept = {name for name in checkpoint if not name.endswith("training_args.bin")}
    assert set(files_to_push(folder, checkpoints=True)) == {*RUN, *kept}


def test_trials_of_a_search_and_unfinished_checkpoints_stay_and_checkpoints_lie_at_any_depth(tmp_path):
    stays = ("run-0/checkpoint-3/optimizer.pt", "run-0/config.json", "unfinished-4/model.safetensors")
    deep = ("seed-1/checkpoint-3/optimizer.pt", "seed-1/checkpoint-3/model.safetensors")
    folder = fill(tmp_path / "out", *RUN, *stays, *deep, "seed-1/optimizer.pt")
    assert set(files_to_push(folder)) == set(RUN)
    assert set(files_to_push(folder, checkpoints=True)) == {*RUN, *deep}


def average_beside(folder: Path, value: float) -> None:
    """An average, all of one value, next to the weights of a saved model."""
    average = WeightAverage(AutoModelForImageClassification.from_pretrained(folder), 0.5)
    average.load_state_dict({name: torch.full_like(t, value) for name, t in average.state_dict().items()})
    average.save(folder)


def test_of_a_checkpoint_with_an_average_the_average_is_pushed(tmp_path, monkeypatch):
    folder, sent = Path(save(tmp_path / "model")), {}
    average_beside(folder, 0.25)
    (folder / "trainer_state.json").write_text("{}")
    monkeypatch.setattr(folders, "make_repository", lambda *_: "ada/x")

    def keep(_api, _target, files, *_):
        (tmp_path / "sent").mkdir()
        for name, file in files.items():
            content = file.read_bytes() if isinstance(file, Path) else file
            (tmp_path / "sent" / name).write_bytes(content)
            sent[name] = content
        return SimpleNamespace(commit_url="")

    monkeypatch.setattr(folders, "send", keep)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    push_folder(folder, "ada/x", new_card=True)
    names = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "trainer_state.json"}
    assert sent.keys() == names
    pushed = AutoModelForImageClassification.from_pretrained(tmp_path / "sent")
    assert all((parameter == 0.25).all() for parameter in pushed.parameters())
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_an_average_that_cannot_be_put_in_place_is_refused(tmp_path):
    other, folder = Path(save(tmp_path / "other", depth=3)), Path(save(tmp_path / "model"))
    average_beside(other, 0.25)
    (other / "averaged.safetensors").rename(folder / "averaged.safetensors")
    with pytest.raises(CheckpointError, match="of another model"):
        save_averaged(folder, tmp_path / "to")
    fill(folder, "adapter_config.json")
    with pytest.raises(ConfigurationError, match=r"an adapter's weights.*delete averaged\.safetensors"):
        save_averaged(folder, tmp_path / "to")


def test_only_names_below_the_folder_are_private(tmp_path):
    folder = fill(tmp_path / "_private" / ".run", *RUN)
    assert set(files_to_push(folder)) == set(RUN)


@pytest.mark.parametrize(
    ("spoil", "repo", "error", "message"),
    [
        (lambda _: None, "ada/x/y", ConfigurationError, "not a repository id.*owner/name"),
        (lambda _: None, "ada/x", ConfigurationError, "no model card.*--new_card"),
        (lambda f: (f / "model.safetensors").unlink(), "ada/x", ConfigurationError, "holds no model"),
        (lambda f: (f / "config.json").unlink(), "ada/x", ConfigurationError, "holds no model"),
        (lambda f: f.rename(f.parent / "elsewhere"), "ada/x", ConfigurationError, "is not a directory"),
        (lambda f: fill(f, "adapter_config.json"), "ada/x", ConfigurationError, "adapter_model.safetensors"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
            "ada/x",
            CheckpointError,
            "model.safetensors is missing or cut short",
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
    (folder / "model.safetensors.index.json").write_text(index[:30])
    with pytest.raises(CheckpointError, match=r"index\.json is not complete"):
        check_folder_to_push(folder, "ada/x", new_card=True)


def test_a_short_card_is_made_from_the_configuration(tmp_path):
    card = check_folder_to_push(Path(save(tmp_path / "model")), "ada/small", new_card=True)
    assert "# small" in card and "`ViTForImageClassification`" in card and 'repository = "ada/small"' in card
    assert "scratch" not in card and str(tmp_path) not in card


def test_without_a_network_the_error_names_the_cause_and_how_to_push_again(tmp_path):
    # The tests run with HF_HUB_OFFLINE=1.
    folder = save(tmp_path / "model")
    with pytest.raises(HubError, match=f"HF_HUB_OFFLINE is set.*featreuse push {folder} ada/x"):
        push_folder(folder, "ada/x", new_card=True)


def test_the_command_to_push_again_fits_a_shell_and_hides_the_token():
    target = Target("ada/x", "v(1)", True, "hf_secret")
    assert target.again("my run") == "featreuse push 'my run' ada/x --revision 'v(1)' --private"
    assert "hf_secret" not in repr(target)
    assert Target("ada/x", private=False).again("run") == "featreuse push run ada/x --public"
    assert Target("ada/x").again("run") == "featreuse push run ada/x"


def test_a_checkpoint_in_shards_is_not_pushed_with_a_warning(tmp_path, monkeypatch):
    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path))
    trainer.push_in_progress = None
    said = []
    monkeypatch.setattr(pusher.logger, "warning_once", said.append)
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "pytorch_model_fsdp_0").mkdir(parents=True)
    (checkpoint / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"weights")
    trainer._push_from_checkpoint(str(checkpoint))
    assert len(said) == 1 and "in shards" in said[0] and "FULL_STATE_DICT" in said[0]
    assert list(tmp_path.glob("_push-*")) == []


def test_a_configuration_that_was_cut_short_is_reported(tmp_path):
    folder = Path(save(tmp_path / "model"))
    (folder / "config.json").write_text((folder / "config.json").read_text()[:30])
    with pytest.raises(CheckpointError, match=r"config\.json is not complete"):
        check_folder_to_push(folder, "ada/x", new_card=True)


# What a push in mid-run is made of


@pytest.mark.parametrize(("strategy", "resumes"), [("every_save", False), ("all_checkpoints", True)])
def test_a_snapshot_keeps_the_optimizer_only_if_it_is_sent(tmp_path, strategy, resumes):
    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path, hub_strategy=strategy, max_steps=1))
    checkpoint = Path(save(tmp_path / "checkpoint-1"))
    (checkpoint / "optimizer.pt").write_bytes(b"moments")
    jobs = trainer.pusher._checkpoint_jobs(checkpoint, 1, trainer._finish_folder, None)
    assert len(jobs) == 1 + resumes
    for snapshot, *_ in jobs:
        assert (snapshot / "optimizer.pt").is_file() == resumes
        assert (snapshot / "model.safetensors").is_file()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_a_push_in_mid_run_holds_the_averaged_model_and_the_checkpoint_as_it_is(tmp_path, strategy):
    trainer = FeatureReuseTrainer(
        build("vit"),
        config(tmp_path, ema_decay=0.9, max_steps=3, save_strategy="steps", save_steps=3, hub_strategy=strategy),
        train_dataset=examples(8),
    )
    own = []
    trainer.add_callback(KeepWeights(own))
    trainer.train()  # After which the model has the average.
    checkpoint = tmp_path / "checkpoint-3"
    with torch.no_grad():
        for parameter, raw in zip(trainer.model.parameters(), own, strict=True):
            parameter.copy_(raw)
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    made = trainer.pusher._checkpoint_jobs(checkpoint, 3, trainer._finish_folder, trainer._save_averaged)
    model, *whole = [job[0] for job in made]
    averages = trainer.weight_average.state_dict()
    pushed = AutoModelForImageClassification.from_pretrained(model)
    assert all(torch.equal(parameter, averages[name]) for name, parameter in pushed.named_parameters())
    assert not torch.equal(next(iter(averages.values())), own[0])
    assert (model / "README.md").is_file() and not (model / "averaged.safetensors").exists()
    assert all(map(torch.equal, trainer.model.parameters(), own))
    assert before == {path: path.read_bytes() for path in checkpoint.iterdir()}
    assert len(whole) == (strategy == "checkpoint")
    for snapshot in whole:
        names = {path.name for path in checkpoint.iterdir()} - {"training_args.bin"}
        assert {path.name for path in snapshot.iterdir()} == names


class KeepWeights(TrainerCallback):
    """Notes the weights that train, before the average replaces them."""

    def __init__(self, kept: list) -> None:
        self.kept = kept

    def on_step_end(self, args, state, control, model, **_):
        self.kept[:] = [parameter.detach().clone() for parameter in model.parameters()]


def test_details_without_a_place_in_the_card_are_dropped_and_unknown_ones_refused_at_the_start(tmp_path):
    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path, max_steps=1), train_dataset=examples(8))
    trainer.card_details = {"language": "en", "tasks": "x", "dataset_tags": "x", "dataset_args": "x", "dataset": "a/b"}
    trainer.train()
    trainer.create_model_card()
    assert "a/b" in (tmp_path / "README.md").read_text()
    trainer.card_details = {"datasets": "a/b"}
    with pytest.raises(ConfigurationError, match=r"holds \['datasets'\].*dataset, license"):
        trainer.train()


def test_no_error_in_making_a_push_stops_training(tmp_path, monkeypatch):
    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path), train_dataset=examples(8))
    trainer.push_in_progress, said = None, []
    save(tmp_path / "checkpoint-3")
    monkeypatch.setattr(publishing, "write_run_card", lambda *_, **__: {}["missing"])
    monkeypatch.setattr(pusher.logger, "error", said.append)
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-3"))
    assert len(said) == 1 and "featreuse push" in said[0] and "missing" in said[0]


def test_the_card_of_a_plain_module_is_not_that_of_a_transformers_model(tmp_path):
    adapted = get_peft_model(plain_net(), LoraConfig(target_modules=["body.0"], modules_to_save=["head"]))
    for name, model in (("plain", plain_net()), ("adapter", adapted)):
        folder = tmp_path / name
        off = {"stochastic_depth_steps": 0, "masked_freeze_steps": 0, "max_steps": 1}
        trainer = FeatureReuseTrainer(model, config(folder, **off), train_dataset=examples(8))
        trainer.train()
        write_base_config(trainer.model, folder)
        trainer.create_model_card()
        card = (folder / "README.md").read_text()
        assert "PlainNet()" in card and "transformers model" not in card and "pipeline(" not in card, name
        assert "library_name: transformers" not in card and "- transformers\n" not in card.split("\n---\n")[0]
        assert not (folder / "config.json").exists()


def test_the_card_shows_the_results_of_the_best_model_if_it_was_loaded(tmp_path):
    accuracies = iter((0.5, 0.9, 0.1, 0.3))
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": True}
    trainer = FeatureReuseTrainer(
        build("vit"),
        config(tmp_path, **options, **best),
        train_dataset=examples(8),
        eval_dataset=examples(4),
        compute_metrics=lambda _: {"accuracy": next(accuracies)},
    )
    trainer.train()
    trainer.create_model_card()
    assert trainer.state.best_global_step == 2
    assert "90.00" in (tmp_path / "README.md").read_text()
    trainer.evaluate()
    trainer.create_model_card()
    assert "30.00" in (tmp_path / "README.md").read_text()


def test_tags_of_the_model_are_on_the_card(tmp_path):
    trainer = FeatureReuseTrainer(build("vit"), config(tmp_path, max_steps=1), train_dataset=examples(8))
    trainer.train()
    trainer.model.add_model_tags(["leaves", "hf_featreuse"])
    trainer.create_model_card(tags="mine")
    metadata = (tmp_path / "README.md").read_text().split("\n---\n")[0]
    assert metadata.count("- hf_featreuse\n") == metadata.count("- leaves\n") == 1 and "- mine" in metadata
