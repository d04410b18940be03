"""Finding blocks does not change the model."""

import random

import numpy as np
import pytest
import torch
from labeled_models import InPlace, swin
from tiny_models import ARCHITECTURES, batch, build, snapshot
from torch import nn

from hf_featreuse import BlockError, find_residual_blocks


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("training", [True, False])
def test_random_states_buffers_gradients_and_modes_do_not_change(kind, training):
    model = build(kind)
    model.train(training)
    next(model.children()).train(not training)
    model(**batch()).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [None if gradient is None else gradient.clone() for gradient in gradients]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    before, states = snapshot(model), (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    find_residual_blocks(model)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(
        gradient is None or torch.equal(gradient, value) for gradient, value in zip(gradients, values, strict=True)
    )
    assert list(dict(model.named_buffers())) == list(buffers)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    assert all(torch.equal(parameter, weight) for parameter, weight in zip(model.parameters(), weights, strict=True))


def test_random_layers_and_writing_buffers_leave_no_trace():
    class Noisy(InPlace):
        def __init__(self) -> None:
            super().__init__(False)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(()))
            self.note = "before"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.replaced = self.replaced + 1
            self.note = "after"
            self.extra = torch.rand(())
            return super().forward(x + 0 * torch.rand(()))  # Not residual: x was copied by the addition.

    noisy = Noisy()
    model = nn.Sequential(InPlace(False), noisy)
    state, replaced = torch.get_rng_state(), noisy.replaced
    find_residual_blocks(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert noisy.calls == 0
    assert noisy.replaced is replaced
    assert noisy.note == "before"
    assert not hasattr(noisy, "extra")


def test_hooks_are_removed_after_a_failed_forward():
    class Failing(InPlace):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such shape")

    model = nn.Sequential(InPlace(False), nn.BatchNorm1d(4), Failing(False)).train()
    model[0].requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(BlockError, match="no such shape"):
        find_residual_blocks(model, torch.zeros(2, 4))
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_swin_keeps_its_shifted_window_if_the_input_is_no_larger_than_it():
    model = swin(image_size=32, window_size=4)
    blocks = [module for module in model.modules() if hasattr(module, "shift_size")]
    before = [(block.shift_size, block.window_size) for block in blocks]
    assert before == [(0, 4), (0, 4), (2, 4)]
    find_residual_blocks(model)
    assert [(block.shift_size, block.window_size) for block in blocks] == before
    # The forward itself changes them permanently.
    model(torch.zeros(1, 3, 32, 32))
    assert [(block.shift_size, block.window_size) for block in blocks] == [(0, 4)] * 3


def test_given_batch_does_not_change():
    data = batch(2)
    images = data["pixel_values"].clone()
    find_residual_blocks(build("vit"), data)
    assert set(data) == {"pixel_values", "labels"}
    assert torch.equal(data["pixel_values"], images)
    assert not data["pixel_values"].requires_grad


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_search_costs_one_forward(kind):
    model = build(kind)
    calls = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    for block in find_residual_blocks(model):
        block.module.register_forward_hook(lambda *_: calls.append("block"))
    calls.clear()
    found = find_residual_blocks(model)
    assert calls.count("model") == 1
    assert calls.count("block") == len(found)
