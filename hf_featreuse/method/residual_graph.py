"""Read off one forward what the calls of modules return: an input plus something, and how that is seen.

A module is residual where walking back from its first output in the autograd graph, through additions, views and casts
only, arrives at one of its inputs. No table of classes is needed, so a new architecture needs no change here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hf_featreuse.errors import BlockError
from hf_featreuse.method.dummy_forward import model_inputs, undisturbed

_ADDITIONS = ("Add", "Sub")
_SAME_VALUES = (
    "Alias", "Clone", "Contiguous", "Permute", "ReshapeAlias", "Squeeze", "ToCopy", "Transpose", "T", "UnsafeView",
    "Unsqueeze", "View",
)  # fmt: skip
_ACTIVATIONS = (
    "Elu", "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "Mish", "PreluKernel", "Relu",
    "Sigmoid", "Silu", "Softplus", "Tanh",
)  # fmt: skip
# Activations that leave their own output unchanged: after one of these, the shortcut is an identity to the bit.
_IDEMPOTENT = ("Relu", "Hardtanh")
_KEEPS_RANGE = (*_SAME_VALUES, "MaxPool2DWithIndices", "MaxPool2D")

Edge = tuple[Any, int]
Key = int | str


@dataclass(frozen=True)
class _Argument:
    """An argument at the moment of the call; tensors with a graph have an edge."""

    key: Key
    value: Any
    edge: GradientEdge | None


@dataclass(frozen=True)
class Call:
    """What one call of a module says of it.

    Args:
        key (`int` or `str`, *optional*): position or keyword of the argument that can be the residual stream.
        shown (`bool`): whether the graph shows the first output to be that argument plus something.
        exact (`bool`): whether it shows the shortcut to be an identity to the bit.
        activation (`str`, *optional*): after the addition.
        num_outputs (`int`, *optional*): length of the tuple returned; `None` for a bare tensor.
        passed_on (`tuple`): for each further output, the key of the argument it hands on, or `None`.
        reason (`str`): why no argument can be the stream.
        unbatched (`frozenset[str]`): paths of the tensors among the arguments whose first dimension is not the batch.
        branch (`torch.nn.Module`, *optional*): part of the module whose output is what is added to the stream, if an
            activation follows the addition.
        ended (`int`): how many modules had been called by the end of this call.
    """

    key: Key | None = None
    shown: bool = False
    exact: bool = False
    activation: str | None = None
    num_outputs: int | None = None
    passed_on: tuple[Key | None, ...] = ()
    reason: str = ""
    unbatched: frozenset[str] = frozenset()
    branch: nn.Module | None = None
    ended: int = 0


@dataclass(frozen=True)
class Trace:
    """What one forward of a model showed.

    Args:
        calls (`dict[str, list[Call]]`): the calls of each traced module, in the order of the first call of each.
        first_called (`dict[torch.nn.Module, int]`): of each module that was called, how many calls came before.
    """

    calls: dict[str, list[Call]]
    first_called: dict[nn.Module, int]


def trace_calls(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: Mapping[str, Any] | torch.Tensor | None
) -> Trace:
    """Trace the calls of some modules in one forward of the model."""
    args, kwargs = model_inputs(model, inputs)
    tracer = _Tracer(_batch_size(args, kwargs))
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    handles = []
    try:
        # The walk needs a graph below every block, the frozen part of a model included.
        for parameter in frozen:
            parameter.requires_grad_(True)
        with undisturbed(model):
            for module in model.modules():
                handles.append(module.register_forward_pre_hook(tracer.enter_any))
                handles.append(module.register_forward_hook(tracer.leave_any))
            for name, module in modules.items():
                handles.append(module.register_forward_pre_hook(tracer.enter(name), with_kwargs=True))
                handles.append(module.register_forward_hook(tracer.leave(name), with_kwargs=True))
            model(*map(_with_graph, args), **{key: _with_graph(value) for key, value in kwargs.items()})
    except Exception as error:
        if isinstance(error, BlockError):
            raise
        shapes = {key: tuple(value.shape) for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
        raise BlockError(
            f"{type(model).__name__} failed on the batch used to find its residual blocks (shapes {shapes}): "
            f"{type(error).__name__}: {error}. Pass a small batch that the model accepts as `inputs`."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
    return Trace(tracer.calls, tracer.first_called)


class _Tracer:
    """Hooks that compare each call's output with its inputs in the autograd graph."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.open: dict[str, list[tuple[list[_Argument], int]]] = {}
        self.calls: dict[str, list[Call]] = {}
        self.first_called: dict[nn.Module, int] = {}
        self.num_called = 0
        # Every module that returned so far, with the edge of its first output.
        self.returned: list[tuple[nn.Module, Edge | None]] = []

    def enter_any(self, module: nn.Module, _args: tuple) -> None:
        self.first_called.setdefault(module, self.num_called)
        self.num_called += 1

    def leave_any(self, module: nn.Module, _args: tuple, output: Any) -> None:
        # Read now: `hidden_states += residual` later moves the tensor to another edge.
        edge = get_gradient_edge(output) if _has_graph(output) else None
        self.returned.append((module, None if edge is None else (edge.node, edge.output_nr)))

    def enter(self, name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            # Edges are read now: an addition in place later moves the tensor to another edge.
            arguments = [
                _Argument(key, value, get_gradient_edge(value) if _has_graph(value) else None)
                for key, value in (*enumerate(args), *kwargs.items())
            ]
            self.open.setdefault(name, []).append((arguments, len(self.returned)))
            self.calls.setdefault(name, [])

        return hook

    def leave(self, name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            shapes = ((path, tensor.shape[:1]) for path, tensor in _named_tensors(args, kwargs))
            unbatched = frozenset(path for path, first in shapes if first != (self.batch_size,))
            arguments, begun = self.open[name].pop()
            call = _read(arguments, output)
            if call.activation is not None:
                call = replace(call, branch=_find_branch(arguments, call, output, self.returned[begun:]))
            self.calls[name].append(replace(call, unbatched=unbatched, ended=self.num_called))

        return hook


def _named_tensors(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among the arguments of a call, those inside tuples, lists and dictionaries too, by path."""

    def walk(path: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield path, value
        elif isinstance(value, (tuple, list, Mapping)):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                yield from walk(f"{path}.{key}", item)

    for key, value in (*enumerate(args), *kwargs.items()):
        yield from walk(str(key), value)


def _batch_size(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """First dimension of the first input of a model."""
    return next((tensor.shape[0] for _, tensor in _named_tensors(args, kwargs) if tensor.ndim), 1)


def _with_graph(value: Any) -> Any:
    """An input with an edge of its own, so that a block that takes it as its stream is found too."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    # A copy: a leaf that requires gradients cannot be changed in place.
    return value.detach().requires_grad_(True).clone()


def _has_graph(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _read(arguments: list[_Argument], output: Any) -> Call:
    """What one call says: which argument the graph shows to be the stream, else which its shape lets be."""
    outputs = list(output) if isinstance(output, (tuple, list)) else [output]
    first = next(iter(outputs), None)
    if not isinstance(first, torch.Tensor) or not first.requires_grad:
        return Call(reason="returns no tensor that depends on its input")
    alike = _alike(arguments, first)
    if not alike:
        shapes = [tuple(a.value.shape) for a in arguments if isinstance(a.value, torch.Tensor)]
        return Call(
            reason=f"returns {first.dtype} of shape {tuple(first.shape)} and takes none of that kind (shapes {shapes})"
        )
    num_outputs = None if isinstance(output, torch.Tensor) else len(outputs)
    edges = {(edge.node, edge.output_nr): a for a in reversed(alike) if (edge := a.edge)}
    arrived = _walk_back(get_gradient_edge(first), set(edges))
    stream = edges[arrived[0]] if arrived else alike[0]
    handed = [_passed_on(arguments, stream.key, value) for value in outputs[1:]]
    passed_on = tuple(key for key, _ in handed)
    if arrived is not None:
        edge, activation = arrived
        exact = activation is None or (activation in _IDEMPOTENT and _ends_in(edge[0], activation))
        return Call(stream.key, True, exact and all(sure for _, sure in handed), activation, num_outputs, passed_on)
    if len(alike) > 1:
        keys = ", ".join(str(a.key) for a in alike)
        return Call(reason=f"takes {len(alike)} inputs of the shape of its output (arguments {keys})")
    return Call(stream.key, num_outputs=num_outputs, passed_on=passed_on)


def _alike(arguments: list[_Argument], output: torch.Tensor) -> list[_Argument]:
    """The arguments in the graph that have the shape and dtype of an output."""
    return [a for a in arguments if a.edge and a.value.shape == output.shape and a.value.dtype == output.dtype]


def _passed_on(arguments: list[_Argument], stream: Key, value: Any) -> tuple[Key | None, bool]:
    """The argument that a further output hands on, such as a second stream or sizes, and whether that is sure."""
    if not isinstance(value, torch.Tensor):
        sized = (int, tuple, list, torch.Size)
        return next((a.key for a in arguments if isinstance(value, sized) and _same_sizes(a.value, value)), None), True
    if not value.requires_grad:
        return next((a.key for a in arguments if a.value is value), None), True
    alike = _alike(arguments, value)
    edges = {(edge.node, edge.output_nr): a for a in reversed(alike) if (edge := a.edge)}
    arrived = _walk_back(get_gradient_edge(value), set(edges), added=True)
    if arrived is not None and arrived[1] is None:
        return edges[arrived[0]].key, True
    # Of the shape of another argument, it may be a second stream; attention weights are of none's.
    other = next((a.key for a in alike if a.key != stream), None)
    return other, other is None


def _same_sizes(first: Any, second: Any) -> bool:
    """Whether two arguments are the same integers; a list of tensors is never compared."""
    numbers = [list(v) if isinstance(v, (tuple, list)) else [v] for v in (first, second)]
    return all(type(n) is int for found in numbers for n in found) and numbers[0] == numbers[1]


def _walk_back(start: GradientEdge, goals: set[Edge], added: bool = False) -> tuple[Edge, str | None] | None:
    """The input edge at the far end of a chain of additions, and the activation after the last addition."""
    stack: list[tuple[Any, int, bool, str | None]] = [(start.node, start.output_nr, added, None)]
    while stack:
        node, output_nr, added, activation = stack.pop()
        if added and (node, output_nr) in goals:
            return (node, output_nr), activation
        operation = _operation(node)
        if operation in _ADDITIONS:
            stack.extend((child, nr, True, activation) for child, nr in _summands(node, operation))
        elif operation in _SAME_VALUES:
            stack.extend((child, nr, added, activation) for child, nr in _inputs(node))
        elif operation in _ACTIVATIONS and not added and activation is None:
            stack.extend((child, nr, added, operation) for child, nr in _inputs(node))
    return None


def _find_branch(
    arguments: list[_Argument], call: Call, output: Any, inside: list[tuple[nn.Module, Edge | None]]
) -> nn.Module | None:
    """The module inside a block whose output is added to the stream; `None` if no single module gives just that."""
    stream = next(argument.edge for argument in arguments if argument.key == call.key)
    assert stream is not None
    goal: Edge = (stream.node, stream.output_nr)
    first = output if isinstance(output, torch.Tensor) else output[0]
    edge = get_gradient_edge(first)
    node: Any = edge.node
    while _operation(node) not in _ADDITIONS:
        node = next(_inputs(node))[0]
    if _operation(node) != "Add" or node._saved_alpha != 1:
        return None
    others = [summand for summand in _inputs(node) if not _is_same_value(summand, goal)]
    if len(others) != 1:
        return None
    # Identities return the edge of what came before them: the last to return is what the addition took.
    producer = next((module for module, made in reversed(inside) if made == others[0]), None)
    calls = sum(module is producer for module, _ in inside)
    return producer if calls == 1 and _uses(edge.node, others[0], goal) == 1 else None


def _is_same_value(edge: Edge, goal: Edge) -> bool:
    """Whether a tensor is the one at the goal, up to views and casts."""
    while edge != goal and _operation(edge[0]) in _SAME_VALUES:
        edge = next(_inputs(edge[0]))
    return edge == goal


def _uses(start: Any, edge: Edge, goal: Edge) -> int:
    """How many operations between a block's output and its input take the tensor at an edge."""
    count, pending, seen = 0, [start], {start}
    while pending:
        for following in _inputs(pending.pop()):
            count += following == edge
            if following != goal and following[0] not in seen:
                seen.add(following[0])
                pending.append(following[0])
    return count


def _summands(node: Any, operation: str) -> Iterator[Edge]:
    """The inputs of an addition that enter it with factor one: not what is subtracted or multiplied by an alpha."""
    plain = operation == "Add" and node._saved_alpha == 1
    return ((child, nr) for child, nr in node.next_functions[: None if plain else 1] if child is not None)


def _ends_in(node: Any, activation: str) -> bool:
    """Whether a tensor is the output of this activation, up to views and max pooling."""
    while _operation(node) in _KEEPS_RANGE:
        node = next(_inputs(node))[0]
    return _operation(node) == activation


def _operation(node: Any) -> str:
    """`AddBackward0` is "Add"."""
    return re.sub(r"Backward\d*$", "", node.name())


def _inputs(node: Any) -> Iterator[Edge]:
    return ((child, nr) for child, nr in node.next_functions if child is not None)
