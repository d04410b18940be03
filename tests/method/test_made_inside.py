"""What a block returns in addition to its stream: an argument, attention weights, nothing, or its own result."""

import pytest
import torch
from torch import nn

from hf_featreuse import (
    BlockError,
    FeatureReuse,
    FeatureReuseSchedule,
    find_residual_blocks,
    inspect_model,
    skip_blocks,
)

TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """x + f(x), and other outputs of the test."""

    def __init__(self, returns) -> None:
        super().__init__()
        self.linear, self.router, self.returns = nn.Linear(8, 8), nn.Linear(8, 3), returns

    def forward(self, x: torch.Tensor, given: object = None) -> object:
        return self.returns(self, x, given, x + torch.tanh(self.linear(x)))


class Model(nn.Module):
    """Uses the first output of each block, and ignores the others."""

    def __init__(self, returns) -> None:
        super().__init__()
        self.blocks, self.head, self.given = nn.ModuleList([Block(returns), Block(returns)]), nn.Linear(8, 2), None

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        others = []
        for block in self.blocks:
            output = block(x, self.given)
            x, *rest = output if isinstance(output, tuple) else (output,)
            others += rest
        return self.head(x.mean(1)) if labels is None else others


def attention(x: torch.Tensor) -> torch.Tensor:
    return (x @ x.transpose(1, 2)).softmax(-1)


class Attends(nn.Module):
    """A block around `torch.nn.MultiheadAttention`, which averages its weights over the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x: torch.Tensor, given: object) -> tuple[torch.Tensor, torch.Tensor]:
        added, weights = self.attention(x, x, x)
        return x + added, weights


MADE_INSIDE = {
    "auxiliary loss": (lambda m, x, given, y: (y, m.router(x).square().mean()), 1),
    "detached loss": (lambda m, x, given, y: (y, m.router(x).detach().mean()), 1),
    "router logits": (lambda m, x, given, y: (y, m.router(x)), 1),
    "router probabilities": (lambda m, x, given, y: (y, m.router(x).softmax(-1)), 1),
    "a second one": (lambda m, x, given, y: (y, None, m.router(x)), 2),
    "after attention weights": (lambda m, x, given, y: (y, attention(x), m.router(x)), 2),
    "in a dictionary": (lambda m, x, given, y: (y, {"loss": m.router(x).mean()}), 1),
    "in a tuple": (lambda m, x, given, y: (y, (None, m.router(x))), 1),
    "a number": (lambda m, x, given, y: (y, 3.5), 1),
    "in training only": (lambda m, x, given, y: (y, m.router(x).mean() if m.training else None), 1),
    "one more in training": (lambda m, x, given, y: (y, m.router(x).mean()) if m.training else y, 1),
}
HARMLESS = {
    "a bare tensor": lambda m, x, given, y: y,
    "a tuple of one": lambda m, x, given, y: (y,),
    "None": lambda m, x, given, y: (y, None),
    "an empty tuple and a dictionary of None": lambda m, x, given, y: (y, (), {"cache": None}),
    "an argument": lambda m, x, given, y: (y, given),
    "the stream itself": lambda m, x, given, y: (y, x),
    "attention weights": lambda m, x, given, y: (y, attention(x)),
    "attention weights by head": lambda m, x, given, y: (y, attention(x)[:, None].clone()),
    "attention weights in a tuple": lambda m, x, given, y: (y, (attention(x), None)),
}


@pytest.mark.parametrize("kind", MADE_INSIDE)
def test_an_output_that_only_a_block_computes_is_refused_at_binding(kind):
    returns, index = MADE_INSIDE[kind]
    model = Model(returns)
    blocks = find_residual_blocks(model, TOKENS)
    assert [block.made_inside for block in blocks] == [(index,)] * 2
    message = rf"Block blocks\.0 \(Block\) cannot be skipped: only it computes output {index} of those it returns"
    schedule = FeatureReuseSchedule(2, drop_rate=0.5, seed=0)
    for allow in (False, True):
        with pytest.raises(BlockError, match=message):
            FeatureReuse(model, blocks, schedule, allow_inexact_skip=allow)
        with pytest.raises(BlockError, match=message), skip_blocks(blocks[:1], allow_inexact=allow):
            pass
    assert any("only it computes output" in note for note in inspect_model(model, inputs=TOKENS).notes)


@pytest.mark.parametrize("kind", HARMLESS)
def test_other_outputs_may_be_arguments_or_missing(kind):
    model = Model(HARMLESS[kind])
    model.given = torch.ones(3)
    blocks = find_residual_blocks(model, TOKENS)
    assert [(block.exact, block.made_inside) for block in blocks] == [(True, ())] * 2
    FeatureReuse(model, blocks, FeatureReuseSchedule(2, drop_rate=0.5, seed=0))
    with skip_blocks(blocks):
        assert torch.equal(model(TOKENS), model.head(TOKENS.mean(1)))
        others = model(TOKENS, labels=torch.zeros(2))
    expected = {"an argument": model.given, "the stream itself": TOKENS}.get(kind)
    assert all(other is expected for other in others)


def test_weights_of_multihead_attention_are_attention_weights():
    model = Model(None)
    model.blocks = nn.ModuleList([Attends(), Attends()])
    assert [(block.exact, block.made_inside) for block in find_residual_blocks(model, TOKENS)] == [(True, ())] * 2


def test_plain_training_accepts_any_block():
    returns, _ = MADE_INSIDE["auxiliary loss"]
    model = Model(returns)
    plain = FeatureReuseSchedule(2, stochastic_depth_steps=0, masked_freeze_steps=0)
    reuse = FeatureReuse(model, find_residual_blocks(model, TOKENS), plain)
    with reuse.step(0):
        model(TOKENS).sum().backward()
