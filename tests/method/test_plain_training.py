"""A drop rate of zero is plain training: bitwise that of no steps of either kind, without blocks, compiled whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, build, examples
from torch import nn
from torch._dynamo import OptimizedModule
from training_runs import config, losses, options, plain_net, same_bits, state_of, train, with_dropout
from transformers import Trainer, TrainingArguments

from hf_featreuse import ConfigurationError, FeatureReuseTrainer, StepKind
from hf_featreuse.method.schedule import VANILLA_PLAN

NO_STEPS = {"stochastic_depth_steps": 0, "masked_freeze_steps": 0}
# Options that would change, or forbid, steps of feature reuse.
AND_MORE = {"drop_granularity": "sample", "vanilla_steps": 1, "drop_rate_over_time": "falling", "train_trunk": "head"}


def model_of(architecture: str) -> nn.Module:
    return plain_net() if architecture == "plain" else with_dropout(build(architecture))


def run(architecture: str, folder: Path, **changed: Any) -> FeatureReuseTrainer:
    changed = {"weight_decay": 0.1, "gradient_accumulation_steps": 2, **changed}
    return train(FeatureReuseTrainer(model_of(architecture), config(folder, **changed), train_dataset=examples()))


@pytest.mark.parametrize("more", [{}, AND_MORE], ids=["", "and more"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "plain"])
def test_a_rate_of_zero_is_plain_training_bitwise(architecture: str, more: dict[str, Any], tmp_path: Path) -> None:
    zero = run(architecture, tmp_path, drop_rate=0, **more)
    none = run(architecture, tmp_path, **NO_STEPS)
    assert same_bits(state_of(zero.model), state_of(none.model))
    assert same_bits(zero.optimizer.state_dict(), none.optimizer.state_dict())
    assert losses(zero) == losses(none)
    assert zero.feature_reuse.blocks == none.feature_reuse.blocks == []
    assert zero.step_costs is None
    assert zero.step_kind is StepKind.VANILLA
    assert [zero.feature_reuse.plan(step) for step in range(6)] == [VANILLA_PLAN] * 6


def test_it_is_the_training_of_the_stock_trainer(tmp_path: Path) -> None:
    arguments = TrainingArguments(**options(tmp_path, weight_decay=0.1, gradient_accumulation_steps=2))
    stock = train(Trainer(model_of("vit"), arguments, train_dataset=examples()))
    assert same_bits(state_of(stock.model), state_of(run("vit", tmp_path, drop_rate=0).model))


def test_it_compiles_the_whole_model(tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    assert isinstance(run("vit", tmp_path, drop_rate=0, **compiled).model_wrapped, OptimizedModule)
    assert not isinstance(run("vit", tmp_path, drop_rate=0.5, **compiled).model_wrapped, OptimizedModule)
    torch._dynamo.reset()


def test_it_resumes_and_feature_reuse_may_begin_after_it(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 3}
    whole = run("resnet", tmp_path, drop_rate=0, **saved)
    resumed = FeatureReuseTrainer(
        model_of("resnet"),
        config(tmp_path / "again", drop_rate=0, weight_decay=0.1, gradient_accumulation_steps=2),
        train_dataset=examples(),
    )
    checkpoint = str(tmp_path / "checkpoint-3")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same_bits(state_of(resumed.model), state_of(whole.model))
    kinds: list[StepKind] = []

    class Noting(FeatureReuseTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            kinds.append(self.step_kind)
            return loss

    later = Noting(model_of("resnet"), config(tmp_path / "later", reuse_start=0.5), train_dataset=examples())
    later.train(resume_from_checkpoint=checkpoint)
    assert StepKind.STOCHASTIC_DEPTH in kinds
    at_once = Noting(model_of("resnet"), config(tmp_path / "later"), train_dataset=examples())
    with pytest.raises(ConfigurationError, match=r"step 0 was vanilla.*drop_rate=0"):
        at_once.train(resume_from_checkpoint=checkpoint)
