"""An interrupted and resumed run is bit-identical to an uninterrupted one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, batch, build, examples
from torch import nn
from training_runs import TIMES, RecordingTrainer, config, options, same_bits, state_of, train, with_dropout
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments

from hf_featreuse import FeatureReuseTrainer

STEPS = 6


def resumable(
    architecture: str, folder: Path, kind: type[RecordingTrainer] = RecordingTrainer, **changed: Any
) -> RecordingTrainer:
    """A trainer with dropout and accumulation, three optimizer steps per epoch and a checkpoint at each step."""
    arguments = config(
        folder,
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "weight_decay": 0.1,
            **changed,
        },
    )
    return kind(
        with_dropout(build(architecture)), arguments, train_dataset=examples(12), eval_dataset=examples(4, seed=3)
    )


def history(trainer: Trainer) -> list[dict[str, float]]:
    """The log from the first step on, without times."""
    return [
        {key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in trainer.state.log_history
    ]


def assert_same_run(resumed: RecordingTrainer, whole: RecordingTrainer, step: int) -> None:
    assert resumed.plans == [plan for plan in whole.plans if plan[0] >= step]
    assert history(resumed) == history(whole)
    assert same_bits(state_of(resumed.model), state_of(whole.model))
    assert same_bits(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert same_bits(resumed.lr_scheduler.state_dict(), whole.lr_scheduler.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [(1, 1), (2, 1)], ids=["1-1", "2-1"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resuming_at_every_step_of_a_cycle_equals_the_uninterrupted_run(
    architecture: str, ratio: tuple[int, int], tmp_path: Path
) -> None:
    cycle = {"stochastic_depth_steps": ratio[0], "masked_freeze_steps": ratio[1]}
    whole = train(resumable(architecture, tmp_path, **cycle))
    assert len({plan for _, plan in whole.plans}) > 2
    for step in (1, 2, 3, 4):
        resumed = resumable(architecture, tmp_path / "again", save_strategy="no", **cycle)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole, step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"bf16": True},
        {"dataloader_num_workers": 1},
        {"reuse_start": 0.3, "reuse_end": 0.9},
        {"drop_granularity": "sample"},
        {"vanilla_steps": 1, "drop_rate_over_time": "falling", "train_trunk": "head"},
        {"drop_granularity": "sample", "drop_rate_over_time": "rising", "stochastic_depth_steps": 2},
    ],
    ids=["sgd", "bf16", "workers", "window", "sample", "cycle", "sample-rising"],
)
def test_resuming_equals_the_uninterrupted_run_with(changed: dict[str, Any], tmp_path: Path) -> None:
    whole = train(resumable("vit", tmp_path, **changed))
    resumed = resumable("vit", tmp_path / "again", save_strategy="no", **changed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_run(resumed, whole, 2)


@pytest.mark.slow
@pytest.mark.parametrize("request_", [True, "last"])
def test_the_newest_checkpoint_is_taken_when_asked_for(request_: str | bool, tmp_path: Path) -> None:
    whole = train(resumable("vit", tmp_path))
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    resumed = resumable("vit", tmp_path)
    resumed.train(resume_from_checkpoint=request_)
    assert_same_run(resumed, whole, 3)


def test_resuming_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        resumable("vit", tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_the_best_model_is_loaded_exactly(architecture: str, tmp_path: Path) -> None:
    weights: dict[int, Any] = {}

    class Keeping(RecordingTrainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            weights[self.state.global_step] = state_of(self.model)
            super()._save_checkpoint(*args, **kwargs)

    arguments = config(
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="best_in_the_middle",
        greater_is_better=True,
    )
    scores = iter([0.1, 0.5, 0.9, 0.2, 0.3, 0.4])
    trainer = Keeping(
        build(architecture),
        arguments,
        train_dataset=examples(),
        eval_dataset=examples(4),
        compute_metrics=lambda _: {"best_in_the_middle": next(scores)},
    )
    trainer.train()
    assert trainer.state.best_global_step == 3
    assert same_bits(state_of(trainer.model), weights[3])
    assert not same_bits(weights[3], weights[6])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_of_the_stock_trainer_is_restored(architecture: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(**options(tmp_path, save_strategy="steps", save_steps=3, max_steps=3))
    stock = train(Trainer(build(architecture), arguments, train_dataset=examples()))
    restored: list[Any] = []

    class Look(TrainerCallback):
        def on_train_begin(self, *_: Any, model: nn.Module, **kwargs: Any) -> None:
            restored.append(state_of(model))

    ours = FeatureReuseTrainer(
        build(architecture, seed=9), config(tmp_path, max_steps=4), train_dataset=examples(), callbacks=[Look()]
    )
    ours.train(resume_from_checkpoint=True)
    assert ours.state.global_step == 4
    assert same_bits(restored[0], state_of(stock.model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_loads_with_plain_from_pretrained(architecture: str, tmp_path: Path) -> None:
    trainer = train(resumable(architecture, tmp_path, save_steps=STEPS))
    trainer.save_model(str(tmp_path / "final"))
    model = trainer.model.eval()
    for folder in ("final", f"checkpoint-{STEPS}"):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / folder).eval()
        assert type(loaded) is type(model)
        with torch.no_grad():
            inputs = batch()["pixel_values"]
            assert torch.equal(loaded(inputs).logits, model(inputs).logits)
