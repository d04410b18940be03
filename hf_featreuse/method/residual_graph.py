"""Determine from one forward which modules return one of their inputs plus something.

A module is residual if walking back from its first output in the autograd graph, only through additions, views and
casts, arrives at one of its inputs. No table of classes is needed, so a new architecture needs no change here.

That forward is in eval mode, where nothing is dropped at random. Dropout on a shortcut, and outputs that exist only in
training, are found by a second run of only the blocks in training mode, one of each group of identical blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_featreuse.errors import BlockError
from hf_featreuse.method.batch_arguments import named_tensors
from hf_featreuse.method.dummy_forward import check_not_inference, model_inputs, own_drop_path_rate, undisturbed
from hf_featreuse.method.graph_walk import Edge, comes_from_softmax, edge_of, find_branch, walk_back

NOT_SHOWN = "the graph of a forward does not show all that it returns to be its input plus something"

Key = int | str
# Positional arguments and keyword arguments.
Arguments = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True)
class _Argument:
    """An argument at the time of the call; tensors with a graph have an edge."""

    key: Key
    value: Any
    edge: GradientEdge | None


@dataclass(frozen=True)
class Call:
    """What one call of a module shows.

    Args:
        key (`int` or `str`, *optional*): position or keyword of the argument that can be the residual stream.
        shown (`bool`): whether the graph shows that the first output is that argument plus something.
        inexact (`str`): why it does not show that the shortcut is a bitwise identity; empty if it does.
        activation (`str`, *optional*): activation after the addition.
        num_outputs (`int`, *optional*): length of the returned tuple; `None` for a bare tensor.
        passed_on (`tuple`): for each further output, the key of the argument that it returns, or `None`.
        made_inside (`tuple[int, ...]`): the further outputs that only the module computes, except attention weights.
        reason (`str`): why no argument can be the stream.
        unbatched (`frozenset[str]`): paths of the tensors among the arguments whose first dimension is not the batch.
        branch (`torch.nn.Module`, *optional*): part of the module whose output is added to the stream, if an
            activation follows the addition.
        ended (`int`): number of modules called by the end of this call.
    """

    key: Key | None = None
    shown: bool = False
    inexact: str = NOT_SHOWN
    activation: str | None = None
    num_outputs: int | None = None
    passed_on: tuple[Key | None, ...] = ()
    made_inside: tuple[int, ...] = ()
    reason: str = ""
    unbatched: frozenset[str] = frozenset()
    branch: nn.Module | None = None
    ended: int = 0


@dataclass(frozen=True)
class Trace:
    """What one forward of a model showed.

    Args:
        calls (`dict[str, list[Call]]`): the calls of each traced module, in the order of the first call of each.
        first_called (`dict[torch.nn.Module, int]`): for each called module, the number of calls before its first one.
        arguments (`dict[str, list[Arguments]]`): arguments of the calls, without their graph.
    """

    calls: dict[str, list[Call]]
    first_called: dict[nn.Module, int]
    arguments: dict[str, list[Arguments]]


def trace_calls(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: Mapping[str, Any] | torch.Tensor | None
) -> Trace:
    """Trace the calls of some modules in one forward of the model."""
    check_not_inference(model)
    args, kwargs = model_inputs(model, inputs)
    tracer = _Tracer(_batch_size(args, kwargs))
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    handles = []
    try:
        # The walk needs a graph below every block, including the frozen part of a model.
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
    return Trace(tracer.calls, tracer.first_called, tracer.arguments)


def calls_in_training(
    model: nn.Module, modules: Mapping[str, nn.Module], arguments: Mapping[str, list[Arguments]]
) -> dict[str, list[Call]]:
    """Run some modules again in training mode and read their calls; of identical modules, only one.

    A module that fails in training mode is left out, for instance one that needs more than one sample.
    """
    calls: dict[str, list[Call]] = {}
    known: dict[tuple, list[Call] | None] = {}
    with undisturbed(model):
        for name, module in modules.items():
            key = _likeness(module, arguments[name])
            if key not in known:
                known[key] = _calls_in_training(module, arguments[name])
            if (made := known[key]) is not None:
                calls[name] = made
    return calls


def _likeness(module: nn.Module, calls: list[Arguments]) -> tuple:
    """Return a key that modules share if they do the same in training mode: everything but the values of tensors."""

    def described(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.shape, value.dtype, value.requires_grad
        if isinstance(value, (tuple, list)):
            return type(value), *map(described, value)
        return value if type(value) in (bool, int, float, str, type(None)) else id(value)

    def attributes(part: nn.Module) -> tuple:
        own = ((name, described(value)) for name, value in part.__dict__.items() if not name.startswith("_"))
        hooks = id(part) if part._forward_hooks or part._forward_pre_hooks else 0
        return type(part), hooks, *own

    leaves = [[described(leaf) for leaf in tree_leaves(call)] for call in calls]
    parts = tuple((name, attributes(part)) for name, part in module.named_modules())
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    return parts, str(leaves), tuple((name, described(tensor)) for name, tensor in tensors)


def _calls_in_training(module: nn.Module, arguments: list[Arguments]) -> list[Call] | None:
    """Return the calls of one module in training mode; `None` if it fails."""
    for part in module.modules():
        # In training mode, norms with statistics need more than one value per channel.
        part.training = not part._buffers
        if "gradient_checkpointing" in part.__dict__:
            part.__dict__["gradient_checkpointing"] = False
    try:
        made = [_run_again(module, call) for call in arguments]
    except Exception:
        return None
    # CvT's own drop path drops the sum, which does not make the shortcut inexact.
    masked = own_drop_path_rate(module) > 0
    return [_read(given, output, in_training=True, masked=masked) for given, output in made]


def _run_again(module: nn.Module, call: Arguments) -> tuple[list[_Argument], Any]:
    """Run a call on copies of the tensors, without its hooks, and return the arguments and the output."""
    copies: dict[int, torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().requires_grad_(tensor.requires_grad).clone()
        return copies[id(tensor)]

    args, kwargs = tree_map_only(torch.Tensor, copied, call)
    return _arguments(args, kwargs), module.forward(*args, **kwargs)


class _Tracer:
    """Hooks that compare each call's output with its inputs in the autograd graph."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.open: dict[str, list[tuple[list[_Argument], int]]] = {}
        self.calls: dict[str, list[Call]] = {}
        self.arguments: dict[str, list[Arguments]] = {}
        self.first_called: dict[nn.Module, int] = {}
        self.num_called = 0
        # Every module that has returned, with the edge of its first output.
        self.returned: list[tuple[nn.Module, Edge | None]] = []

    def enter_any(self, module: nn.Module, _args: tuple) -> None:
        self.first_called.setdefault(module, self.num_called)
        self.num_called += 1

    def leave_any(self, module: nn.Module, _args: tuple, output: Any) -> None:
        # Read now, because `hidden_states += residual` later moves the tensor to another edge.
        edge = get_gradient_edge(output) if _has_graph(output) else None
        self.returned.append((module, None if edge is None else edge_of(edge)))

    def enter(self, name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            # Edges are read now, because a later addition in place moves the tensor to another edge.
            self.open.setdefault(name, []).append((_arguments(args, kwargs), len(self.returned)))
            self.calls.setdefault(name, [])
            self.arguments.setdefault(name, []).append(_without_graph(args, kwargs))

        return hook

    def leave(self, name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            shapes = ((path, tensor.shape[:1]) for path, tensor in named_tensors(args, kwargs))
            unbatched = frozenset(path for path, first in shapes if first != (self.batch_size,))
            arguments, begun = self.open[name].pop()
            call = _read(arguments, output)
            if call.activation is not None:
                stream = next(argument.edge for argument in arguments if argument.key == call.key)
                assert stream is not None
                first = output if isinstance(output, torch.Tensor) else output[0]
                branch = find_branch(get_gradient_edge(first), edge_of(stream), self.returned[begun:])
                call = replace(call, branch=branch)
            self.calls[name].append(replace(call, unbatched=unbatched, ended=self.num_called))

        return hook


def _arguments(args: tuple, kwargs: Mapping[str, Any]) -> list[_Argument]:
    """Return the arguments of a call as they are now."""
    return [
        _Argument(key, value, get_gradient_edge(value) if _has_graph(value) else None)
        for key, value in (*enumerate(args), *kwargs.items())
    ]


def _without_graph(args: tuple, kwargs: dict[str, Any]) -> Arguments:
    """Return arguments to repeat a call: tensors with a graph require gradients, a shared tensor stays shared."""
    kept: dict[int, torch.Tensor] = {}

    def detached(tensor: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(id(tensor), tensor.detach().requires_grad_(tensor.requires_grad))

    return tree_map_only(torch.Tensor, detached, (args, kwargs))


def _batch_size(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Return the size of the first dimension of the first input of a model."""
    return next((tensor.shape[0] for _, tensor in named_tensors(args, kwargs) if tensor.ndim), 1)


def _with_graph(value: Any) -> Any:
    """Return an input with its own edge, so that a block whose stream it is can be found too."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    # A copy: a leaf that requires gradients cannot be changed in place.
    return value.detach().requires_grad_(True).clone()


def _has_graph(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _read(arguments: list[_Argument], output: Any, *, in_training: bool = False, masked: bool = False) -> Call:
    """Return what one call shows: the argument that is the stream by the graph, or else could be by its shape.

    In training mode a block may skip itself at random, so returning only the stream is accepted; `masked` also accepts
    a random mask after the addition.
    """
    outputs = list(output) if isinstance(output, (tuple, list)) else [output]
    first = next(iter(outputs), None)
    if not isinstance(first, torch.Tensor) or not first.requires_grad:
        return Call(reason="returns no tensor that depends on its input")
    alike = _alike(arguments, first)
    if not alike:
        shapes = [tuple(a.value.shape) for a in arguments if isinstance(a.value, torch.Tensor)]
        return Call(
            reason=f"returns {first.dtype} of shape {tuple(first.shape)} but takes no such tensor (shapes {shapes})"
        )
    edges = _keys(alike)
    arrival = walk_back(get_gradient_edge(first), list(edges), or_itself=in_training, masked=masked)
    stream = edges[arrival.edge] if arrival else alike[0].key
    handed = [_passed_on(arguments, stream, value) for value in outputs[1:]]
    returned = {
        "num_outputs": None if isinstance(output, torch.Tensor) else len(outputs),
        "passed_on": tuple(key for key, _ in handed),
        "made_inside": tuple(
            index
            for index, (value, (key, _)) in enumerate(zip(outputs[1:], handed, strict=True), start=1)
            if key is None and _holds_something(value)
        ),
    }
    if arrival is not None:
        inexact = arrival.inexact or ("" if all(sure for _, sure in handed) else NOT_SHOWN)
        return Call(stream, True, inexact, arrival.activation, **returned)
    if len(alike) > 1:
        keys = ", ".join(str(a.key) for a in alike)
        return Call(reason=f"takes {len(alike)} inputs of the shape of its output (arguments {keys})")
    return Call(stream, **returned)


def _alike(arguments: list[_Argument], output: torch.Tensor) -> list[_Argument]:
    """Return the arguments in the graph that have the shape and dtype of an output."""
    return [a for a in arguments if a.edge and a.value.shape == output.shape and a.value.dtype == output.dtype]


def _keys(arguments: Iterable[_Argument]) -> dict[Edge, Key]:
    """Return the edges of arguments, each with the key of the first argument that has it."""
    keys: dict[Edge, Key] = {}
    for argument in arguments:
        if argument.edge is not None:
            keys.setdefault(edge_of(argument.edge), argument.key)
    return keys


def _passed_on(arguments: list[_Argument], stream: Key, value: Any) -> tuple[Key | None, bool]:
    """Return the argument that a further output repeats, such as a second stream, and whether that is certain."""
    if not _has_graph(value):
        same = (a.key for a in arguments if value is not None and (a.value is value or _same_sizes(a.value, value)))
        return next(same, None), True
    alike = _alike(arguments, value)
    edges = _keys(alike)
    arrival = walk_back(get_gradient_edge(value), list(edges), or_itself=True)
    if arrival is not None and not arrival.inexact and arrival.activation is None:
        return edges[arrival.edge], True
    # With the shape of another argument it may be a second stream; attention weights have the shape of none.
    other = next((a.key for a in alike if a.key != stream), None)
    return other, other is None


def _same_sizes(first: Any, second: Any) -> bool:
    """Return whether two arguments are the same integers; a list of tensors is never compared."""
    numbers = [list(v) if isinstance(v, (tuple, list)) else [v] for v in (first, second)]
    return all(type(n) is int for found in numbers for n in found) and numbers[0] == numbers[1]


def _holds_something(value: Any) -> bool:
    """Return whether a further output holds anything other than `None` and attention weights."""
    if isinstance(value, (tuple, list)):
        return any(map(_holds_something, value))
    if isinstance(value, Mapping):
        return any(map(_holds_something, value.values()))
    if isinstance(value, torch.Tensor) and value.ndim > 2 and comes_from_softmax(value):
        # Per head, or of all heads: from each token to each. A router's weights are from tokens to experts.
        return value.ndim == 3 and value.shape[-1] != value.shape[-2]
    return value is not None
