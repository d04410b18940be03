"""FeatureReuseTrainer on two processes with DistributedDataParallel."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import GroupCounter, arguments, rank, run_on_ranks, watched
from tiny_models import build, examples
from torch import nn
from training_runs import same_bits, state_of
from transformers import Trainer

from hf_featreuse import FeatureReuseTrainer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1, "max_steps": 8}
CHECKPOINTING = {"activation_checkpointing": True}
# With SGD, two ranks must give what one process gives: AdamW turns rounding of a zero gradient into a whole step.
AS_ONE_PROCESS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": CHECKPOINTING,
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation_checkpointing": {"gradient_accumulation_steps": 2, **CHECKPOINTING},
    "no_clipping": {"max_grad_norm": 0.0},
    "train_trunk": {"train_trunk": True},
    "by_sample": {"drop_granularity": "sample"},
    "by_sample_accumulation": {"drop_granularity": "sample", "gradient_accumulation_steps": 2},
    "window": {"reuse_start": 0.25, "reuse_end": 0.75},
    "small_rate": {"drop_rate": 0.05, "reuse_seed": 0},
    "unfreezing": {"unfreeze_at": 0.75},
    "only_unfreezing": {"drop_rate": 0.0, "unfreeze_at": 0.75},
    "layer_decay": {"layer_decay": 0.5, "head_lr_multiplier": 2.0},
    "loss": {"loss": "focal", "class_weights": "balanced", "gradient_accumulation_steps": 2},
}
ADAMW = {"weight_decay": 0.1, "max_steps": 8}
AT_REST: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw_checkpointing": CHECKPOINTING,
    "adamw_accumulation": {"gradient_accumulation_steps": 2},
    "adamw_bf16": {"bf16": True},
    "adamw_fp16": {"fp16": True},
    "adamw_compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "adamw_fused": {"optim": "adamw_torch_fused"},
}


def hooked() -> nn.Module:
    """A model with gradient hooks of the user on a weight of every block."""
    model = build("vit")
    for layer in model.vit.layers:
        layer.attention.q_proj.weight.register_hook(lambda gradient: 2 * gradient)
    return model


def as_one_process(folder: Path, name: str) -> dict[str, Any]:
    return watched(folder, watch=False, **SGD, **AS_ONE_PROCESS[name])


def with_hooks(folder: Path) -> dict[str, Any]:
    return watched(folder, hooked(), watch=False, **SGD)


def at_rest(folder: Path, name: str) -> dict[str, Any]:
    return watched(folder, **{**ADAMW, **AT_REST[name]})


def batch_norm(folder: Path) -> dict[str, Any]:
    # At the next forward DDP overwrites the statistics of rank 1 with those of rank 0, frozen ones too.
    return watched(folder, build("resnet"), watch=rank() == 0, **ADAMW)


def trains_twice(folder: Path) -> dict[str, torch.Tensor]:
    trainer = FeatureReuseTrainer(build("vit"), arguments(folder, **ADAMW), train_dataset=examples())
    trainer.train()
    trainer.train()
    return state_of(trainer.model)


def lora(folder: Path) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(build("vit"), LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=8))
    before = state_of(model)
    return {"before": before, **watched(folder, model, watch=False, **SGD)}


def stock(folder: Path) -> dict[str, Any]:
    """The stock Trainer: what plain DDP sends."""
    trainer = Trainer(build("vit"), arguments(folder, **SGD), train_dataset=examples())
    with GroupCounter() as counter:
        trainer.train()
    return {"calls": counter.calls}


SCENARIOS = {
    **{name: partial(as_one_process, name=name) for name in AS_ONE_PROCESS},
    **{name: partial(at_rest, name=name) for name in AT_REST},
    "batch_norm": batch_norm,
    "hooks": with_hooks,
    "lora": lora,
    "stock": stock,
    "trains_twice": trains_twice,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_on_ranks(SCENARIOS, tmp_path_factory.mktemp("ranks"))


def weights(run: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    assert isinstance(run, dict), run
    return run["states"]


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


@pytest.mark.parametrize("name", [*AS_ONE_PROCESS, *AT_REST, "hooks", "lora"])
def test_weights_are_equal_on_both_ranks_after_every_step(name: str, results: dict[str, list[Any]]) -> None:
    first, second = map(weights, results[name])
    assert results[name][0]["world"] == 2
    assert results[name][0]["wrapper"] == "DistributedDataParallel"
    assert len(first) == 8
    assert all(same_bits(*states) for states in zip(first, second, strict=True))


@pytest.mark.parametrize("name", [*AS_ONE_PROCESS, "hooks", "lora"])
def test_two_ranks_give_what_one_process_gives(name: str, results: dict[str, list[Any]], tmp_path: Path) -> None:
    alone = weights(SCENARIOS[name](tmp_path))
    together = weights(results[name][0])
    differences = [largest_difference(*states) for states in zip(alone, together, strict=True)]
    print(f"{name}: largest difference of a weight {max(differences):.1e}")
    assert max(differences) < 1e-6
    assert largest_difference(together[0], together[-1]) > 1e-3


@pytest.mark.parametrize("name", AT_REST)
def test_inactive_parameters_and_their_moments_do_not_change(name: str, results: dict[str, list[Any]]) -> None:
    # StepWatch asserted it in both processes; here that it saw both kinds of step, with gradients gone after each.
    for run in results[name]:
        weights(run)
        assert {"stochastic_depth", "masked_freeze"} <= set(run["kinds"])
        assert run["grad"] == []


def test_weights_of_a_model_with_batch_norm_are_equal_on_both_ranks(results: dict[str, list[Any]]) -> None:
    first, second = map(weights, results["batch_norm"])
    parameters = [name for name, _ in build("resnet").named_parameters()]
    for one, other in zip(first, second, strict=True):
        assert same_bits([one[name] for name in parameters], [other[name] for name in parameters])
    assert {"stochastic_depth", "masked_freeze"} <= set(results["batch_norm"][0]["kinds"])


def test_base_weights_of_adapters_do_not_move(results: dict[str, list[Any]]) -> None:
    run = results["lora"][0]
    last = weights(run)[-1]
    moved = [name for name, before in run["before"].items() if not torch.equal(before, last[name])]
    assert moved
    assert all("lora_" in name for name in moved)


def test_steps_send_less_than_plain_ddp(results: dict[str, list[Any]]) -> None:
    def reduced(run: dict[str, Any]) -> list[int]:
        assert isinstance(run, dict), run
        return [size for name, size in run["calls"] if name.startswith("allreduce")]

    assert sum(reduced(results["plain"][0])) < 0.7 * sum(reduced(results["stock"][0]))
    # Micro-batches before the last one send nothing.
    assert sum(reduced(results["accumulation"][0])) == sum(reduced(results["plain"][0]))


def test_a_trainer_trains_a_second_time(results: dict[str, list[Any]]) -> None:
    first, second = results["trains_twice"]
    assert isinstance(first, dict), first
    assert same_bits(first, second)
