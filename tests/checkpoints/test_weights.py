"""Checkpoints are complete and are loaded exactly, or they are refused."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from test_resume import assert_same_run, resumable
from tiny_models import ARCHITECTURES, build, examples
from torch import nn
from training_runs import config, same_bits, state_of, train

from hf_featreuse import CheckpointError, FeatureReuseTrainer
from hf_featreuse.checkpoints import completeness
from hf_featreuse.checkpoints.completeness import checkpoint_fault, last_whole_checkpoint, resolve_checkpoint
from hf_featreuse.checkpoints.weights import load_weights

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
WEIGHTS = "model.safetensors"


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a weights file."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def without_digests(folder: Path) -> None:
    """Make a checkpoint one of an older version, which recorded only the names of files."""
    path = folder / "resume_state.json"
    state = json.loads(path.read_text())
    del state["digest"], state["trainer_state"]
    path.write_text(json.dumps({**state, "files": list(state["files"])}))


def inside_names(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder, save_original_format=False)


def legacy_names(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)


def shards(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="10KB")
    assert (folder / f"{WEIGHTS}.index.json").is_file()


def pickled(model: nn.Module, folder: Path) -> None:
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize("write", [legacy_names, inside_names, shards, pickled])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_comes_back_exactly(architecture: str, write: Callable, tmp_path: Path) -> None:
    saved, model = build(architecture), build(architecture, seed=9)
    write(saved, tmp_path / "saved")
    load_weights(model, tmp_path / "saved")
    assert same_bits(state_of(model), state_of(saved))


def test_the_stock_names_of_vit_are_not_those_inside(tmp_path: Path) -> None:
    legacy_names(build("vit"), tmp_path)
    assert set(safetensors.torch.load_file(tmp_path / WEIGHTS)) != set(build("vit").state_dict())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mixed", [False, True], ids=["bfloat16", "mixed"])
def test_low_precision_weights_come_back_exactly(architecture: str, mixed: bool, tmp_path: Path) -> None:
    def cast(model: nn.Module) -> nn.Module:
        model.to(torch.bfloat16)
        if mixed:
            model.classifier.float()
        return model

    saved, model = cast(build(architecture)), cast(build(architecture, seed=9))
    if mixed:
        nn.init.normal_(saved.classifier[-1].weight if architecture == "resnet" else saved.classifier.weight)
    saved.save_pretrained(tmp_path)
    load_weights(model, tmp_path)
    assert same_bits(state_of(model), state_of(saved))
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in saved.parameters()}


def test_double_precision_weights_come_back_exactly(tmp_path: Path) -> None:
    saved, model = build("vit").double(), build("vit", seed=9).double()
    for parameter in saved.parameters():
        nn.init.normal_(parameter)
    saved.save_pretrained(tmp_path)
    load_weights(model, tmp_path)
    assert same_bits(state_of(model), state_of(saved))


def lose_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[5]]


def add_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["from.elsewhere"] = torch.zeros(2)


def reshape_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["classifier.weight" if "classifier.weight" in tensors else "classifier.1.weight"] = torch.zeros(5, 7)


@pytest.mark.parametrize("change", [lose_one, add_one, reshape_one])
@pytest.mark.parametrize("write", [legacy_names, inside_names])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_that_does_not_fit_is_refused_entirely(
    architecture: str, write: Callable, change: Callable, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write(build(architecture), tmp_path / "saved")
    edit(tmp_path / "saved", change)
    model = build(architecture, seed=9)
    before = state_of(model)
    with pytest.raises(CheckpointError, match="Nothing was loaded"):
        load_weights(model, tmp_path / "saved")
    assert same_bits(state_of(model), before)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    shards(build("vit"), tmp_path / "saved")
    sorted((tmp_path / "saved").glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError):
        load_weights(build("vit"), tmp_path / "saved")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_weights(build("vit"), tmp_path)


def test_a_model_from_outside_transformers_is_loaded_strictly(tmp_path: Path) -> None:
    saved, model = nn.Linear(2, 3), nn.Linear(2, 3)
    safetensors.torch.save_file(saved.state_dict(), tmp_path / WEIGHTS)
    load_weights(model, tmp_path)
    assert same_bits(state_of(model), state_of(saved))
    safetensors.torch.save_file({"weight": saved.weight.data}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="bias"):
        load_weights(model, tmp_path)


@pytest.mark.parametrize("write", [legacy_names, inside_names])
def test_loading_draws_no_random_number(write: Callable, tmp_path: Path) -> None:
    model = build("vit")
    write(model, tmp_path / "saved")
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    config_before = model.config.to_dict()
    load_weights(model, tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert model.config.to_dict() == config_before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An uninterrupted run with a checkpoint at each step."""
    folder = tmp_path_factory.mktemp("finished")
    return train(resumable("vit", folder)), folder


@pytest.fixture
def run(finished: tuple[Any, Path], tmp_path: Path) -> Path:
    """A copy of its folder that ends at step 3."""
    folder = tmp_path / "run"
    for step in (1, 2, 3):
        shutil.copytree(finished[1] / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


@pytest.fixture
def warnings_said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(completeness.logger, "warning", said.append)
    return said


def test_a_whole_checkpoint_has_no_fault(run: Path, warnings_said: list[str]) -> None:
    assert set(FILES) <= {path.name for path in (run / "checkpoint-3").iterdir()}
    assert checkpoint_fault(run / "checkpoint-3") is None
    assert last_whole_checkpoint(run) == str(run / "checkpoint-3")
    assert last_whole_checkpoint(run, not_after=2) == str(run / "checkpoint-2")
    assert warnings_said == []


@pytest.mark.parametrize("name", [*FILES, "training_args.bin"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_is_found(name: str, keep: float, run: Path) -> None:
    path = run / "checkpoint-3" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert checkpoint_fault(path.parent) == f"{name} is cut short"


def test_checkpoints_are_ordered_by_number_and_other_folders_ignored(run: Path) -> None:
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-10")
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-best")
    assert last_whole_checkpoint(run) == str(run / "checkpoint-10")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FILES, "deleted state"])
def test_resuming_falls_back_to_the_last_complete_checkpoint_and_warns(
    fault: str, run: Path, finished: tuple[Any, Path], warnings_said: list[str]
) -> None:
    if fault == "deleted state":
        (run / "checkpoint-3" / "trainer_state.json").unlink()
    else:
        cut(run / "checkpoint-3" / fault)
    resumed = resumable("vit", run, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, finished[0], 2)
    assert len(warnings_said) == 1
    assert str(run / "checkpoint-2") in warnings_said[0]
    assert str(run / "checkpoint-3") in warnings_said[0]
    assert "trainer_state.json" in warnings_said[0] if fault == "deleted state" else fault in warnings_said[0]


def test_a_checkpoint_that_is_named_is_refused_with_the_complete_one_before_it(run: Path) -> None:
    cut(run / "checkpoint-2" / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"checkpoint-2 cannot .* cut short\. Pass .*{run}/checkpoint-1'"):
        resolve_checkpoint(str(run / "checkpoint-2"), str(run))
    cut(run / "checkpoint-1" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"cut short\. Pass the folder of another checkpoint"):
        resolve_checkpoint(str(run / "checkpoint-2"), str(run))


def test_no_whole_checkpoint_is_an_error_that_names_them(run: Path) -> None:
    for step in (1, 2, 3):
        cut(run / f"checkpoint-{step}" / WEIGHTS)
    for asked in (True, "last"):
        with pytest.raises(CheckpointError, match=r"checkpoint-3 \(model.safetensors is cut short\).*checkpoint-1"):
            resumable("vit", run).train(resume_from_checkpoint=asked)


@pytest.mark.parametrize("path", ["checkpoint-77", "", "checkpoint-1/model.safetensors"])
def test_a_path_that_is_not_a_directory_is_an_error(path: str, run: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory") as caught:
        resolve_checkpoint(path and str(run / path), str(run))
    assert isinstance(caught.value, ValueError)  # As in Trainer.


def test_what_was_asked_for_is_taken_as_it_is(run: Path) -> None:
    assert resolve_checkpoint(str(run / "checkpoint-1"), str(run)) == str(run / "checkpoint-1")
    assert resolve_checkpoint(None, str(run)) is None
    assert resolve_checkpoint(False, str(run)) is None


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_resuming_refuses_a_checkpoint_that_lost_a_weight(architecture: str, tmp_path: Path) -> None:
    train(resumable(architecture, tmp_path, max_steps=2))
    edit(tmp_path / "checkpoint-2", lose_one)
    without_digests(tmp_path / "checkpoint-2")
    trainer = resumable(architecture, tmp_path)
    before = state_of(trainer.model)
    with pytest.raises(CheckpointError, match="missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 0
    assert same_bits(state_of(trainer.model), before)


def adapter_trainer(folder: Path, **changed: Any) -> FeatureReuseTrainer:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        build("vit"), LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    )
    return FeatureReuseTrainer(model, config(folder, **changed), train_dataset=examples())


def test_an_adapter_is_resumed_exactly(tmp_path: Path) -> None:
    whole = train(adapter_trainer(tmp_path, save_strategy="steps", save_steps=2))
    resumed = adapter_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_bits(state_of(resumed.model), state_of(whole.model))


def test_an_adapter_that_lost_a_weight_is_refused(tmp_path: Path) -> None:
    train(adapter_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2))
    path = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    lose_one(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    without_digests(tmp_path / "checkpoint-2")
    trainer = adapter_trainer(tmp_path)
    before = copy.deepcopy(state_of(trainer.model))
    with pytest.raises(CheckpointError, match="adapter"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_bits(state_of(trainer.model), before)


def test_the_state_file_is_json_to_its_end(run: Path) -> None:
    path = run / "checkpoint-3" / "trainer_state.json"
    assert json.loads(path.read_text())["global_step"] == 3
