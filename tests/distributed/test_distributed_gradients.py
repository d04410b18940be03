"""reduce_active_gradients in custom loops: bit-identical to plain DDP, fewer bytes, and what it refuses."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from distributed_runs import GroupCounter, rank, run_on_ranks, world
from tiny_models import batch, build
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from training_runs import same_bits, state_of
from transformers import ViTConfig, ViTForImageClassification

from hf_featreuse import (
    FeatureReuse,
    FeatureReuseSchedule,
    StepKind,
    find_residual_blocks,
    reduce_active_gradients,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 6


class SharedNet(nn.Module):
    """Residual blocks of which the first and the last share a weight, and a weight that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3 * 32 * 32, 8)
        self.blocks = nn.ModuleList(Residual() for _ in range(4))
        self.blocks[3].inner.weight = self.blocks[0].inner.weight
        self.head = nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Any:
        x = self.stem(pixel_values.flatten(1))
        for block in self.blocks:
            x = block(x)
        return {"loss": nn.functional.cross_entropy(self.head(x), labels)}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class PenalisedNet(SharedNet):
    """Adds a penalty on all weights to its loss, those of dropped blocks too."""

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Any:
        penalty = sum(parameter.square().sum() for parameter in self.parameters())
        return {"loss": super().forward(pixel_values, labels)["loss"] + penalty}


def small_net(net: type[nn.Module] = SharedNet) -> nn.Module:
    torch.manual_seed(0)
    return net()


def prepare(model: nn.Module, **ddp: Any) -> tuple[DistributedDataParallel, FeatureReuse]:
    blocks = find_residual_blocks(model, batch(2))
    schedule = FeatureReuseSchedule(len(blocks), 0.5, "uniform", seed=5)
    reuse = FeatureReuse(model, blocks, schedule, train_trunk=False)
    return DistributedDataParallel(model, **{"find_unused_parameters": True, **ddp}), reuse


def own_batch(step: int, part: int = 0) -> dict[str, torch.Tensor]:
    """The images of this rank in a step."""
    return batch(4, seed=100 + 10 * step + 2 * part + rank())


def loop(model: nn.Module, *, hook: bool, accumulation: int = 1, **ddp: Any) -> dict[str, Any]:
    """Train with AdamW, whose momentum and weight decay move any weight that has a gradient, be it zero."""
    ddp_model, reuse = prepare(model, **ddp)
    assert not hook or reduce_active_gradients(ddp_model, reuse)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    gradients, sent, kinds = [], [], []
    for step in range(STEPS):
        with GroupCounter() as counter:
            for part in range(accumulation):
                with reuse.step(step) as plan:
                    last = part == accumulation - 1
                    context = torch.enable_grad() if last else ddp_model.no_sync()
                    with context:
                        ddp_model(**own_batch(step, part))["loss"].backward()
        gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
        before = state_of(model), {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
        check_rest(model, reuse, plan)
        optimizer.step()
        resting = [n for n, p in model.named_parameters() if p.grad is None]
        assert all(torch.equal(before[0][n], model.get_parameter(n)) for n in resting)
        assert all(same_bits(before[1][n], dict(optimizer.state[model.get_parameter(n)])) for n in resting)
        optimizer.zero_grad(set_to_none=True)
        sent.append(counter.calls)
        kinds.append(plan.kind)
    return {"gradients": gradients, "sent": sent, "kinds": kinds, "weights": state_of(model)}


def check_rest(model: nn.Module, reuse: FeatureReuse, plan: Any) -> None:
    """Gradients are where the plan says and nowhere else."""
    blocks = {id(p) for i in plan.dropped for p in reuse.blocks[i].module.parameters()}
    for name, parameter in model.named_parameters():
        shared = name == "blocks.0.inner.weight"
        may = (id(parameter) in blocks) == (plan.kind is StepKind.MASKED_FREEZE)
        if plan.kind is not StepKind.VANILLA and not shared:
            assert may or parameter.grad is None, name
        assert name != "unused" or parameter.grad is None


def both_ways(folder: Path, make: Callable[[], nn.Module], **options: Any) -> dict[str, Any]:
    return {"plain": loop(make(), hook=False, **options), "ours": loop(make(), hook=True, **options)}


LOOPS: dict[str, Callable[[Path], Any]] = {
    "vit": partial(both_ways, make=partial(build, "vit")),
    # Buckets of a few kB: inactive, active, or with one active slice. One bucket for all has several slices.
    "vit_small_buckets": partial(both_ways, make=partial(build, "vit"), bucket_cap_mb=0.01),
    "vit_one_bucket_a_weight": partial(both_ways, make=partial(build, "vit"), bucket_cap_mb=1e-6),
    "vit_bucket_views": partial(both_ways, make=partial(build, "vit"), gradient_as_bucket_view=True),
    "vit_accumulation": partial(both_ways, make=partial(build, "vit"), accumulation=3, bucket_cap_mb=0.01),
    "convnext": partial(both_ways, make=partial(build, "convnext"), bucket_cap_mb=0.01),
    "shared_and_unused": partial(both_ways, make=small_net),
}


def twelve_layers(folder: Path) -> dict[str, Any]:
    """Bytes per step of a ViT of 12 layers at uniform rate 0.5, and of plain DDP, read at the process group."""
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=12, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8
    )
    sent = {}
    for name in ("plain", "ours"):
        torch.manual_seed(0)
        model = ViTForImageClassification(config)
        ddp_model, reuse = prepare(model, find_unused_parameters=name == "ours")
        if name == "ours":
            assert reduce_active_gradients(ddp_model, reuse)
        with GroupCounter() as counter:
            for step in range(20):
                with reuse.step(step if name == "ours" else -1):
                    ddp_model(pixel_values=batch(2)["pixel_values"]).logits.sum().backward()
                model.zero_grad()
        sent[name] = counter.bytes
    return {**sent, "parameters": sum(p.numel() for p in model.parameters())}


def with_accelerate(folder: Path) -> dict[str, Any]:
    """A loop of accelerate, with its `accumulate` outside or inside of the step."""
    runs = {}
    for order in ("outside", "inside"):
        accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=2,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        model = build("vit")
        blocks = find_residual_blocks(model)
        reuse = FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks), 0.5, "uniform", seed=5))
        wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        assert isinstance(wrapped, DistributedDataParallel) == (world() > 1)
        assert world() == 1 or reduce_active_gradients(wrapped, reuse)
        for micro_batch in range(2 * STEPS):
            first, second = accelerator.accumulate(wrapped), reuse.step(micro_batch // 2)
            if order == "inside":
                first, second = second, first
            with first, second:
                data = batch(8, seed=micro_batch)
                share = slice(4 * rank(), 4 * rank() + 4) if world() > 1 else slice(None)
                loss = wrapped(**{name: value[share] for name, value in data.items()}).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        runs[order] = state_of(model)
    return runs


def outcome(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        return type(error).__name__, str(error)


def refusals(folder: Path) -> dict[str, Any]:
    found = {}
    for name, options in {
        "static_graph": {"static_graph": True},
        "no_search": {"find_unused_parameters": False},
    }.items():
        found[name] = outcome(partial(reduce_active_gradients, *prepare(build("vit"), **options)))
    found["not_ddp"] = outcome(partial(reduce_active_gradients, build("vit"), prepare(build("vit"))[1]))
    found["other_model"] = outcome(
        partial(reduce_active_gradients, prepare(build("vit"))[0], prepare(build("vit"))[1])
    )
    found["frozen_when_wrapped"] = outcome(frozen_when_wrapped)
    found["inside_a_step"] = outcome(inside_a_step)
    found["penalty"] = outcome(lambda: loop(small_net(PenalisedNet), hook=True))
    ddp_model, reuse = prepare(build("vit"))
    ddp_model.register_comm_hook(None, fp16_compress_hook)
    found["other_hook"] = outcome(partial(reduce_active_gradients, ddp_model, reuse))
    ddp_model, reuse = prepare(build("vit"))
    ddp_model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    found["builtin_hook"] = outcome(partial(reduce_active_gradients, ddp_model, reuse))
    ddp_model, reuse = prepare(build("vit"))
    reuse.schedule = FeatureReuseSchedule(len(reuse.blocks), 0.5, "uniform", seed=rank())
    found["other_seed"] = outcome(partial(reduce_active_gradients, ddp_model, reuse))
    return found


def frozen_when_wrapped() -> None:
    model = build("vit")
    model.vit.layers[0].requires_grad_(False)
    ddp_model = DistributedDataParallel(model, find_unused_parameters=True)
    model.vit.layers[0].requires_grad_(True)
    blocks = find_residual_blocks(model)
    reduce_active_gradients(ddp_model, FeatureReuse(model, blocks, FeatureReuseSchedule(len(blocks))))


def inside_a_step() -> None:
    ddp_model, reuse = prepare(build("vit"))
    with reuse.step(0):
        reduce_active_gradients(ddp_model, reuse)


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    **LOOPS,
    "twelve_layers": twelve_layers,
    "refusals": refusals,
    "with_accelerate": with_accelerate,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_on_ranks(SCENARIOS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", LOOPS)
def test_gradients_and_weights_are_bit_identical_to_plain_ddp(name: str, results: dict[str, list[Any]]) -> None:
    for run in results[name]:
        assert isinstance(run, dict), run
        assert {StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE} <= set(run["ours"]["kinds"])
        assert same_bits(run["plain"]["gradients"], run["ours"]["gradients"])
        assert same_bits(run["plain"]["weights"], run["ours"]["weights"])
    first, second = results[name]
    assert same_bits(first["ours"]["gradients"], second["ours"]["gradients"])


@pytest.mark.parametrize("name", LOOPS)
def test_bytes_are_those_of_the_gradients_that_exist(name: str, results: dict[str, list[Any]]) -> None:
    run = results[name][0]["ours"]
    model = small_net() if name == "shared_and_unused" else build(name.split("_")[0])
    # DDP's map of used parameters, an integer each; and what gets no gradient in any step, such as ours here.
    search = 4 * len(list(model.parameters()))
    for gradients, calls, kind in zip(run["gradients"], run["sent"], run["kinds"], strict=True):
        exact = sum(gradient.nbytes for gradient in gradients.values() if gradient is not None)
        never = 20 if name == "shared_and_unused" and kind is not StepKind.MASKED_FREEZE else 0
        assert sum(size for _, size in calls) == exact + search + never


def test_a_step_of_twelve_layers_sends_at_most_six_tenths(results: dict[str, list[Any]]) -> None:
    run = results["twelve_layers"][0]
    share = run["ours"] / run["plain"]
    print(
        f"bytes per step: plain DDP {run['plain'] / 20:.0f}, feature reuse {run['ours'] / 20:.0f}, share {share:.3f}"
    )
    # In addition to gradients plain DDP sends, once, the order of its buckets.
    assert 0 <= run["plain"] - 20 * 4 * run["parameters"] < 1000
    assert share <= 0.6


def test_a_loop_of_accelerate_gives_what_one_process_gives(results: dict[str, list[Any]], tmp_path: Path) -> None:
    first, second = results["with_accelerate"]
    assert isinstance(first, dict), first
    assert same_bits(first, second)
    # Runs of Trainer in this process leave their data loader and their precision behind.
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = with_accelerate(tmp_path)
    for order, weights in alone.items():
        assert max((weights[name] - first[order][name]).abs().max().item() for name in weights) < 1e-6


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("static_graph", "ConfigurationError", "`static_graph=True` promises DDP .* unset"),
        ("no_search", "ConfigurationError", "`find_unused_parameters=False` promises"),
        ("not_ddp", "ConfigurationError", "is a ViTForImageClassification, not a DistributedDataParallel"),
        ("other_model", "BlockError", "wraps another ViTForImageClassification"),
        ("frozen_when_wrapped", "BlockError", "[0-9]+ parameters require gradients, but [0-9]+ did when DDP wrapped"),
        ("inside_a_step", "StepError", "called inside a step"),
        ("other_seed", "ConfigurationError", "The ranks do not agree .*seed: 0 on rank 0, 1 on rank 1"),
        ("penalty", "StepError", "does not train in this step but got a gradient"),
    ],
)
def test_what_cannot_be_exact_is_refused(name: str, error: str, message: str, results: dict[str, list[Any]]) -> None:
    for run in results["refusals"]:
        assert isinstance(run, dict), run
        assert run[name][0] == error, run[name]
        assert re.search(message, run[name][1]), run[name]


def test_another_communication_hook_stays(results: dict[str, list[Any]]) -> None:
    for name in ("other_hook", "builtin_hook"):
        assert [run[name] for run in results["refusals"]] == [False, False]
