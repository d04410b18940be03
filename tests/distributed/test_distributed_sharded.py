"""FeatureReuseTrainer on two processes with FSDP2: exact, and skipped or frozen parts are not sent."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import rank, run_on_ranks, watched
from peft import LoraConfig, get_peft_model
from sharded_runs import ShardedTrainer, run_sharded, sharded, whole, whole_moments
from tiny_models import build
from torch import nn
from training_runs import same_bits, state_of
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_featreuse import StepKind
from hf_featreuse.checkpoints.completeness import checkpoint_fault

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import scaling
import step_model
import traffic

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1, "max_steps": 8}
ADAMW = {"weight_decay": 0.1, "max_steps": 8}
SHARDS = {"fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}}
# What one process is to do the same with.
AS_ONE_PROCESS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 2}),
    "checkpointing_of_fsdp": ({"fsdp": {"activation_checkpointing": True}}, {}),
    "checkpointing": ({"activation_checkpointing": True}, {"activation_checkpointing": True}),
    "train_trunk": ({"train_trunk": True}, {"train_trunk": True}),
    "window": ({"reuse_start": 0.25, "reuse_end": 0.75}, {"reuse_start": 0.25, "reuse_end": 0.75}),
    "gathered_after_forward": ({"fsdp": {"reshard_after_forward": False}}, {}),
}
AT_REST: dict[str, dict[str, Any]] = {
    "adamw": {},
    "bf16": {"bf16": True},
    "bf16_frozen_first": {"bf16": True, "stochastic_depth_steps": 0},
    "loaded_on_rank_0": {"fsdp": {"cpu_ram_efficient_loading": True}},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}
RESUMED: dict[str, dict[str, Any]] = {
    "full": {},
    "shards": SHARDS,
    "shards_sgd": {**SHARDS, "optim": "sgd", "optim_args": "momentum=0.9"},
    "full_accumulation": {"gradient_accumulation_steps": 2},
    "lora": {"lora": True},
    "lora_shards": {"lora": True, **SHARDS},
}
SAVED = {
    "max_steps": 6,
    "weight_decay": 0.1,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
}
TIMES = ("runtime", "samples_per_second", "steps_per_second")


def with_lora() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=8, modules_to_save=["classifier"])
    return get_peft_model(build("vit"), config)  # pyright: ignore


def as_one_process(folder: Path, name: str) -> dict[str, Any]:
    return run_sharded(folder, watch=False, **SGD, **AS_ONE_PROCESS[name][0])


def at_rest(folder: Path, name: str) -> dict[str, Any]:
    return run_sharded(folder, **ADAMW, **AT_REST[name])


def evaluations_between(folder: Path) -> dict[str, Any]:
    # Looking at the weights before a step, as the watch does, would put them into shards again.
    return run_sharded(folder, watch=False, eval_strategy="steps", eval_steps=1, **ADAMW)


def convnext(folder: Path) -> dict[str, Any]:
    return run_sharded(folder, build("convnext"), watch=False, **SGD)


def adapters(folder: Path) -> dict[str, Any]:
    model = with_lora()
    before = state_of(model)
    return {"before": before, **run_sharded(folder, model, watch=False, **SGD)}


def end(trainer: Any) -> dict[str, Any]:
    """The end of a run, without times."""
    history = [
        {key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in trainer.state.log_history
    ]
    return {"weights": whole(trainer.model.state_dict()), "moments": whole_moments(trainer), "history": history}


def resumed(folder: Path, name: str) -> dict[str, Any]:
    """A run with a checkpoint at every step, and what it is resumed to from three of them."""
    changed = dict(RESUMED[name])
    make = with_lora if changed.pop("lora", False) else partial(build, "vit")
    options = {**SAVED, **changed}
    trainer = sharded(folder, make(), **options)
    trainer.train()
    ends = [end(trainer)]
    for step in (1, 2, 5):
        trainer = sharded(folder / "again", make(), **{**options, "save_strategy": "no"})
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        ends.append(end(trainer))
    trainer.save_model(str(folder / "final"))
    return {"ends": ends, "folder": str(folder)}


def unsaved(folder: Path) -> dict[str, Any]:
    trainer = sharded(folder, **{**SAVED, "save_strategy": "no"})
    trainer.train()
    return end(trainer)


def stock(folder: Path) -> dict[str, Any]:
    """The stock Trainer, whose list of units is that of the blocks: what plain FSDP2 sends."""
    trainer = sharded(folder, kind=ShardedTrainer, fsdp={"transformer_layer_cls_to_wrap": ["ViTLayer"]}, **SGD)
    trainer.train()
    return whole(trainer.model.state_dict())


def best(folder: Path) -> dict[str, Any]:
    """The weights at the end of a run that loads its best checkpoint, and those of each step."""
    states: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            states.append(whole(model.state_dict()))

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = sharded(folder, callbacks=[Keep()], load_best_model_at_end=True, learning_rate=0.5, **options)
    trainer.train()
    chosen = int(str(trainer.state.best_model_checkpoint).rsplit("-", 1)[1])
    return {"chosen": chosen, "states": states, "end": whole(trainer.model.state_dict())}


def by_sample(folder: Path) -> None:
    sharded(folder, drop_granularity="sample")


def trains_twice(folder: Path) -> None:
    trainer = sharded(folder, max_steps=2)
    trainer.train()
    trainer.train()


def poisoned(folder: Path) -> None:
    """A weight becomes NaN in the part of it that rank 1 holds."""

    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            if state.global_step == 3 and rank() == 1:
                model.classifier.weight.to_local().data.fill_(float("nan"))  # pyright: ignore

    sharded(folder, callbacks=[Poison()], save_strategy="steps", save_steps=2, **SGD).train()


def traffic_of(folder: Path, name: str, freeze_trunk: bool) -> list[tuple[Any, list[int], list[int]]]:
    """Plan, gathers and reductions of each step of a loop without Trainer."""
    options = argparse.Namespace(
        drop_rate=0.5, drop_rate_schedule="uniform", seed=0, steps=6, freeze_trunk=freeze_trunk
    )
    steps = traffic.count_sharded(traffic.MODELS[name], options, reused=True)
    return [(plan, counter.gathers, counter.reductions) for plan, counter in steps]


TRAFFIC = {
    f"traffic of {name}, {'frozen' if freeze_trunk else 'trained'} trunk": (name, freeze_trunk)
    for name in traffic.MODELS
    for freeze_trunk in (False, True)
}
REFUSED = {"by_sample": by_sample, "trains_twice": trains_twice, "poisoned": poisoned}
SCENARIOS = {
    **{name: partial(as_one_process, name=name) for name in AS_ONE_PROCESS},
    **{name: partial(at_rest, name=name) for name in AT_REST},
    **{f"resumed_{name}": partial(resumed, name=name) for name in RESUMED},
    "evaluations_between": evaluations_between,
    "unsaved": unsaved,
    "convnext": convnext,
    "adapters": adapters,
    "stock": stock,
    "best": best,
    **{
        key: partial(traffic_of, name=name, freeze_trunk=freeze_trunk) for key, (name, freeze_trunk) in TRAFFIC.items()
    },
    **REFUSED,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_on_ranks(SCENARIOS, tmp_path_factory.mktemp("ranks"))


def result(results: dict[str, list[Any]], name: str) -> dict[str, Any]:
    """What rank 0 found; a scenario that raised gives a tuple."""
    assert isinstance(results[name][0], dict), results[name][0]
    return results[name][0]


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    # With activation checkpointing FSDP2 puts a wrapper around each block.
    second = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in second.items()}
    assert first.keys() == second.keys()
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


@pytest.mark.parametrize("name", AS_ONE_PROCESS)
def test_two_ranks_give_what_one_process_gives(name: str, results: dict[str, list[Any]], tmp_path: Path) -> None:
    together = result(results, name)["states"]
    alone = watched(tmp_path, watch=False, **SGD, **AS_ONE_PROCESS[name][1])["states"]
    differences = [largest_difference(*states) for states in zip(alone, together, strict=True)]
    print(f"{name}: largest difference of a weight {max(differences):.1e}")
    assert max(differences) < 1e-6
    assert largest_difference(together[0], together[-1]) > 1e-3


def test_a_model_with_stages_gives_what_one_process_gives(results: dict[str, list[Any]], tmp_path: Path) -> None:
    alone = watched(tmp_path, build("convnext"), watch=False, **SGD)["states"]
    differences = [
        largest_difference(*pair) for pair in zip(alone, result(results, "convnext")["states"], strict=True)
    ]
    assert max(differences) < 1e-6


@pytest.mark.parametrize("name", AT_REST)
def test_inactive_parameters_and_their_moments_do_not_change(name: str, results: dict[str, list[Any]]) -> None:
    # StepWatch asserted it in both processes.
    for run in results[name]:
        assert isinstance(run, dict), run
        assert len(run["states"]) == 8
        expected = {"masked_freeze", "vanilla" if name == "bf16_frozen_first" else "stochastic_depth"}
        assert expected <= set(run["kinds"])


def test_compiled_blocks_give_what_plain_ones_give(results: dict[str, list[Any]]) -> None:
    assert largest_difference(result(results, "adamw")["states"][-1], result(results, "compiled")["states"][-1]) < 1e-5


def test_evaluations_between_steps_change_nothing(results: dict[str, list[Any]]) -> None:
    # After one the outermost unit stays gathered, and would continue with the gradients it asked for before.
    assert same_bits(result(results, "adamw")["states"], result(results, "evaluations_between")["states"])


def test_skipped_blocks_are_not_gathered_and_frozen_ones_not_reduced(results: dict[str, list[Any]]) -> None:
    run = result(results, "plain")
    blocks = [name for name in run["units"] if name.startswith("vit.layers")]
    others = len(run["units"]) - len(blocks)
    assert (len(blocks), others) == (4, 3)
    # The plugin is shared by all trainers of a process: the next model has blocks of another class.
    assert run["named_after"] is None
    for plan, calls in zip(run["plans"], run["calls"], strict=True):
        gathered, reduced = calls.count("_allgather_base_"), calls.count("_reduce_scatter_base_")
        print(f"{plan.kind.value}, dropped {plan.dropped}: {gathered} gathers, {reduced} reductions")
        kept = 4 - len(plan.dropped)
        if plan.kind is StepKind.STOCHASTIC_DEPTH:
            # Forward: all that is computed. Backward: the kept blocks and the embedding; the others are still there.
            assert (gathered, reduced) == ((kept + others) + (kept + 1), kept + others)
        else:
            # Forward: all. Backward: from the last block down to the lowest that trains, and one fetched in advance.
            lowest = min(plan.dropped)
            assert (gathered, reduced) == ((4 + others) + (4 - lowest) + 1, len(plan.dropped))


def test_micro_batches_before_the_last_send_no_gradients(results: dict[str, list[Any]]) -> None:
    for plain, accumulated in zip(
        *(result(results, name)["calls"] for name in ("plain", "accumulation")), strict=True
    ):
        assert accumulated.count("_reduce_scatter_base_") == plain.count("_reduce_scatter_base_")
        assert accumulated.count("_allgather_base_") > plain.count("_allgather_base_")


@pytest.mark.parametrize("key", TRAFFIC)
def test_the_cost_model_counts_what_is_counted(key: str, results: dict[str, list[Any]]) -> None:
    name, freeze_trunk = TRAFFIC[key]
    parts = scaling.measure_parts(traffic.MODELS[name], train_trunk=not freeze_trunk)
    assert len(results[key][0]) == 6
    for plan, gathers, reductions in results[key][0]:
        model = step_model.fsdp_collectives(parts, plan, gathered=4)
        # Where backward ends above the lowest block, FSDP2 has fetched the one below in advance.
        ends_early = plan.kind is StepKind.MASKED_FREEZE and freeze_trunk and min(plan.dropped) > 0
        ahead = parts.blocks[min(plan.dropped) - 1] if ends_early else 0
        print(f"{key}, {plan.kind.value}: {len(gathers)} gathers, {sum(gathers)} bytes")
        assert len(gathers) == model.forward_gathers + model.backward_gathers + ends_early
        assert len(reductions) == model.reductions
        assert sum(gathers) == pytest.approx(model.forward_bytes + model.backward_bytes + 4 * ahead, rel=0.02)
        assert sum(reductions) == pytest.approx(model.reduced_bytes, rel=0.02)


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_equals_the_uninterrupted_run(name: str, results: dict[str, list[Any]]) -> None:
    for run in results[f"resumed_{name}"]:
        assert isinstance(run, dict), run
        uninterrupted, *after = run["ends"]
        assert len(after) == 3
        for end in after:
            assert same_bits(end, uninterrupted)


@pytest.mark.parametrize("name", ["full", "shards"])
def test_checkpoints_change_nothing(name: str, results: dict[str, list[Any]]) -> None:
    # They hold moments of every parameter; when the first was written some blocks had never trained.
    assert same_bits(result(results, "unsaved"), result(results, f"resumed_{name}")["ends"][0])


@pytest.mark.parametrize("name", ["full", "shards"])
def test_a_sharded_model_is_saved_for_plain_transformers(name: str, results: dict[str, list[Any]]) -> None:
    run = result(results, f"resumed_{name}")
    loaded = AutoModelForImageClassification.from_pretrained(Path(run["folder"]) / "final")
    assert same_bits(dict(loaded.state_dict()), run["ends"][-1]["weights"])


@pytest.mark.parametrize(("cut", "said"), [("__1_0.distcp", "cut short"), (".metadata", "is missing")])
def test_a_sharded_checkpoint_that_was_cut_is_told(cut: str, said: str, results: dict[str, list[Any]]) -> None:
    folder = Path(result(results, "resumed_shards")["folder"]) / "checkpoint-3"
    assert checkpoint_fault(folder) is None
    path = folder / "optimizer_0" / cut
    content = path.read_bytes()
    try:
        if cut == ".metadata":
            path.unlink()
        else:
            path.write_bytes(content[:-100])
        fault = checkpoint_fault(folder)
    finally:
        path.write_bytes(content)
    assert fault is not None and said in fault and "optimizer_0" in fault


def test_base_weights_of_adapters_do_not_move(results: dict[str, list[Any]]) -> None:
    run = result(results, "adapters")
    last = run["states"][-1]
    moved = [name for name, before in run["before"].items() if not torch.equal(before, last[name])]
    assert moved
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in moved)
    # Blocks with an adapter are shared out as units, and their adapters with them.
    assert sum("layers" in name for name in run["units"]) == 4


def test_units_can_be_named_by_the_user(results: dict[str, list[Any]]) -> None:
    # The stock Trainer ran with named units, so they work as they did, and unlike those of feature reuse.
    stock_end = result(results, "stock")
    assert largest_difference(stock_end, result(results, "plain")["states"][-1]) > 1e-3


def test_the_best_checkpoint_is_loaded(results: dict[str, list[Any]]) -> None:
    run = result(results, "best")
    assert run["chosen"] < len(run["states"])
    assert same_bits(run["end"], run["states"][run["chosen"] - 1])


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("by_sample", "ConfigurationError", "drop_granularity"),
        ("trains_twice", "ConfigurationError", "sharded already"),
        ("poisoned", "StepError", "After 4 optimizer steps the weight"),
    ],
)
def test_a_run_that_cannot_continue_stops_on_both_ranks(
    name: str, error: str, said: str, results: dict[str, list[Any]]
) -> None:
    for kind, message in results[name]:
        assert kind == error
        assert said in message
