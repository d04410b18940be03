"""Pushes with the real client to a server on loopback: what arrives, how failures are reported, and loading again.

Runs happen in a process whose client was told of the server before it was imported; loading, in one that cannot
import this package.
"""

import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import urlopen

import hub_loads
import hub_runs
import pytest
import torch
from hub_server import CUT, LOSE, serve
from safetensors.torch import load_file
from tiny_checkpoints import save
from tiny_models import build
from transformers import ViTForImageClassification

pytestmark = pytest.mark.slow

TINY = ["--config_overrides", "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=16"]
MODEL_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The server, a process that trains and pushes, and one that loads."""
    home = str(tmp_path_factory.mktemp("home"))
    with serve() as hub, pytest.MonkeyPatch.context() as patch:
        settings = {
            "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": home,
            "HF_TOKEN": "hf_writes", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "warning",
        }  # fmt: skip
        for name, value in settings.items():
            patch.setenv(name, value)
        spawn = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(1, spawn, hub_runs.set_up) as runs,
            ProcessPoolExecutor(1, spawn, hub_loads.set_up) as loads,
        ):
            yield SimpleNamespace(
                hub=hub,
                start=runs.submit,
                run=lambda *call, **options: runs.submit(*call, **options).result(timeout=180),
                load=lambda *call, **options: loads.submit(*call, **options).result(timeout=180),
            )


@pytest.fixture(autouse=True)
def _no_faults(world):
    world.hub.faults.clear()
    world.hub.uploads_pass.set()
    yield
    world.hub.uploads_pass.set()
    assert not any(b"hf_writes" in content for content in all_contents(world.hub)), "a token was pushed"


def all_contents(hub):
    return (
        content
        for repository in hub.repositories.values()
        for commits in repository.branches.values()
        for commit in commits
        for content in commit.files.values()
    )


def weights_of(commit, folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The weights in a commit, as plain transformers reads them."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(commit.files[f"{prefix}{name}"])
    return ViTForImageClassification.from_pretrained(folder).state_dict()


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def snippet_of(commit) -> str:
    return re.search(r"```python\n(.*?)```", commit.files["README.md"].decode(), flags=re.DOTALL).group(1)


# What is published


def test_the_example_publishes_all_that_belongs_and_plain_transformers_loads_it(world, tmp_path):
    out = tmp_path / "digits"
    world.run(
        hub_runs.run_example,
        *("--output_dir", str(out), *TINY, "--max_steps", "4", "--logging_steps", "1", "--disable_tqdm", "true"),
        *("--use_cpu", "true", "--push_to_hub", "--hub_token", "hf_writes", "--hub_model_id", "ada/example"),
        *("--hub_private_repo", "true", "--license", "mit", "--max_train_samples", "128"),
    )
    repository, commit = world.hub.repositories["ada/example"], world.hub.commits("ada/example")[-1]
    assert repository.private
    assert commit.message == "End of training"
    assert {*MODEL_FILES, "training.png", "all_results.json"} <= commit.files.keys()
    assert b"hf_writes" in (out / "training_args.bin").read_bytes()  # Why it must not be pushed.
    assert not [name for name in commit.files if name.endswith((".bin", ".pt")) or name.startswith("checkpoint")]
    assert commit.files["training.png"].startswith(b"\x89PNG")
    card = commit.files["README.md"].decode()
    for words in ("license: mit", "trained from scratch on scikit-learn digits", "](training.png)", "2411.09475"):
        assert words in card
    assert (out / "README.md").read_text() == card
    stored = world.load(hub_loads.weights, "ada/example", token="hf_reads")
    assert same(stored, weights_of(commit, tmp_path / "stored"))
    processor, answers = world.load(hub_loads.answers, "ada/example", token="hf_reads")
    assert processor.startswith("ViTImageProcessor")
    assert {answer["label"] for answer in answers} <= set("0123456789")
    assert "'label'" in world.load(hub_loads.run_snippet, snippet_of(commit))
    with pytest.raises(HTTPError, match="401"):  # A private repository, without a token.
        urlopen(f"{world.hub.url}/ada/example/resolve/main/config.json")


def test_an_adapter_is_published_with_its_labels_and_loads_by_its_card(world, tmp_path):
    # The base knows other labels, and more of them.
    config = ViTForImageClassification.config_class.from_dict({**build("vit").config.to_dict(), "id2label": None})
    config.num_labels = 5
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    assert world.run(hub_runs.push, tmp_path / "base", "ada/base", new_card=True)["error"] is None
    ended = world.run(
        hub_runs.train,
        tmp_path / "lora",
        **{"base": "ada/base", "push": {}, "push_to_hub": True, "hub_model_id": "ada/lora", "save_strategy": "steps"},
        **{"save_steps": 3, "hub_strategy": "every_save", "details": {"dataset": "ada/animals"}},
    )
    assert ended["error"] is None and ended["said"] == []
    *_, commit = commits = world.hub.commits("ada/lora")
    assert "Training in progress, step 3" in [c.message for c in commits]
    for c in commits:
        assert {"adapter_model.safetensors", "adapter_config.json", "config.json"} <= c.files.keys()
        assert "base_model: ada/base" in c.files["README.md"].decode()
    card = commit.files["README.md"].decode()
    for words in ("library_name: peft", "A LORA adapter", "[ada/animals]", "*masked-freeze*"):
        assert words in card
    assert world.load(hub_loads.run_snippet, snippet_of(commit)).strip() in hub_runs.ADAPTER_LABELS
    assert (tmp_path / "lora" / "config.json").is_file()


# During training


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_a_commit_of_step_k_holds_the_weights_of_step_k(world, tmp_path, strategy):
    repo, out = f"ada/{strategy}", tmp_path / "run"
    hub = world.hub
    hub.uploads_pass.clear()  # Nothing arrives before training is over.
    running = world.start(
        hub_runs.train,
        out,
        **{"push": {}, "push_to_hub": True, "hub_model_id": repo, "hub_strategy": strategy, "save_strategy": "steps"},
        **{"save_steps": 2, "hub_always_push": True, "save_total_limit": 1},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run-states" / "6.safetensors").is_file():
        assert time.monotonic() < deadline and not running.done(), running
        time.sleep(0.05)
    hub.uploads_pass.set()
    ended = running.result(timeout=120)
    assert ended["error"] is None and ended["said"] == []
    commits = hub.commits(repo)
    states = {step: load_file(tmp_path / "run-states" / f"{step}.safetensors") for step in range(1, 7)}
    assert not same(states[2], states[4])
    by_message = {commit.message: commit for commit in commits}
    for step in (2, 4, 6):
        commit = by_message[f"Training in progress, step {step}"]
        assert commit.files.keys() >= MODEL_FILES
        assert same(weights_of(commit, tmp_path / f"commit-{step}"), states[step])
        assert f"| `steps` | {step} |" in commit.files["README.md"].decode()
        if strategy != "every_save":
            prefix = "last-checkpoint/" if strategy == "checkpoint" else f"checkpoint-{step}/"
            commit = by_message[f"Training in progress, step {step}, checkpoint"]
            assert same(weights_of(commit, tmp_path / f"checkpoint-{step}", prefix), states[step])
    assert same(weights_of(commits[-1], tmp_path / "last"), states[6])
    assert not list(out.glob("_push-*"))
    if strategy == "checkpoint":
        _resume_from_a_download(world, by_message["Training in progress, step 4, checkpoint"], tmp_path, states[6])


def _resume_from_a_download(world, commit, folder, last):
    """A pushed checkpoint resumes exactly."""
    again = folder / "again" / "checkpoint-4"
    again.mkdir(parents=True)
    for name, content in commit.files.items():
        if name.startswith("last-checkpoint/"):
            (again / name.removeprefix("last-checkpoint/")).write_bytes(content)
    ended = world.run(hub_runs.train, folder / "again", resume=str(again))
    assert ended["error"] is None
    assert same(load_file(folder / "again-states" / "6.safetensors"), last)


def test_a_push_in_the_background_sends_what_there_was_when_it_was_asked_for(world, tmp_path):
    ended = world.run(hub_runs.train, tmp_path / "run", push={"blocking": False, "private": True})
    assert ended["error"] is None
    commit = world.hub.repositories["ada/run"].find(ended["commit"])
    assert world.hub.repositories["ada/run"].private and "training.png" in commit.files


# Failures


@pytest.mark.parametrize("status", [503, CUT])
def test_failures_that_pass_are_retried(world, tmp_path, status):
    folder, repo = Path(save(tmp_path / "model")), f"ada/passing-{status}"
    world.hub.large.clear()  # What is there is not sent again.
    for call in ("POST /api/repos/create", "/api/validate-yaml", "/preupload/", "PUT /lfs/", "/commit/"):
        world.hub.fail(call, status)
    pushed = world.run(hub_runs.push, folder, repo, new_card=True)
    assert pushed["error"] is None
    assert [fault.times for fault in world.hub.faults] == [0] * 5
    (commit,) = world.hub.commits(repo)
    assert commit.files.keys() >= MODEL_FILES
    assert any("trying again" in text for text in pushed["said"])


def test_a_commit_whose_answer_is_lost_is_created_once(world, tmp_path):
    world.hub.fail("/commit/", LOSE)
    pushed = world.run(hub_runs.push, Path(save(tmp_path / "model")), "ada/lost", new_card=True)
    assert pushed["error"] is None and len(world.hub.commits("ada/lost")) == 1


@pytest.mark.parametrize("status", [503, CUT])
def test_a_push_that_fails_for_good_is_reported_and_can_be_repeated(world, tmp_path, status):
    out, repo = tmp_path / "run", f"ada/broken-{status}"
    world.hub.fail("/commit/", status, times=float("inf"))
    ended = world.run(
        hub_runs.train,
        out,
        **{"push": {}, "push_to_hub": True, "hub_model_id": repo, "hub_strategy": "every_save"},
        **{"save_strategy": "steps", "save_steps": 3, "hub_always_push": True},
    )
    assert ended["steps"] == 6  # Training went on to its end.
    command = f"featreuse push {out} {repo}"
    assert "the Hub does not answer" in ended["error"] and command in ended["error"]
    lost = [text for text in ended["said"] if "Training in progress, step" in text and "featreuse push" in text]
    assert f"featreuse push {out}/checkpoint-3 {repo} --new_card`" in lost[0] and f"checkpoint-6 {repo}" in lost[1]
    assert {*MODEL_FILES, "training.png"} <= {path.name for path in out.iterdir()} and not list(out.glob("_push-*"))
    assert world.hub.commits(repo) == []
    world.hub.faults.clear()
    code, said, _ = world.run(hub_runs.featreuse, "push", f"{out}/checkpoint-3", f"{repo}-3", "--new_card")
    assert code == 0 and "optimizer.pt" not in world.hub.commits(f"{repo}-3")[-1].files
    code, said, _ = world.run(hub_runs.featreuse, *command.split()[1:])
    assert code == 0 and f"{world.hub.url}/{repo}/commit/" in said
    (commit,) = world.hub.commits(repo)
    last = load_file(tmp_path / "run-states" / "6.safetensors")
    assert same(weights_of(commit, tmp_path / "stored"), last)
    assert "optimizer.pt" not in commit.files and not [name for name in commit.files if "checkpoint" in name]


@pytest.mark.parametrize(
    ("token", "reason"), [("hf_nobody", "does not accept the token"), ("hf_reads", "may not write")]
)
def test_a_token_that_is_refused_stops_before_training_but_loses_nothing_after_it(world, tmp_path, token, reason):
    options = {"hub_model_id": "ada/refused", "hub_token": token}
    before = world.run(hub_runs.train, tmp_path / "before", push_to_hub=True, **options)
    assert before["steps"] is None and reason in before["error"] and token not in before["error"]
    after = world.run(hub_runs.train, tmp_path / "after", push={}, **options)
    assert after["steps"] == 6 and reason in after["error"]
    assert {*MODEL_FILES, "training.png"} <= {path.name for path in (tmp_path / "after").iterdir()}
    assert "ada/refused" not in world.hub.repositories


# The command


def test_the_command_pushes_to_a_branch_and_with_checkpoints(world, tmp_path):
    out = tmp_path / "run"
    assert world.run(hub_runs.train, out, save_strategy="steps", save_steps=3, push={})["error"] is None
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, *_ = world.run(
        hub_runs.featreuse, "push", str(out), "branched", "--revision", "v1", "--private", "--checkpoints"
    )
    assert code == 0 and before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (commit,) = world.hub.commits("ada/branched", "v1")
    assert world.hub.repositories["ada/branched"].private and world.hub.commits("ada/branched") == []
    assert {"checkpoint-3/optimizer.pt", "checkpoint-6/model.safetensors", "training.png"} <= commit.files.keys()
    assert not [name for name in commit.files if "training_args" in name]
    # The card names the repository it lies in, not the one of the first push.
    assert 'repository = "ada/branched"' in commit.files["README.md"].decode()
    code, _, said = world.run(hub_runs.featreuse, "push", str(out), "bob/taken")
    assert code == 1 and said.startswith("featreuse: ") and "may not write" in said and "hf_writes" not in said
