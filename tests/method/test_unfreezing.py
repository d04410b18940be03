"""Gradual unfreezing: what trains when, bit-identical freezing, resume, cost, and with or without the other steps."""

from collections import Counter

import pytest
import torch
from tiny_models import batch, build, examples, snapshot
from training_runs import StepWatch, config, losses, same_bits, state_of, train, without_times

from hf_featreuse import (
    ConfigurationError,
    FeatureReuse,
    FeatureReuseConfig,
    FeatureReuseSchedule,
    FeatureReuseTrainer,
    StepKind,
    find_residual_blocks,
    measure_step_costs,
)

DEPTH, FREEZE, VANILLA = StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE, StepKind.VANILLA


# The schedule


def test_blocks_join_from_the_last_one_down():
    schedule = FeatureReuseSchedule(4, drop_rate=0, unfreeze_steps=8)
    assert [schedule.frozen_below(step) for step in range(10)] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    plan = schedule.plan(5)
    assert (plan.kind, plan.dropped, plan.frozen_below) == (VANILLA, (), 2)
    assert schedule.plan(8) == FeatureReuseSchedule(4, drop_rate=0).plan(8)


@pytest.mark.parametrize(("blocks", "steps"), [(4, 3), (3, 7), (12, 5), (1, 1)])
def test_any_number_of_steps_begins_with_the_head_and_ends_with_everything(blocks, steps):
    schedule = FeatureReuseSchedule(blocks, drop_rate=0, unfreeze_steps=steps)
    frozen = [schedule.frozen_below(step) for step in range(steps + 1)]
    assert frozen[0] == blocks
    assert frozen[-1] == 0 < frozen[-2]
    assert frozen == sorted(frozen, reverse=True)


def test_sets_are_those_without_unfreezing_and_only_blocks_that_joined_train():
    plain, gradual = (FeatureReuseSchedule(6, seed=3, unfreeze_steps=steps) for steps in (0, 40))
    kinds = Counter()
    for step in range(60):
        before, now = plain.plan(step), gradual.plan(step)
        kinds[before.kind, now.kind] += 1
        if before.kind is DEPTH:
            assert (now.kind, now.dropped, now.survival) == (DEPTH, before.dropped, before.survival)
        else:
            joined = tuple(index for index in before.dropped if index >= now.frozen_below)
            assert (now.kind, now.dropped) == (FREEZE if joined else VANILLA, joined)
    assert kinds[FREEZE, VANILLA] and kinds[FREEZE, FREEZE]


# The engine


def parts_that_move(architecture, plan_step, schedule, freeze=None, **options):
    """Take a step after the optimizer has moments for all, and name the parts whose weights or moments change."""
    model = build(architecture)
    if freeze is not None:
        freeze(model)
    blocks = find_residual_blocks(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    reuse = FeatureReuse(model, blocks, schedule(len(blocks)), **options)
    model.train()
    model(**batch(4)).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    before, watched = snapshot(model), StepWatch.take(model, optimizer)
    with reuse.step(plan_step) as plan:
        model(**batch(4, seed=2)).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert snapshot(model) == before
    after = StepWatch.take(model, optimizer)
    moved = {name.split(" ")[0] for name in after if not same_bits(watched[name], after[name])}
    names = {block.name: index for index, block in enumerate(blocks)}
    parts = {
        next((index for name, index in names.items() if m.startswith(f"{name}.")), m.split(".")[0]) for m in moved
    }
    return plan, parts, moved


@pytest.mark.parametrize("architecture", ["vit", "resnet", "convnext", "swin"])
@pytest.mark.parametrize("step", range(5))
def test_only_what_has_joined_moves_by_a_bit(architecture, step):
    plan, parts, moved = parts_that_move(
        architecture, step, lambda blocks: FeatureReuseSchedule(blocks, drop_rate=0, unfreeze_steps=4)
    )
    assert plan.frozen_below == 4 - step
    assert {part for part in parts if isinstance(part, int)} == set(range(plan.frozen_below, 4))
    assert any(name.startswith("classifier") for name in moved)
    stem = [name for name in moved if "embed" in name]
    assert bool(stem) is (plan.frozen_below == 0)


def test_stochastic_depth_and_masked_freeze_keep_frozen_blocks_still():
    def schedule(blocks):
        return FeatureReuseSchedule(blocks, drop_rate_schedule="uniform", seed=5, unfreeze_steps=20)

    seen = set()
    for step in range(5, 20):
        plan, parts, moved = parts_that_move("vit", step, schedule, train_trunk="all")
        seen.add(plan.kind)
        joined = set(range(plan.frozen_below, 4))
        expected = set(plan.dropped) if plan.kind is FREEZE else joined - set(plan.dropped)
        assert {part for part in parts if isinstance(part, int)} == expected, plan
        assert not [name for name in moved if "embeddings" in name]
        assert any(name.startswith("classifier") for name in moved)
    assert seen == {DEPTH, FREEZE, VANILLA}


def test_frozen_batch_norm_keeps_its_statistics():
    _, _, moved = parts_that_move("resnet", 0, lambda n: FeatureReuseSchedule(n, drop_rate=0, unfreeze_steps=4))
    assert not [name for name in moved if "running" in name or "num_batches" in name]


def test_with_a_frozen_head_the_last_block_trains_from_the_start():
    def freeze(model):
        for module in (model.vit.embeddings, model.vit.layernorm, model.classifier):
            module.requires_grad_(False)

    def schedule(blocks):
        return FeatureReuseSchedule(blocks, drop_rate_schedule="uniform", seed=5, unfreeze_steps=20)

    for step in range(8):
        plan, parts, _ = parts_that_move("vit", step, schedule, freeze)
        assert parts, plan
        assert all(isinstance(part, int) and part >= plan.frozen_below for part in parts)


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_the_cost_is_that_of_a_backward_that_ends_in_the_lowest_block_that_trains(architecture):
    model = build(architecture)
    blocks = find_residual_blocks(model)
    costs = measure_step_costs(model, blocks)
    schedule = FeatureReuseSchedule(4, drop_rate=0, unfreeze_steps=4)
    shares = [costs.share(schedule.plan(step)) for step in range(5)]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert 0.3 < shares[0] < 0.5, "a forward, and the backward of the head"


# The trainer


def trainer_of(folder, **changed):
    return FeatureReuseTrainer(build("vit"), config(folder, **changed), train_dataset=examples())


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
def test_training_and_resume_are_exact(tmp_path, drop_rate):
    common = {"drop_rate": drop_rate, "unfreeze_at": 0.8, "max_steps": 10, "save_strategy": "steps", "save_steps": 3}

    def run(folder, checkpoint=None, **changed):
        trainer = trainer_of(folder, **{**common, **changed})
        trainer.train(resume_from_checkpoint=checkpoint)
        return state_of(trainer.model), without_times(trainer.state.log_history)

    whole = run(tmp_path / "whole")
    for step in (3, 6):
        assert same_bits(run(tmp_path / str(step), str(tmp_path / "whole" / f"checkpoint-{step}")), whole)
    with pytest.raises(ConfigurationError, match=r"blocks still frozen.*unfreeze_steps=8"):
        run(tmp_path / "changed", str(tmp_path / "whole" / "checkpoint-6"), unfreeze_at=0.5)


def test_without_feature_reuse_the_first_steps_train_only_the_head(tmp_path):
    trainer = trainer_of(tmp_path, drop_rate=0.0, unfreeze_at=0.5, max_steps=8, weight_decay=0.1)
    before = state_of(trainer.model)
    states = []
    trainer.callback_handler.callbacks[-1].on_step_end = lambda *_, model, **__: states.append(state_of(model))
    train(trainer)
    changed = [{name for name in before if not torch.equal(before[name], state[name])} for state in states]
    assert all(name.startswith(("classifier", "vit.layernorm")) for name in changed[0])
    assert not [name for name in changed[1] if not name.startswith(("classifier", "vit.layernorm", "vit.layers.3."))]
    assert any(name.startswith("vit.embeddings") for name in changed[-1])
    shares = [entry["compute_share"] for entry in trainer.state.log_history if "compute_share" in entry]
    assert shares[0] < shares[2] < shares[4] == 1
    assert len(losses(trainer)) == 8


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"unfreeze_at": 0.0}, r"`unfreeze_at=0\.0`"),
        ({"unfreeze_at": 1.5}, r"`unfreeze_at=1\.5`"),
        ({"unfreeze_at": True}, "`unfreeze_at=True`"),
        ({"unfreeze_at": 0.5, "drop_granularity": "sample"}, 'does not work with `drop_granularity="sample"`'),
    ],
)
def test_values_that_cannot_be_used_are_refused(tmp_path, changed, match):
    with pytest.raises(ConfigurationError, match=match):
        FeatureReuseConfig(str(tmp_path), **changed)


def test_a_schedule_without_blocks_has_nothing_to_unfreeze():
    with pytest.raises(ConfigurationError, match="leaves nothing to unfreeze"):
        FeatureReuseSchedule(0, drop_rate=0, unfreeze_steps=3)
