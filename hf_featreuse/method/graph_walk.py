"""Walk back from a tensor in the autograd graph, through additions, views and casts, to the inputs it is a sum of.

Labels 1, 2, ... represent the values of the tensor and are passed back through the graph like a gradient. If they
reach an input unchanged, the tensor is that input plus something; changes reveal a transpose, a factor or a sum.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

_ADDITIONS = ("Add", "Sub")
_SAME_PLACES = ("Alias", "Clone", "Contiguous", "ToCopy")
_VIEWS = (*_SAME_PLACES, "Permute", "ReshapeAlias", "Squeeze", "Transpose", "T", "UnsafeView", "Unsqueeze", "View")
_ACTIVATIONS = (
    "Elu", "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "Mish", "PreluKernel", "Relu",
    "Sigmoid", "Silu", "Softplus", "Tanh",
)  # fmt: skip
# Activations that leave their own output unchanged: after one of these, the shortcut is a bitwise identity.
_IDEMPOTENT = ("Relu", "Hardtanh")
_KEEPS_RANGE = (*_VIEWS, "MaxPool2DWithIndices", "MaxPool2D")
_MASKS = ("Div", "Mul", "NativeDropout")

AMBIGUOUS = "its output is the sum of several of its inputs, so it is not certain which one is its residual stream"
CHANGED = "its shortcut moves, scales or rounds the values of its input"

Edge = tuple[Any, int]


@dataclass(frozen=True)
class Arrival:
    """The input at the end of a walk.

    Args:
        edge (`tuple`): edge of the input.
        activation (`str`, *optional*): activation after the last addition.
        inexact (`str`): why the tensor is not bitwise that input plus something; empty if it is.
    """

    edge: Edge
    activation: str | None
    inexact: str


def edge_of(tensor_edge: GradientEdge) -> Edge:
    """Return an edge in a form that can be compared."""
    return tensor_edge.node, tensor_edge.output_nr


def walk_back(
    start: GradientEdge, inputs: Sequence[Edge], *, or_itself: bool = False, masked: bool = False
) -> Arrival | None:
    """Find the first of the inputs of which a tensor is a sum.

    Args:
        start: edge of the tensor.
        inputs: edges of inputs of the same shape and dtype.
        or_itself: whether a tensor that is an input, with nothing added, counts. Activations are not checked then.
        masked: whether a random mask may follow the last addition.
    """
    edge, activation, before = edge_of(start), None, []
    while edge not in inputs and (operation := _operation(edge[0])) not in _ADDITIONS:
        if operation in _ACTIVATIONS and activation is None:
            activation = operation
        elif operation not in _VIEWS and not (masked and operation in _MASKS):
            return None
        before.append(edge)
        edge = next(_inputs(edge[0]))
    if edge in inputs and not or_itself:
        return None
    size, dtype = _size_and_dtype(edge_of(start))
    # A model that runs on the meta device has a graph too.
    labels = value = torch.arange(1, size.numel() + 1, dtype=torch.float64, device="cpu").view(size)
    for passed in before:
        value = _before(passed, value, dtype)
    reached = _reached(edge, value, inputs, dtype)
    first = next((i for i in inputs if i in reached and reached[i][1]), None)
    if first is None:
        return None
    if sum(plain for _, plain in reached.values()) > 1:
        return Arrival(first, activation, AMBIGUOUS)
    if not torch.equal(reached[first][0], labels):
        return Arrival(first, activation, CHANGED)
    if activation is not None and not or_itself and not _keeps(before, first, activation):
        return Arrival(first, activation, f"{activation} follows the addition and would change the input again")
    return Arrival(first, activation, "")


def _reached(
    edge: Edge, value: torch.Tensor, inputs: Sequence[Edge], dtype: torch.dtype
) -> dict[Edge, tuple[torch.Tensor, bool]]:
    """Return the labels that reach each input, and whether a chain of plain additions leads there."""
    reached: dict[Edge, tuple[torch.Tensor, bool]] = {}
    pending: dict[Edge, tuple[torch.Tensor, bool]] = {}

    def arrive(at: Edge, came: torch.Tensor, plain: bool) -> None:
        size, _ = _size_and_dtype(at)
        # A tensor that an addition broadcasts has fewer values than the stream.
        if came.numel() == size.numel():
            held, came = reached if at in inputs else pending, came.reshape(size)
            held[at] = (held[at][0] + came, held[at][1] or plain) if at in held else (came, plain)

    arrive(edge, value, True)
    while pending:
        # The last operation comes first, so that everything that leads to an edge is summed before its turn.
        edge = max(pending, key=lambda waiting: waiting[0]._sequence_nr())
        value, plain = pending.pop(edge)
        operation = _operation(edge[0])
        if operation in _ADDITIONS:
            second = edge[0]._saved_alpha * (1 if operation == "Add" else -1)
            for (node, number), factor in zip(edge[0].next_functions, (1, second), strict=True):
                if node is not None:
                    arrive((node, number), value if factor == 1 else value * factor, plain and factor == 1)
        elif operation in _VIEWS:
            arrive(next(_inputs(edge[0])), _before(edge, value, dtype), plain)
    return reached


def _before(edge: Edge, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the labels as they were before a view or a cast; zeros if a cast has rounded the values."""
    made = _size_and_dtype(edge)[1]
    if torch.promote_types(made, dtype) != made:
        return torch.zeros_like(value)
    moves = _operation(edge[0]) in _VIEWS and _operation(edge[0]) not in _SAME_PLACES
    # Called directly, the node of a view returns the view of a gradient, on any device.
    return edge[0](value) if moves else value


def _keeps(passed: Sequence[Edge], stream: Edge, activation: str) -> bool:
    """Return whether the stream is an output of this activation, and the activation does not change its own output."""
    node = stream[0]
    while _operation(node) in _KEEPS_RANGE:
        node = next(_inputs(node))[0]
    if activation not in _IDEMPOTENT or _operation(node) != activation:
        return False
    again = next(edge[0] for edge in passed if _operation(edge[0]) == activation)
    return activation == "Relu" or _bounds(again) == _bounds(node)


def _bounds(hardtanh: Any) -> tuple[float, float]:
    return hardtanh._saved_min_val, hardtanh._saved_max_val


def find_branch(
    start: GradientEdge, stream: Edge, inside: Sequence[tuple[nn.Module, Edge | None]]
) -> nn.Module | None:
    """Return the module inside a block whose output is added to the stream; `None` if it is not exactly one module.

    Args:
        start: edge of the block's output.
        stream: edge of its input.
        inside: the modules that returned during the call, with the edge of what each returned.
    """
    node: Any = start.node
    while _operation(node) not in _ADDITIONS:
        node = next(_inputs(node))[0]
    if _operation(node) != "Add" or node._saved_alpha != 1:
        return None
    others = [summand for summand in _inputs(node) if not _is_same_value(summand, stream)]
    if len(others) != 1:
        return None
    # Identities return the edge of the module before them: the last to return it is the one whose output is added.
    producer = next((module for module, made in reversed(inside) if made == others[0]), None)
    calls = sum(module is producer for module, _ in inside)
    return producer if calls == 1 and _uses(start.node, others[0], stream) == 1 else None


def comes_from_softmax(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is the output of a softmax, or a mean of such outputs, up to views and dropout."""
    node: Any = tensor.grad_fn
    while node is not None and _operation(node) in (*_VIEWS, *_MASKS, "Mean"):
        node = next(_inputs(node))[0]
    return node is not None and _operation(node) == "Softmax"


def _is_same_value(edge: Edge, goal: Edge) -> bool:
    """Return whether a tensor is the one at the goal, except for views and casts."""
    while edge != goal and _operation(edge[0]) in _VIEWS:
        edge = next(_inputs(edge[0]))
    return edge == goal


def _uses(start: Any, edge: Edge, goal: Edge) -> int:
    """Return how many operations between a block's output and its input use the tensor at an edge."""
    count, pending, seen = 0, [start], {start}
    while pending:
        for following in _inputs(pending.pop()):
            count += following == edge
            if following != goal and following[0] not in seen:
                seen.add(following[0])
                pending.append(following[0])
    return count


def _operation(node: Any) -> str:
    """Return the operation of a node: "Add" for `AddBackward0`, but `AddBackward` for a user's function."""
    return re.sub(r"Backward\d+$", "", node.name())


def _inputs(node: Any) -> Iterator[Edge]:
    return ((child, number) for child, number in node.next_functions if child is not None)


def _size_and_dtype(edge: Edge) -> tuple[torch.Size, torch.dtype]:
    """Return the size and dtype of the tensor at an edge."""
    made = edge[0]._input_metadata[edge[1]]
    return torch.Size(made.shape), made.dtype
