"""What must hold of every architecture with residual blocks; the tests of each group of them call these."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_architectures import Architecture
from torch import nn
from transformers import PreTrainedModel

from hf_featreuse import (
    FeatureReuseConfig,
    FeatureReuseTrainer,
    ResidualBlock,
    StepKind,
    StepPlan,
    find_residual_blocks,
    measure_step_costs,
    skip_blocks,
    train_only,
)
from hf_featreuse.method.cost import flop_counter
from hf_featreuse.method.dummy_forward import undisturbed

DEPTH, FREEZE = StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE


def each(architectures: tuple[Architecture, ...]) -> pytest.MarkDecorator:
    """A test for every architecture."""
    return pytest.mark.parametrize("case", architectures, ids=[case.name for case in architectures])


class Shortcut(nn.Module):
    """What stands in for a removed block: its stream, in the shape of the block's output."""

    def __init__(self, case: Architecture, name: str) -> None:
        super().__init__()
        self.position = next((position for end, position in case.streams.items() if end in name), 0)
        self.num_outputs, self.handed_on = case.num_outputs, case.handed_on

    def forward(self, *args, **kwargs):
        stream = args[self.position]
        if self.num_outputs is None:
            return stream
        others = [args[position] for position in self.handed_on]
        return (stream, *others, *(None,) * (self.num_outputs - 1 - len(others)))


def objective(case: Architecture, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the model's own loss or, if it has none, a loss of the logits."""
    torch.manual_seed(5)
    if case.returns_loss:
        output = model(**case.labeled(4))
        return output.logits, output.loss
    logits = model(**case.batch(4)).logits
    return logits, logits.square().mean()


def some_and_all(blocks: list[ResidualBlock]) -> list[list[ResidualBlock]]:
    return [blocks[:1], blocks[-1:], blocks[::2], blocks]


def check_skipping_equals_taking_the_blocks_out(case: Architecture) -> None:
    """Logits, gradients and statistics are those of the model without the blocks, bit-identical or up to rounding."""
    # LeViT cannot be copied or run backward twice in eval mode, so the reference is built again and both train.
    model = case.build()
    blocks = find_residual_blocks(model, case.batch())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for dropped in some_and_all(blocks):
        reference = case.build()
        for block in dropped:
            reference.set_submodule(block.name, Shortcut(case, block.name))
        expected, expected_loss = objective(case, reference)
        expected_loss.backward()
        model.load_state_dict(state)
        model.zero_grad(set_to_none=True)
        with skip_blocks(dropped, allow_inexact=not case.exact):
            logits, loss = objective(case, model)
            loss.backward()
        assert loss.isfinite()
        assert torch.equal(logits, expected)
        kept = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            if name not in kept or kept[name].grad is None:
                assert parameter.grad is None, name
            else:
                assert parameter.grad.isfinite().all(), name
                torch.testing.assert_close(parameter.grad, kept[name].grad)
        statistics = dict(reference.named_buffers())
        for name, buffer in model.named_buffers():
            if name in state:
                assert torch.equal(buffer, statistics.get(name, state[name])), name


def check_every_block_makes_a_difference(case: Architecture) -> None:
    """No block is skipped in name only."""
    model = case.build().eval()
    blocks = find_residual_blocks(model, case.batch())
    with torch.no_grad():
        full = model(**case.batch()).logits
        for block in blocks:
            with skip_blocks([block]):
                assert not torch.allclose(model(**case.batch()).logits, full, rtol=1e-5, atol=1e-6), block.name
        assert torch.equal(model(**case.batch()).logits, full)


def check_train_only_one_block(case: Architecture) -> None:
    """Nothing outside the block gets a gradient or moves."""
    model = case.build()
    blocks = find_residual_blocks(model, case.batch())
    before = tiny_models.snapshot(model)
    for block in (blocks[0], blocks[-1]):
        model.zero_grad(set_to_none=True)
        frozen = {
            key: value.clone() for key, value in model.state_dict().items() if not key.startswith(f"{block.name}.")
        }
        with train_only(model, [block]):
            _, loss = objective(case, model)
            loss.backward()
        assert loss.isfinite()
        inside = {id(parameter) for parameter in block.module.parameters()}
        assert any(parameter.grad is not None for parameter in block.module.parameters())
        assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in inside)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
        assert tiny_models.snapshot(model) == before


def counted(case: Architecture, model: PreTrainedModel, context: contextlib.AbstractContextManager) -> int:
    """Operations of a forward and backward inside a context."""
    model.zero_grad(set_to_none=True)
    # Each count fills the model's caches again: LeViT's of attention biases would keep the graph of the previous one.
    with undisturbed(model), context, flop_counter() as counter:
        model(**case.batch(1)).logits.sum().backward()
    return counter.get_total_flops()


def check_costs_are_those_of_the_flop_counter(case: Architecture, rel: float = 0.02) -> None:
    """The shares are those of counting each kind of step; `rel` is for masked freeze."""
    model = case.build()
    blocks = find_residual_blocks(model, case.batch(1))
    costs = measure_step_costs(model, blocks, case.batch(1), train_trunk=False)
    model.eval()
    assert costs.vanilla == counted(case, model, contextlib.nullcontext())
    for dropped in ((0,), tuple(range(len(blocks) // 2, len(blocks)))):
        chosen = [blocks[index] for index in dropped]
        skipped = counted(case, model, skip_blocks(chosen)) / costs.vanilla
        assert costs.share(StepPlan(DEPTH, dropped)) == pytest.approx(skipped, rel=0.02)
        frozen = counted(case, model, train_only(model, chosen)) / costs.vanilla
        assert costs.share(StepPlan(FREEZE, dropped)) == pytest.approx(frozen, rel=rel)


def trainer_of(case: Architecture, folder: Path, **changed: Any) -> FeatureReuseTrainer:
    """A trainer of four alternating steps."""
    batch = case.labeled(8) if case.returns_loss else case.batch(8)
    data = [{key: value[index] for key, value in batch.items()} for index in range(8)]
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "drop_rate": 0.5,
        "drop_rate_schedule": "uniform",
        "stochastic_depth_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return FeatureReuseTrainer(case.build(), FeatureReuseConfig(**{**defaults, **changed}), train_dataset=data)


def check_trainer_takes_alternating_steps(case: Architecture, folder: Path) -> None:
    """Four steps of both kinds with the real trainer."""
    trainer = trainer_of(case, folder)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [sorted(key for key in entry if key.startswith("loss/")) for entry in logs] == [
        ["loss/stochastic_depth"],
        ["loss/masked_freeze"],
    ] * 2
    assert all(torch.tensor(entry["loss"]).isfinite() for entry in logs)
    assert all(0 < entry["compute_share"] < 1 for entry in logs)
    assert [block.name for block in trainer.feature_reuse.blocks] == list(case.blocks)
    after = list(trainer.model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(parameter.isfinite().all() for parameter in after)
