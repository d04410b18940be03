"""Engines and optimizers that do not work with feature reuse are refused at construction, with an alternative."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import build, examples
from training_runs import config, options, same_bits, state_of, traces
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.training_args import OptimizerNames

from hf_featreuse import ConfigurationError, FeatureReuseTrainer
from hf_featreuse.trainer import unsupported

PLAIN = {"stochastic_depth_steps": 0, "masked_freeze_steps": 0}


def deepspeed(args: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    args.deepspeed = "zero1.json"


def deepspeed_plugin(args: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    args.deepspeed_plugin = object()


def deepspeed_launch(args: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


def fsdp1(args: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    args.fsdp, args.fsdp_plugin_args = True, {"fsdp_version": 1}


def fsdp_of_xla(args: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    args.fsdp, args.fsdp_plugin_args = True, None


def fsdp1_launch(args: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    # accelerate's version if none is named.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")


def data_parallel(args: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    args._n_gpu = 2


CASES = {
    deepspeed: ("DeepSpeed", "torchrun"),
    deepspeed_plugin: ("DeepSpeed", "torchrun"),
    deepspeed_launch: ("DeepSpeed", "torchrun"),
    fsdp1: ("FSDP version 1", '"version": 2'),
    fsdp_of_xla: ("FSDP version 1", '"version": 2'),
    fsdp1_launch: ("FSDP version 1", "fsdp_version: 2"),
    data_parallel: ("nn.DataParallel on 2 GPUs", "torchrun --nproc_per_node"),
}


def construct(args: TrainingArguments, **changed: Any) -> FeatureReuseTrainer:
    return FeatureReuseTrainer(build("vit"), args, train_dataset=examples(4), **changed)


def assert_refused(args: TrainingArguments, what: str, way_out: str, **changed: Any) -> None:
    model = build("vit")
    before, weights = traces(model), state_of(model)
    with pytest.raises(ConfigurationError) as caught:
        FeatureReuseTrainer(model, args, train_dataset=examples(4), **changed)
    assert str(caught.value).startswith(what)
    assert "cannot be used with feature reuse" in str(caught.value)
    assert way_out in str(caught.value)
    assert traces(model) == before
    assert same_bits(state_of(model), weights)


@pytest.mark.parametrize("engine", CASES, ids=lambda engine: engine.__name__)
def test_an_engine_is_refused(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = config(tmp_path)
    engine(args, monkeypatch)
    assert_refused(args, *CASES[engine])


def test_plain_training_arguments_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = TrainingArguments(**options(tmp_path))
    data_parallel(args, monkeypatch)
    assert_refused(args, "nn.DataParallel", "torchrun")


@pytest.mark.parametrize("engine", [deepspeed, fsdp1, data_parallel], ids=lambda engine: engine.__name__)
def test_plain_training_is_not_refused(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = construct(config(tmp_path, **PLAIN))
    engine(trainer.args, monkeypatch)
    made: list[bool] = []
    # How Trainer itself handles an engine that is not installed does not matter here.
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", lambda _: made.append(True))
    trainer.create_accelerator_and_postprocess()
    assert made == [True]
    trainer.args.stochastic_depth_steps = 1
    with pytest.raises(ConfigurationError):
        trainer.create_accelerator_and_postprocess()


def test_fsdp2_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = config(tmp_path)
    args.fsdp, args.fsdp_plugin_args = True, {"fsdp_version": 2}
    unsupported.check_engine(args, None)
    args = config(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    unsupported.check_engine(args, None)


def test_a_model_on_several_devices_does_not_use_data_parallel(tmp_path: Path) -> None:
    args, model = config(tmp_path), build("vit")
    args._n_gpu = 2
    model.hf_device_map = {"vit": 0, "classifier": 1}
    unsupported.check_engine(args, model)
    model.hf_device_map = {"": 0}
    with pytest.raises(ConfigurationError):
        unsupported.check_engine(args, model)


@pytest.mark.parametrize("name", unsupported.OPTIMIZERS)
def test_an_optimizer_is_refused_by_name(name: str, tmp_path: Path) -> None:
    assert_refused(config(tmp_path, optim=name), f'`optim="{name}"`', "adamw_torch")


def test_the_table_names_every_such_optimizer_of_transformers() -> None:
    names = {name.value for name in OptimizerNames}
    marked = {name for name in names if "layerwise" in name or "schedule_free" in name or "lomo" in name}
    assert set(unsupported.OPTIMIZERS) == marked
    assert len(marked) == 9


def test_plain_training_accepts_such_an_optimizer(tmp_path: Path) -> None:
    assert construct(config(tmp_path, optim="lomo", **PLAIN)).args.optim == "lomo"


@pytest.fixture
def schedule_free(monkeypatch: pytest.MonkeyPatch) -> type[torch.optim.Optimizer]:
    """A class like that of the package `schedulefree`, and a subclass."""
    module = ModuleType("schedulefree.adamw")
    exec("import torch\nclass AdamWScheduleFree(torch.optim.SGD): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "schedulefree.adamw", module)
    return type("Own", (module.AdamWScheduleFree,), {"__module__": "elsewhere"})


def test_an_optimizer_is_refused_as_an_object_and_as_a_class(schedule_free: Any, tmp_path: Path) -> None:
    optimizer = schedule_free([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    what = "The optimizer elsewhere.Own"
    assert_refused(config(tmp_path), what, "adamw_torch", optimizers=(optimizer, None))
    assert_refused(config(tmp_path), what, "adamw_torch", optimizer_cls_and_kwargs=(schedule_free, {"lr": 0.1}))
    dummy = LayerWiseDummyOptimizer(optimizer_dict={})
    assert_refused(config(tmp_path), "The optimizer transformers", "layerwise", optimizers=(dummy, None))
    construct(config(tmp_path, **PLAIN), optimizers=(optimizer, None))


def test_ordinary_optimizers_pass(tmp_path: Path) -> None:
    for name in ("adamw_torch", "sgd", "adafactor", "galore_adamw", "apollo_adamw"):
        construct(config(tmp_path, optim=name))
    construct(config(tmp_path), optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 0.1}))
