"""Random schedules, options, targets and model shapes: what never breaks, whatever is chosen.

2,200 examples, 320 of them with steps of an optimizer with momentum and weight decay. The examples are the same in
every run.
"""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from tiny_models import snapshot
from torch import nn
from training_runs import same_bits, state_of
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_featreuse import (
    BlockError,
    ConfigurationError,
    FeatureReuse,
    FeatureReuseArguments,
    FeatureReuseSchedule,
    StepKind,
    find_residual_blocks,
)
from hf_featreuse.checkpoints.changed_settings import PlanSource
from hf_featreuse.method.freezing import trunk_modules
from hf_featreuse.method.schedule import VANILLA_PLAN
from hf_featreuse.method.targets import match_targets

pytestmark = pytest.mark.slow


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


# Schedules

rates = st.floats(0.01, 0.99)
counts = st.integers(0, 3)


@st.composite
def schedules(draw: Any, blocks: int | None = None) -> FeatureReuseSchedule:
    first = draw(st.integers(0, 5))
    ratio = draw(st.sampled_from([(depth, freeze) for depth in range(4) for freeze in range(4) if depth + freeze]))
    last = draw(st.none() | st.integers(first, first + 20))
    return FeatureReuseSchedule(
        draw(st.integers(1, 40)) if blocks is None else blocks,
        drop_rate=draw(rates),
        drop_rate_schedule=draw(st.sampled_from(["linear", "uniform"])),
        stochastic_depth_steps=ratio[0],
        masked_freeze_steps=ratio[1],
        seed=draw(st.integers(0, 2**64 - 1)),
        first_step=first,
        last_step=last,
        drop_granularity=draw(st.sampled_from(["batch", "sample"])),
        vanilla_steps=draw(st.integers(0, 2)),
        drop_rate_over_time=draw(st.sampled_from(["constant"] if last is None else ["constant", "falling", "rising"])),
    )


@fuzz(800)
@given(schedules(), st.integers(0, 10**9), st.integers(1, 17), st.integers(0, 17))
def test_plans_keep_their_promises(schedule: FeatureReuseSchedule, step: int, samples: int, cut: int) -> None:
    last = math.inf if schedule.last_step is None else schedule.last_step
    step = step if step % 2 else step % 30
    by_sample = {"batch_size": samples} if schedule.drop_granularity == "sample" else {}
    plan = schedule.plan(step, **by_sample)
    assert plan == schedule.plan(step, **by_sample)
    if not schedule.first_step <= step <= last:
        assert (plan.kind, plan.dropped, plan.sample_masks) == (StepKind.VANILLA, (), None)
        return
    cycle, of_cycle = divmod(step - schedule.first_step, schedule.steps_per_cycle)
    if of_cycle < schedule.vanilla_steps:
        assert plan == VANILLA_PLAN
        return
    depth = of_cycle < schedule.vanilla_steps + schedule.stochastic_depth_steps
    begin = schedule.first_step + cycle * schedule.steps_per_cycle
    first = schedule.plan(begin + schedule.vanilla_steps, **by_sample)
    rates = schedule.rates_at(begin)
    assert schedule.rates_at(step) == rates
    assert plan.survival == (tuple(1 - rate for rate in rates) if depth else None)
    if plan.kind is not StepKind.VANILLA:
        assert plan.kind is (StepKind.STOCHASTIC_DEPTH if depth else StepKind.MASKED_FREEZE)
    if plan.sample_masks is None:
        assert plan.dropped == first.dropped == tuple(sorted(set(plan.dropped)))
        assert all(0 <= index < schedule.num_blocks for index in plan.dropped)
        # With an empty set, only masked freeze is vanilla.
        assert (plan.kind is StepKind.VANILLA) is (not depth and not plan.dropped)
        return
    assert plan.sample_masks.shape == (samples, schedule.num_blocks)
    assert np.array_equal(plan.sample_masks, first.sample_masks)
    cut = min(cut, samples)
    parts = [(cut, 0), (samples - cut, cut)]
    masks = [schedule.plan(step, batch_size=size, position=at).sample_masks for size, at in parts if size]
    assert np.array_equal(np.concatenate(masks), plan.sample_masks)


@fuzz(500)
@given(st.data(), st.integers(1, 6), st.integers(0, 25), st.booleans())
def test_a_changed_schedule_differs_where_its_plans_do(data: Any, blocks: int, steps: int, trunk: bool) -> None:
    names = tuple(f"layers.{index}" for index in range(blocks))
    saved = PlanSource(data.draw(schedules(blocks)), names, trunk_trains=trunk, samples=5)
    assert PlanSource.from_json(json.loads(json.dumps(saved.to_json()))).changes(saved) == {}
    kept = tuple(name for name in names if data.draw(st.booleans())) or names
    now = PlanSource(data.draw(schedules(len(kept))), kept, trunk_trains=trunk, samples=5)
    differing = [step for step in range(steps) if saved.plan(step) != now.plan(step)]
    assert saved.first_difference(now, steps) == (differing[0] if differing else None)
    assert saved.first_difference(saved, steps) is None


# Options and targets

anything = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2)
)
usable: dict[str, st.SearchStrategy] = {
    "drop_rate": rates | st.just(0),
    "drop_rate_schedule": st.sampled_from(["linear", "uniform"]),
    "drop_rate_over_time": st.sampled_from(["constant", "falling", "rising"]),
    "vanilla_steps": counts,
    "drop_granularity": st.sampled_from(["batch", "sample"]),
    "stochastic_depth_steps": counts,
    "masked_freeze_steps": counts,
    "scale_kept": st.booleans(),
    "train_trunk": st.booleans() | st.sampled_from(["all", "head", "none"]),
    "frozen_batch_norm": st.sampled_from(["batch", "inference"]),
    "target_blocks": st.none() | st.sampled_from(["layer", ["0", "1"]]),
    "reuse_start": st.floats(0, 0.5),
    "reuse_end": st.floats(0.6, 1),
    "reuse_seed": st.none() | st.integers(0, 2**64 - 1),
}
options = st.fixed_dictionaries({}, optional={name: values | anything for name, values in usable.items()})


@fuzz(300)
@given(options, st.integers(1, 9), st.integers(1, 10**7))
def test_options_are_refused_or_usable(chosen: dict[str, Any], blocks: int, max_steps: int) -> None:
    try:
        arguments = FeatureReuseArguments(**chosen)
    except ConfigurationError as error:
        assert any(name in str(error) for name in chosen)
        event("refused")
        return
    schedule = arguments.schedule(blocks, max_steps, seed=1)
    assert schedule.first_step <= max_steps
    schedule.plan(max_steps // 2, batch_size=2)
    event("usable")


@fuzz(280)
@given(
    st.integers(1, 30),
    st.text("0123layers.*[]()|\\d+", max_size=12)
    | st.lists(st.text("0123layers.", min_size=1, max_size=9), min_size=1),
)
def test_a_target_selects_blocks_or_is_refused(blocks: int, target: str | list[str]) -> None:
    names = [f"vit.layers.{index}" for index in range(blocks)]
    try:
        found = match_targets(names, target, "ViT")
    except BlockError as error:
        assert "Candidates" in str(error)
        return
    assert found
    assert found <= set(names)
    if isinstance(target, list):
        assert all(any(name == entry or name.endswith(f".{entry}") for name in found) for entry in target)


# Steps of an optimizer


@st.composite
def models(draw: Any) -> PreTrainedModel:
    """A ViT, ConvNeXt or ResNet of a random small shape."""
    torch.manual_seed(draw(st.integers(0, 99)))
    kind, depths = draw(st.sampled_from(["vit", "convnext", "resnet"])), draw(st.tuples(*[st.integers(1, 3)] * 2))
    if kind == "vit":
        heads = draw(st.integers(1, 2))
        shape = {"hidden_size": 4 * heads, "num_attention_heads": heads, "intermediate_size": draw(st.integers(2, 9))}
        more = {"num_hidden_layers": sum(depths), "image_size": 16, "patch_size": draw(st.sampled_from([4, 8, 16]))}
        model = ViTForImageClassification(
            ViTConfig(**shape, **more, hidden_dropout_prob=draw(st.sampled_from([0.0, 0.1])))
        )
    elif kind == "convnext":
        sizes = [draw(st.integers(2, 6)), draw(st.integers(2, 6))]
        config = ConvNextConfig(
            num_stages=2, hidden_sizes=sizes, depths=list(depths), layer_scale_init_value=0.5, image_size=16
        )
        model = ConvNextForImageClassification(config)
    else:
        sizes = [draw(st.integers(2, 6)), draw(st.integers(2, 6))]
        config = ResNetConfig(embedding_size=4, hidden_sizes=sizes, depths=[n + 1 for n in depths], layer_type="basic")
        model = ResNetForImageClassification(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def held_back(reuse: FeatureReuse, plan: Any) -> list[str]:
    """Names, or beginnings of names, of what a step must leave alone."""
    names = [f"{block.name}." for block in reuse.blocks]
    if plan.kind is StepKind.VANILLA:
        return []
    if plan.sample_masks is None:
        dropped = set(plan.dropped)
        resting = dropped if plan.kind is StepKind.STOCHASTIC_DEPTH else set(range(len(names))) - dropped
    else:
        masks = plan.sample_masks if plan.kind is StepKind.STOCHASTIC_DEPTH else ~plan.sample_masks
        resting = set(np.flatnonzero(masks.all(0)).tolist())
    found = [names[index] for index in resting]
    if plan.kind is StepKind.MASKED_FREEZE and reuse.train_trunk != "all":
        outside = {name for name in state_of(reuse.model) if not name.startswith(tuple(names))}
        if reuse.train_trunk == "head":
            after = set(trunk_modules(reuse.model, reuse.blocks)[1])
            outside -= {f"{n}.{p}" for n, m in reuse.model.named_modules() if m in after for p in m.state_dict()}
        found += sorted(outside)
    return found


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        f"{name} (optimizer)": {
            key: value.clone() for key, value in optimizer.state[parameter].items() if torch.is_tensor(value)
        }
        for name, parameter in model.named_parameters()
    }


class Stop(Exception):
    pass


@fuzz(320)
@given(st.data(), models(), st.integers(1, 4))
def test_steps_leave_alone_what_they_must(data: Any, model: PreTrainedModel, samples: int) -> None:
    found = find_residual_blocks(model)
    blocks = [block for block in found if data.draw(st.booleans())] or found
    schedule = data.draw(schedules(len(blocks)))
    chosen = {
        "scale_kept": data.draw(st.booleans()),
        "train_trunk": data.draw(st.sampled_from(["all", "head", "none"])),
        "frozen_batch_norm": data.draw(st.sampled_from(["batch", "inference"])),
    }
    before = snapshot(model)
    try:
        reuse = FeatureReuse(model, blocks, schedule, **chosen)
    except (BlockError, ConfigurationError):
        assert snapshot(model) == before
        event("refused")
        assume(False)
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    inputs = {"pixel_values": torch.randn(samples + 1, 3, 16, 16), "labels": torch.arange(samples + 1) % 2}
    # One plain step, so that everything has moments that could move it.
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    fails = data.draw(st.integers(0, 3))
    for step in range(schedule.first_step, schedule.first_step + 4):
        weights = {**state_of(model), **moments(model, optimizer)}
        try:
            with reuse.step(step, batch_size=samples + 1) as plan:
                loss = model.train()(**inputs).loss
                if fails == step - schedule.first_step:
                    raise Stop
                loss.backward()
        except Stop:
            assert snapshot(model) == before
            assert all(parameter.grad is None for parameter in model.parameters())
            continue
        assert snapshot(model) == before
        event(plan.kind.value)
        rests = tuple(held_back(reuse, plan))
        assert [n for n, p in model.named_parameters() if rests and n.startswith(rests) and p.grad is not None] == []
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after = {**state_of(model), **moments(model, optimizer)}
        moved = [name for name in after if not same_bits(weights[name], after[name])]
        assert [name for name in moved if rests and name.startswith(rests)] == []
        # Sets by sample may leave nothing to train; otherwise something trained.
        assert moved or all(name.startswith(rests) for name in after)
