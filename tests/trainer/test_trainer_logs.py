"""What FeatureReuseTrainer adds to the logs of Trainer."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, build, examples
from training_runs import RecordingTrainer, config, options, train
from transformers import TrainingArguments

from hf_featreuse import StepKind

ADDED = {"dropped_blocks", "compute_share", *(f"loss/{kind.value}" for kind in StepKind)}


class LossNoting(RecordingTrainer):
    """Notes the loss of every micro-batch as Trainer counts it."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.noted = [*getattr(self, "noted", []), (self.state.global_step, loss.item())]
        return loss


def entries(trainer: RecordingTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logs_are_means_over_the_steps_since_the_last_log(
    architecture: str, accumulation: int, tmp_path: Path
) -> None:
    every = 5
    arguments = config(
        tmp_path,
        max_steps=15,
        logging_steps=every,
        drop_rate=0.4,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
    )
    trainer = train(LossNoting(build(architecture), arguments, train_dataset=examples()))
    reuse, costs = trainer.feature_reuse, trainer.step_costs
    assert len(entries(trainer)) == 3
    for number, entry in enumerate(entries(trainer)):
        steps = range(number * every, (number + 1) * every)
        plans = [reuse.schedule.plan(step) for step in steps]
        counts = Counter(plan.kind for plan in plans)
        assert {key for key in entry if key.startswith("loss/")} == {f"loss/{kind.value}" for kind in counts}
        for kind, count in counts.items():
            of_kind = [
                loss for step, loss in trainer.noted if step in steps and reuse.schedule.plan(step).kind is kind
            ]
            assert entry[f"loss/{kind.value}"] == pytest.approx(sum(of_kind) / count, rel=1e-5)
        weighted = sum(count * entry[f"loss/{kind.value}"] for kind, count in counts.items()) / every
        assert weighted == pytest.approx(entry["loss"], rel=1e-5)
        assert entry["dropped_blocks"] == pytest.approx(sum(len(plan.dropped) for plan in plans) / every)
        assert entry["compute_share"] == pytest.approx(sum(costs.share(plan) for plan in plans) / every)
        assert 0 < entry["compute_share"] < 1
    assert {plan.kind for _, plan in trainer.plans} == set(StepKind)


def test_evaluation_and_final_logs_have_none_of_ours(tmp_path: Path) -> None:
    arguments = config(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer = RecordingTrainer(build("vit"), arguments, train_dataset=examples(), eval_dataset=examples(4))
    trainer.train()
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert sum("eval_loss" in entry for entry in others) == 3
    assert sum("train_runtime" in entry for entry in others) == 1
    assert all(not ADDED & set(entry) for entry in others)
    assert all({"dropped_blocks", "compute_share"} <= set(entry) for entry in entries(trainer))


def test_evaluating_between_two_logs_loses_no_step(tmp_path: Path) -> None:
    changed = {"max_steps": 4, "logging_steps": 4}
    plain = train(RecordingTrainer(build("vit"), config(tmp_path, **changed), train_dataset=examples()))
    arguments = config(tmp_path, eval_strategy="steps", eval_steps=1, **changed)
    evaluated = RecordingTrainer(build("vit"), arguments, train_dataset=examples(), eval_dataset=examples(4))
    evaluated.train()
    ours = [{key: entry[key] for key in ADDED & set(entry)} for entry in entries(evaluated)]
    assert ours == [{key: entry[key] for key in ADDED & set(entry)} for entry in entries(plain)]


def test_vanilla_steps_log_only_their_own_loss(tmp_path: Path) -> None:
    arguments = config(tmp_path, stochastic_depth_steps=0, masked_freeze_steps=0)
    for entry in entries(train(RecordingTrainer(build("vit"), arguments, train_dataset=examples()))):
        assert ADDED & set(entry) == {"loss/vanilla", "dropped_blocks", "compute_share"}
        assert entry["loss/vanilla"] == pytest.approx(entry["loss"])
        assert (entry["dropped_blocks"], entry["compute_share"]) == (0, 1)


def test_a_second_training_logs_nothing_of_the_first(tmp_path: Path) -> None:
    # Five steps, logged every three: two of the first run are never logged.
    arguments = config(tmp_path, max_steps=5, logging_steps=3)
    trainer = LossNoting(build("vit"), arguments, train_dataset=examples())
    trainer.train()
    trainer.noted = []
    trainer.train()
    reuse = trainer.feature_reuse
    entry = entries(trainer)[0]
    dropped = [len(reuse.schedule.plan(step).dropped) for step in range(3)]
    assert entry["dropped_blocks"] == pytest.approx(sum(dropped) / 3)
    assert entry["loss"] == pytest.approx(sum(loss for step, loss in trainer.noted if step < 3) / 3, rel=1e-5)


def test_a_loss_that_is_not_finite_is_left_out_as_trainer_does(tmp_path: Path) -> None:
    class Broken(RecordingTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            # The value alone: a gradient of NaN would end the run.
            return loss + float("nan") if self.state.global_step == 2 else loss

    arguments = config(tmp_path, max_steps=4, logging_steps=4)
    trainer = train(Broken(build("vit"), arguments, train_dataset=examples()))
    for entry in entries(trainer)[:1]:
        assert all(math.isfinite(value) for key, value in entry.items() if key.startswith("loss"))


def test_plain_training_arguments_log_the_same_keys(tmp_path: Path) -> None:
    arguments = TrainingArguments(**options(tmp_path, logging_steps=6))
    (entry,) = entries(train(RecordingTrainer(build("vit"), arguments, train_dataset=examples())))
    assert {"loss/stochastic_depth", "loss/masked_freeze", "dropped_blocks", "compute_share"} <= set(entry)
