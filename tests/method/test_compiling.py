"""Blocks are compiled one by one: few graphs whatever is dropped, the gradients of eager, and nothing left behind."""

import copy
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_graphs import graphs, nothing_compiled  # noqa: F401
from tiny_models import batch, build, examples, snapshot
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from training_runs import StepWatch, config, losses, same_bits, state_of, train, with_dropout

from hf_featreuse import (
    BlockError,
    ConfigurationError,
    FeatureReuse,
    FeatureReuseSchedule,
    FeatureReuseTrainer,
    StepKind,
    compile_blocks,
    find_residual_blocks,
    measure_step_costs,
    train_only,
)
from hf_featreuse.method.step_times import measure_step_times

# The backend `eager` makes the same graphs, without compiled backward, in half the time.
GRAPHS = {"torch_compile": True, "torch_compile_backend": "eager"}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def is_plain(model: nn.Module) -> bool:
    return all("_compiled_call_impl" not in module.__dict__ for module in model.modules())


def run(folder: Path, architecture: str = "vit", model: nn.Module | None = None, **changed: Any):
    """A run of SGD over a data set whose last batch is half a batch."""
    arguments = config(folder, **{"optim": "sgd", **changed})
    model = build(architecture) if model is None else model
    return train(FeatureReuseTrainer(model, arguments, train_dataset=examples(14), eval_dataset=examples(6)))


# Graphs


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "bound"), [("vit", 3), ("convnext", 6), ("resnet", 8)])
def test_a_hundred_steps_with_partial_batches_and_evaluation_take_few_graphs(
    architecture: str, bound: int, tmp_path: Path
) -> None:
    trainer = run(tmp_path, architecture, max_steps=100, logging_steps=50, eval_strategy="epoch", **GRAPHS)
    plans = {trainer.feature_reuse.plan(step) for step in range(100)}
    assert len(plans) > 8
    assert {plan.kind for plan in plans} == set(StepKind)
    assert 0 < graphs() <= bound
    assert not counters["graph_break"]
    assert not counters["unimplemented"]


@pytest.mark.parametrize("measure", [measure_step_costs, measure_step_times])
def test_measuring_keeps_compiled_blocks_compiled(measure: Callable) -> None:
    model, inputs = build("vit"), batch()
    blocks = find_residual_blocks(model)
    with compile_blocks(blocks, backend="eager"):
        measure(model, blocks, {"pixel_values": inputs["pixel_values"]})
        measured = graphs()
        assert bool(measured) == (measure is measure_step_times), "times are of compiled blocks, counts of the others"
        model(**inputs).loss.backward()
        with train_only(model, blocks[1:]):
            model(**inputs).loss.backward()
        assert graphs() == (measured or 2)
    assert is_plain(model)


@pytest.mark.slow
def test_four_stages_take_eight_graphs_of_training(tmp_path: Path) -> None:
    run(tmp_path, "convnext_4_stages", max_steps=100, logging_steps=50, **GRAPHS)
    assert 0 < graphs() <= 8


def test_scaling_the_kept_blocks_takes_no_further_graph(tmp_path: Path) -> None:
    run(tmp_path, max_steps=12, scale_kept=True, train_trunk=True, **GRAPHS)
    assert 0 < graphs() <= 2


def test_every_block_runs_compiled_in_every_step() -> None:
    model = build("vit")
    blocks = find_residual_blocks(model)
    calls: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        return lambda *args: (calls.append(1), graph(*args))[1]

    with compile_blocks(blocks, backend=backend):
        for trained, count in (([0], 4), ([2], 4), ([3], 4)):
            calls.clear()
            with train_only(model, [blocks[index] for index in trained]):
                model(**batch()).loss.backward()
            assert len(calls) == count


def test_the_graph_limit_is_told_when_it_is_hit(caplog: pytest.LogCaptureFixture) -> None:
    model = build("vit")
    blocks = find_residual_blocks(model)
    logging.getLogger("torch._dynamo").addHandler(caplog.handler)
    try:
        with compile_blocks(blocks, backend="eager", recompile_limit=1):
            model(**batch()).loss.backward()
            with train_only(model, blocks[:1]):
                model(**batch()).loss.backward()
    finally:
        logging.getLogger("torch._dynamo").removeHandler(caplog.handler)
    assert "hit config.recompile_limit (1)" in caplog.text
    assert "vit.layers.0" in caplog.text
    assert graphs() == 1


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 has only one limit, for the whole process")
def test_the_limit_of_torch_is_left_alone(tmp_path: Path) -> None:
    before = torch._dynamo.config.recompile_limit
    seen: list[int] = []

    class Looking(FeatureReuseTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(torch._dynamo.config.recompile_limit)
            return super().compute_loss(*args, **kwargs)

    train(Looking(build("vit"), config(tmp_path, max_steps=1, **GRAPHS), train_dataset=examples(4)))
    assert {*seen, torch._dynamo.config.recompile_limit} == {before}


# The same numbers as eager

SLOW = pytest.mark.slow
SETTINGS = [
    ("vit", {"scale_kept": True}),
    ("convnext", {}),
    ("resnet", {}),
    ("resnet", {"frozen_batch_norm": "inference", "train_trunk": True}),
    pytest.param("swin", {"scale_kept": True}, marks=SLOW),
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "settings"), SETTINGS)
def test_gradients_and_buffers_are_those_of_eager(architecture: str, settings: dict[str, Any]) -> None:
    eager, compiled = build(architecture), build(architecture)
    reuses = []
    for model in (eager, compiled):
        blocks = find_residual_blocks(model)
        schedule = FeatureReuseSchedule(len(blocks), drop_rate=0.5, drop_rate_schedule="uniform", seed=5)
        reuses.append(FeatureReuse(model.train(), blocks, schedule, **settings))
    with compile_blocks(reuses[1].blocks, backend="aot_eager"):
        for step in range(8):
            for reuse in reuses:
                reuse.model.zero_grad(set_to_none=True)
                with reuse.step(step):
                    reuse.model(**batch(4 if step % 3 else 3, seed=step)).loss.backward()
            for (name, ours), (_, theirs) in zip(compiled.named_parameters(), eager.named_parameters(), strict=True):
                assert (ours.grad is None) == (theirs.grad is None), name
            torch.testing.assert_close(gradients(compiled), gradients(eager), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"eval_strategy": "steps", "eval_steps": 3, "gradient_accumulation_steps": 3},
        {"bf16": True, "stochastic_depth_steps": 0, "drop_rate": 0.2},
        {"activation_checkpointing": True, "reuse_start": 0.3, "reuse_end": 0.7},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_a_compiled_run_is_the_eager_run(changed: dict[str, Any], tmp_path: Path) -> None:
    tolerance = 2e-2 if "bf16" in changed else 1e-5
    eager, compiled = (
        run(tmp_path, model=with_dropout(build("vit")), **changed, **options) for options in ({}, COMPILED)
    )
    assert graphs() > 0
    torch.testing.assert_close(losses(compiled), losses(eager), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state_of(compiled.model), state_of(eager.model), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_the_graphs_of_inductor_give_the_gradients_of_eager(tmp_path: Path) -> None:
    eager = run(tmp_path, max_steps=8)
    compiled = run(tmp_path, max_steps=8, torch_compile=True)
    assert 0 < graphs() <= 2
    torch.testing.assert_close(losses(compiled), losses(eager), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state_of(compiled.model), state_of(eager.model), rtol=1e-4, atol=1e-5)


def test_freezing_and_dropping_are_bit_identical(tmp_path: Path) -> None:
    watch = StepWatch()
    arguments = config(tmp_path, max_steps=4, weight_decay=0.1, **GRAPHS)
    watch.trainer = FeatureReuseTrainer(build("resnet"), arguments, train_dataset=examples(), callbacks=[watch])
    watch.trainer.train()
    assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= watch.kinds


@pytest.mark.slow
def test_resuming_is_bit_identical(tmp_path: Path) -> None:
    def made(folder: Path, **changed: Any) -> FeatureReuseTrainer:
        arguments = config(folder, gradient_accumulation_steps=2, per_device_train_batch_size=2, **changed, **COMPILED)
        return FeatureReuseTrainer(with_dropout(build("vit")), arguments, train_dataset=examples(10))

    whole = train(made(tmp_path, save_strategy="steps", save_steps=1))
    resumed = made(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_bits(state_of(resumed.model), state_of(whole.model))
    assert same_bits(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert losses(resumed)[-3:] == losses(whole)[-3:]


def test_compiled_freezing_does_no_more_matrix_products_than_eager() -> None:
    """Neither below the lowest block that trains, where no backward comes, nor in it."""
    model = build("vit").train()
    blocks = find_residual_blocks(model)
    counts = []
    for compiled in (blocks[:0], blocks):
        with compile_blocks(compiled, backend="aot_eager"), train_only(model, blocks[2:3]):
            model(**batch()).loss.backward()
            with FlopCounterMode(display=False) as counter:
                model(**batch()).loss.backward()
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# Nothing is left behind


def test_the_model_is_as_before_after_training_and_after_an_exception(tmp_path: Path) -> None:
    model = build("vit")
    before = snapshot(model)
    inside: list[bool] = []

    class Failing(FeatureReuseTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            inside.append(is_plain(self.model))
            if len(inside) == 3:
                raise RuntimeError("stop")
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(RuntimeError, match="stop"):
        train(Failing(model, config(tmp_path, **GRAPHS), train_dataset=examples()))
    assert not any(inside)
    assert is_plain(model)
    with compile_blocks(find_residual_blocks(model), backend="aot_eager"):
        assert not is_plain(model)
    after = snapshot(model)
    assert {key: after[key] for key in ("keys", "classes", "hooks")} == {
        key: before[key] for key in ("keys", "classes", "hooks")
    }


def test_copies_and_pickles_made_inside_are_not_compiled() -> None:
    model = build("vit")
    blocks = find_residual_blocks(model)
    with compile_blocks(blocks, backend="aot_eager"):
        copied = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    for other in (copied, loaded):
        assert is_plain(other)
        other(**batch()).loss.backward()
    assert graphs() == 0


# What is compiled


def test_plain_training_compiles_the_whole_model(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=2, stochastic_depth_steps=0, masked_freeze_steps=0, **GRAPHS)
    assert isinstance(trainer.model_wrapped, OptimizedModule)


def test_the_whole_model_is_not_compiled(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=2, **GRAPHS)
    assert graphs() > 0
    assert not isinstance(trainer.model_wrapped, OptimizedModule)
    counters.clear()
    trainer.evaluate()
    assert graphs() == 0


def test_the_environment_of_the_launcher_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "false")
    trainer = run(tmp_path, max_steps=16)
    assert not isinstance(trainer.model_wrapped, OptimizedModule)
    assert graphs() == 4, "two for whole batches and two for the last one of an epoch"
    assert not counters["aot_autograd"], "a backend that was not asked for"


def compiled_model(part: str) -> nn.Module:
    model = build("vit")
    if part == "wrapped":
        return torch.compile(model)
    if part == "in place":
        model.compile()
    elif part == "block":
        model.vit.layers[1].compile()
    else:
        model.vit.layers[1] = torch.compile(model.vit.layers[1])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("part", ["wrapped", "in place", "block", "wrapped block"])
@pytest.mark.parametrize("changed", [COMPILED, {}], ids=["torch_compile", "plain"])
def test_a_model_that_is_compiled_already_is_refused(part: str, changed: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BlockError, match=r"compiled already.*before `torch.compile`"):
        run(tmp_path, model=compiled_model(part), **changed)


def test_blocks_that_are_compiled_already_are_refused() -> None:
    model = build("vit")
    blocks = find_residual_blocks(model)
    with compile_blocks(blocks[:1]), pytest.raises(BlockError, match=r"`vit.layers.0` is compiled already"):
        with compile_blocks(blocks):
            pass
    assert is_plain(model)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_that_record_graphs_of_a_device_are_refused(mode: str, tmp_path: Path) -> None:
    model = build("vit")
    before = snapshot(model)
    with pytest.raises(ConfigurationError, match=rf'`torch_compile_mode="{mode}"` records a CUDA graph'):
        with compile_blocks(find_residual_blocks(model), mode=mode):
            raise AssertionError("entered")
    assert snapshot(model) == before
    with pytest.raises(ConfigurationError, match="max-autotune-no-cudagraphs"):
        run(tmp_path, torch_compile=True, torch_compile_mode=mode)
