"""Rows of a batch are taken out and put back, forward and backward, by copies."""

import pytest
import torch
from operators import Operators
from torch.utils.checkpoint import checkpoint

from hf_featreuse.method.rows import put_rows, take_rows

FIRST, SECOND = torch.tensor([4, 1, 3]), torch.tensor([0, 2])
LAST = torch.channels_last


def batch(last: bool = False) -> torch.Tensor:
    x = torch.randn(5, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=LAST if last else torch.contiguous_format).requires_grad_()


def both(x: torch.Tensor) -> torch.Tensor:
    """Each group times another number."""
    first, second = take_rows(x, [FIRST, SECOND])
    return put_rows([first * 2, second * 3], [FIRST, SECOND])


def one(x: torch.Tensor) -> torch.Tensor:
    """One group is computed, the others pass."""
    first, rest = take_rows(x, [FIRST], rest=True)
    return put_rows([first * 2], [FIRST], rest)


FACTORS = {both: torch.tensor([3.0, 2, 3, 2, 2]), one: torch.tensor([1.0, 2, 1, 2, 2])}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("move", FACTORS)
def test_values_gradients_and_memory_format(move, last):
    x, factors = batch(last), FACTORS[move].view(-1, 1, 1, 1)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    y = move(x)
    assert torch.equal(y, x * factors)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, factors * weights)
    for tensor in (y, x.grad, *take_rows(x, [FIRST]), *take_rows(x.detach(), [FIRST])):
        assert tensor.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
    torch.testing.assert_close(move(x.detach()), y.detach())


@pytest.mark.parametrize("move", FACTORS)
def test_a_gradient_that_is_expanded_or_of_another_format_is_moved_too(move):
    x, factors = batch(True), FACTORS[move].view(-1, 1, 1, 1)
    move(x).sum().backward()
    assert torch.equal(x.grad, factors.expand(x.shape)) and x.grad.is_contiguous(memory_format=LAST)


def test_rows_that_get_no_gradient_get_zeros():
    x = batch()
    first, second = take_rows(x, [FIRST, SECOND])
    (gradient,) = torch.autograd.grad(put_rows([first, second.detach()], [FIRST, SECOND]).sum(), x)
    assert torch.equal(gradient[FIRST], torch.ones_like(gradient[FIRST])) and not gradient[SECOND].any()
    first, rest = take_rows(x, [FIRST], rest=True)
    (gradient,) = torch.autograd.grad(put_rows([first.detach()], [FIRST], rest).sum(), x)
    assert torch.equal(gradient[SECOND], torch.ones_like(gradient[SECOND])) and not gradient[FIRST].any()
    (gradient,) = torch.autograd.grad(take_rows(x, [FIRST], rest=True)[0].sum(), x)
    assert torch.equal(gradient[FIRST], torch.ones_like(gradient[FIRST])) and not gradient[SECOND].any()


def test_dtypes_are_promoted_and_gradients_keep_those_of_the_values():
    x = batch()
    first, second = take_rows(x, [FIRST, SECOND])
    low = first.to(torch.bfloat16)
    low.retain_grad()
    y = put_rows([low, second], [FIRST, SECOND])
    assert y.dtype == torch.float32
    y.sum().backward()
    assert low.grad.dtype == torch.bfloat16 and torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("move", FACTORS)
def test_inside_activation_checkpointing(move):
    x = batch()
    checkpoint(move, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, FACTORS[move].view(-1, 1, 1, 1).expand(x.shape))


@pytest.mark.parametrize("move", FACTORS)
def test_backward_copies_and_adds_nothing(move):
    x = batch(True)
    with Operators() as seen:
        move(x).sum().backward()
    assert {"index_select", "index_copy_"} <= set(seen.counts)
    assert not {"index_add", "index_add_", "index_put", "index_put_", "permute", "index"} & set(seen.counts)


@pytest.mark.parametrize("move", FACTORS)
def test_a_graph_of_the_moves(move):
    x = batch()
    compiled = torch.compile(move, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert torch.equal(x.grad, FACTORS[move].view(-1, 1, 1, 1).expand(x.shape))
