"""The optimizer state that a sharded checkpoint needs for every parameter is removed after it is written."""

import torch
from torch import nn
from training_runs import same_bits, state_of

from hf_featreuse.method.fsdp import complete_state, forget_state


def test_the_state_of_untrained_parameters_exists_only_inside() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model[1](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    weights, moments = state_of(model), {p: dict(optimizer.state[p]) for p in model[1].parameters()}
    with complete_state(model, optimizer) as names:
        assert names == ["0.weight", "0.bias"]
        assert all(optimizer.state[parameter] for parameter in model.parameters())
    assert set(optimizer.state) == set(model[1].parameters())
    assert all(same_bits(dict(optimizer.state[p]), found) for p, found in moments.items())
    assert same_bits(state_of(model), weights)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_resume_forgets_the_state_that_was_only_for_the_checkpoint() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    forget_state(model, optimizer, ["0.weight"])
    assert {name for name, p in model.named_parameters() if p in optimizer.state} == {"0.bias", "1.weight", "1.bias"}
