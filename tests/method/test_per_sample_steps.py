"""Steps and training runs in which every sample has its own set of blocks."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from sample_checks import assert_same_gradients, gradients, sample_schedule
from scaling_reference import drop_path_around
from tiny_models import WITHOUT_BATCH_NORM, build, examples
from training_runs import RecordingTrainer, config, train, with_dropout

from hf_featreuse import (
    ConfigurationError,
    FeatureReuse,
    FeatureReuseSchedule,
    StepError,
    StepKind,
    StepPlan,
    find_residual_blocks,
)

# A step


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
@pytest.mark.parametrize("step", [0, 1])
def test_the_model_is_as_before_after_a_step_and_after_an_error(name: str, step: int):
    model = build(name)
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)))
    before = tiny_models.snapshot(model)
    with reuse.step(step, batch_size=4):
        copied = copy.deepcopy(model)
        model(**tiny_models.batch(4)).loss.backward()
    assert tiny_models.snapshot(model) == before
    assert [type(module) for module in copied.modules()] == before["classes"]
    with pytest.raises(ZeroDivisionError), reuse.step(step, batch_size=4):
        raise ZeroDivisionError
    assert tiny_models.snapshot(model) == before


@pytest.mark.parametrize("step", [0, 1])
def test_only_what_a_step_trains_has_gradients(step: int):
    model = build("vit")
    blocks = find_residual_blocks(model)
    # Rates at which some of the blocks, but not all, are dropped by both samples, or by none.
    schedule = sample_schedule(len(blocks), drop_rate=0.3 if step else 0.7)
    reuse = FeatureReuse(model, blocks, schedule, train_trunk=False)
    with reuse.step(step, batch_size=2) as plan:
        model(**tiny_models.batch(2)).loss.backward()
    trained = set()
    for index, block in enumerate(blocks):
        trains = plan.sample_masks[:, index].any() if step else not plan.sample_masks[:, index].all()
        assert all((parameter.grad is not None) == trains for parameter in block.module.parameters())
        trained.add(bool(trains))
    assert trained == {True, False}
    assert (model.classifier.weight.grad is None) == bool(step)
    assert (model.vit.embeddings.cls_token.grad is None) == bool(step)


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
def test_a_trunk_that_trains_learns_from_every_sample(name: str):
    model = build(name).eval()
    blocks = find_residual_blocks(model)
    inputs = tiny_models.batch(6)
    model(**inputs).loss.backward()
    whole = gradients(model)
    found = {}
    for train_trunk in (False, True):
        reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)), train_trunk=train_trunk)
        with reuse.step(1, batch_size=6):
            model(**inputs).loss.backward()
        found[train_trunk] = gradients(model)
    inside = {key for key in whole if any(key.startswith(f"{block.name}.") for block in blocks)}
    assert_same_gradients(found[True], {key: found[False][key] if key in inside else whole[key] for key in whole})


@pytest.mark.parametrize("scale_kept", [False, True])
def test_kept_samples_are_scaled_by_the_rate_of_the_block(scale_kept: bool):
    model = build("vit").eval()
    blocks = find_residual_blocks(model)
    schedule = sample_schedule(4, drop_rate_schedule="linear", drop_rate=0.6)
    reuse = FeatureReuse(model, blocks, schedule, scale_kept=scale_kept)
    with torch.no_grad(), reuse.step(0, batch_size=8) as plan:
        logits = model(**tiny_models.batch(8)).logits
    # Rates of 0.15, 0.3, 0.45 and 0.6, rounded to sixteenths.
    survival = [14 / 16, 11 / 16, 9 / 16, 6 / 16] if scale_kept else [1.0] * 4
    with torch.no_grad(), drop_path_around(blocks, plan.sample_masks, survival):
        torch.testing.assert_close(logits, model(**tiny_models.batch(8)).logits, rtol=1e-5, atol=1e-5)


def test_gradients_of_micro_batches_add_up():
    model = build("vit").eval()
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)))
    inputs = tiny_models.batch(8)
    for step in (0, 1):
        with reuse.step(step, batch_size=8):
            model(**inputs).loss.backward()
        wanted = gradients(model)
        for position in (0, 3, 6):
            part = {key: value[position : position + 3] for key, value in inputs.items()}
            with reuse.step(step, batch_size=len(part["labels"]), position=position):
                (model(**part).loss * len(part["labels"]) / 8).backward()
        assert_same_gradients(gradients(model), wanted)


@pytest.mark.parametrize("step", [0, 1])
def test_a_batch_in_which_nothing_trains(step: int):
    model = build("vit")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("vit.layers"))
    blocks = find_residual_blocks(model)

    class Constant(FeatureReuseSchedule):
        def plan(self, global_step, *, batch_size=None, position=0):
            kind = super().plan(global_step, batch_size=batch_size).kind
            return StepPlan(kind, sample_masks=np.full((batch_size, 4), kind is StepKind.STOCHASTIC_DEPTH))

    reuse = FeatureReuse(model, blocks, Constant(4, drop_granularity="sample"))
    with reuse.step(step, batch_size=3):
        model(**tiny_models.batch(3)).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_and_checkpointing_give_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = with_dropout(build("vit")).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        blocks = find_residual_blocks(model)
        reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)), scale_kept=True)
        for step in (0, 1):
            torch.manual_seed(7)
            with reuse.step(step, batch_size=6):
                model(**tiny_models.batch(6)).loss.backward()
            found.append(gradients(model))
    for plain, checkpointed in ((found[0], found[2]), (found[1], found[3])):
        assert all(
            torch.equal(value, checkpointed[name]) if value is not None else checkpointed[name] is None
            for name, value in plain.items()
        )


def test_the_number_of_samples_is_needed_and_checked():
    model = build("vit")
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks)))
    with pytest.raises(ConfigurationError, match=r"Pass `batch_size"), reuse.step(0):
        pass
    with (
        pytest.raises(StepError, match=r"vit\.layers\.0 was called with 4 samples .* planned for 3"),
        reuse.step(0, batch_size=3),
    ):
        model(**tiny_models.batch(4))


# Training


def run(folder: Path, **changed) -> RecordingTrainer:
    # SGD: where a gradient is zero but for rounding, AdamW would move by the whole learning rate.
    options = {"drop_granularity": "sample", "max_steps": 6, "logging_steps": 3, "optim": "sgd", **changed}
    return train(RecordingTrainer(build("vit"), config(folder, **options), train_dataset=examples(48)))


def test_accumulation_changes_nothing(tmp_path: Path):
    whole = run(tmp_path, per_device_train_batch_size=8)
    for size in (4, 2):
        parts = run(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        count = 8 // size
        for index, (step, plan) in enumerate(whole.plans):
            pieces = parts.plans[index * count : (index + 1) * count]
            assert {piece_step for piece_step, _ in pieces} == {step}
            assert {piece.kind for _, piece in pieces} == {plan.kind}
            assert np.array_equal(np.concatenate([piece.sample_masks for _, piece in pieces]), plan.sample_masks)
        for name, value in whole.model.state_dict().items():
            torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        for entry, expected in zip(parts.state.log_history[:-1], whole.state.log_history, strict=False):
            assert entry["dropped_blocks"] == pytest.approx(expected["dropped_blocks"])
            assert entry["loss/masked_freeze"] == pytest.approx(expected["loss/masked_freeze"], rel=1e-4)
            # A micro-batch that is small may need no gradient below a block where the whole batch does.
            assert 0.9 * expected["compute_share"] < entry["compute_share"] <= expected["compute_share"] + 1e-9
    # Both steps of a cycle have the same masks, the cycles different ones.
    masks = [plan.sample_masks for _, plan in whole.plans]
    assert all(np.array_equal(masks[index], masks[index + 1]) for index in (0, 2, 4))
    assert not np.array_equal(masks[0], masks[2])


def test_a_smaller_last_micro_batch_stands_where_a_full_one_would(tmp_path: Path):
    trainer = RecordingTrainer(
        build("vit"),
        config(tmp_path, drop_granularity="sample", max_steps=4, gradient_accumulation_steps=2),
        train_dataset=examples(14),
    )
    train(trainer)
    assert [len(plan.sample_masks) for _, plan in trainer.plans] == [4, 4, 4, 2] * 2
    for index, (step, plan) in enumerate(trainer.plans):
        size, position = len(plan.sample_masks), 4 * (index % 2)
        expected = trainer.feature_reuse.schedule.plan(step, batch_size=size, position=position)
        assert np.array_equal(plan.sample_masks, expected.sample_masks)
        other = trainer.feature_reuse.schedule.plan(step, batch_size=size, position=size * (index % 2))
        assert size == 4 or not np.array_equal(plan.sample_masks, other.sample_masks)


_RANKS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from tiny_models import build, examples
from training_runs import config, RecordingTrainer, train
folder = Path({folder!r})
trainer = RecordingTrainer(
    build("vit"),
    config(folder, drop_granularity="sample", max_steps=4, optim="sgd", per_device_train_batch_size=2,
           gradient_accumulation_steps=2),
    train_dataset=examples(48),
)
train(trainer)
torch.save(
    {{"weights": trainer.model.state_dict(), "masks": [plan.sample_masks.tolist() for _, plan in trainer.plans]}},
    folder / f"rank{{trainer.args.process_index}}.pt",
)
"""


@pytest.mark.slow
def test_the_number_of_ranks_changes_nothing(tmp_path: Path):
    whole = run(tmp_path, per_device_train_batch_size=8, max_steps=4)
    script = tmp_path / "train.py"
    script.write_text(_RANKS.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for index, (_, plan) in enumerate(whole.plans):
        pieces = [ranks[rank]["masks"][2 * index + micro] for micro in (0, 1) for rank in (0, 1)]
        assert [mask for piece in pieces for mask in piece] == plan.sample_masks.tolist()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trunk", ["all", "head", "none"])
def test_a_process_whose_samples_train_nothing_does_not_let_the_others_wait(trunk, monkeypatch):
    model = build("vit")
    blocks = find_residual_blocks(model)
    reuse = FeatureReuse(model, blocks, sample_schedule(len(blocks), drop_rate=0.1), train_trunk=trunk)
    idle = next(step for step in range(1, 999, 2) if not reuse.plan(step, batch_size=1).sample_masks.any())
    before = tiny_models.snapshot(model)
    with reuse.step(idle, batch_size=1):
        model(**tiny_models.batch(1)).loss.backward()
    monkeypatch.setattr(FeatureReuse, "_is_distributed", True)
    model.zero_grad(set_to_none=True)
    if trunk == "none":
        with (
            pytest.raises(StepError, match=f"No sample of this process trains a block in step {idle}"),
            reuse.step(idle, batch_size=1),
        ):
            pass
        assert tiny_models.snapshot(model) == before
    else:
        with reuse.step(idle, batch_size=1):
            model(**tiny_models.batch(1)).loss.backward()
        assert any(parameter.grad is not None for parameter in model.parameters())


def test_sixteen_samples_always_train_something():
    schedule = sample_schedule(4, drop_rate=0.01)
    for step in range(200):
        masks = schedule.plan(step, batch_size=16).sample_masks
        assert masks.any(0).all() and not masks.all(0).any()
