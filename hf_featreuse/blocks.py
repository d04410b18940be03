"""Find the residual blocks of a model, by structure, in forward order.

A module is a residual block when its first output is one of its input tensors plus something: walking back from the
output in the autograd graph, through additions, views and casts only, arrives at the input. No table of classes is
needed, so a new architecture needs no change here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hf_featreuse.errors import BlockError, ConfigurationError
from hf_featreuse.probing import check_not_compiled, model_inputs, undisturbed

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


@dataclass(frozen=True, eq=False)
class ResidualBlock:
    """A residual block of a model, with what it takes to skip it.

    Args:
        name (`str`): qualified name in the model, as in `model.named_modules()`.
        module (`torch.nn.Module`): the block.
        exact (`bool`): whether the shortcut is an identity to the bit. `False` where an activation follows the
            addition and changes the input again, such as GELU: skipping would then not equal a zero branch.
        activation (`str`, *optional*): name of the activation after the addition, such as `"Relu"`.
        position (`int`, *optional*): index of the residual stream among the positional arguments of the call.
        keyword (`str`, *optional*): its name, where the call passes it by keyword.
        num_outputs (`int`, *optional*): length of the tuple that the block returns; `None` for a bare tensor.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import find_residual_blocks
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> find_residual_blocks(ViTForImageClassification(config))[1].name
        'vit.layers.1'
    """

    name: str
    module: nn.Module
    exact: bool = True
    activation: str | None = None
    position: int | None = 0
    keyword: str | None = None
    num_outputs: int | None = None

    @property
    def has_trainable_parameters(self) -> bool:
        """Whether any parameter of the block requires gradients now."""
        return any(parameter.requires_grad for parameter in self.module.parameters())

    def stream(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The residual stream among the arguments of a call of the block."""
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return kwargs[self.keyword] if self.keyword is not None else next(iter(kwargs.values()))


def find_residual_blocks(
    model: nn.Module,
    inputs: Mapping[str, Any] | torch.Tensor | None = None,
    target_blocks: str | Sequence[str] | None = None,
) -> list[ResidualBlock]:
    """Find the skippable residual blocks of a model in the order in which the forward calls them.

    Costs one forward of a small batch. Random state, buffers, gradients, modes and attributes stay as they are; no
    loss is asked for.

    Args:
        model (`torch.nn.Module`): an image classifier, bare or with PEFT adapters, on any device, the meta device
            included. It must not be wrapped for distributed training or compiled yet.
        inputs (`dict[str, torch.Tensor]` or `torch.Tensor`, *optional*): a small batch as the model's forward takes
            it, for instance `{"pixel_values": tensor of shape (1, 3, height, width)}`. Labels are left out. By
            default a batch of one is made from `model.config`.
        target_blocks (`str` or `list[str]`, *optional*): keep only these of the blocks found. A string is a regular
            expression that must match the whole name; a list holds names or dotted suffixes of names, as
            `target_modules` in PEFT. By default all are kept.

    Returns:
        `list[ResidualBlock]`: in forward order. Blocks whose shortcut is inexact are listed with `exact=False`.

    Raises:
        BlockError: no block was found, a target matches none, the dummy batch does not fit the model, or the model is
            compiled.

    Example:
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> from hf_featreuse import find_residual_blocks
        >>> config = ResNetConfig(
        ...     embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
        ... )
        >>> [block.name for block in find_residual_blocks(ResNetForImageClassification(config))]
        ['resnet.encoder.stages.0.layers.0', 'resnet.encoder.stages.0.layers.1', 'resnet.encoder.stages.1.layers.1']
    """
    check_not_compiled(model)
    blocks = _innermost(_trace(model, inputs))
    if not blocks:
        raise BlockError(
            f"{type(model).__name__} has no residual block that can be skipped: no module in a list or sequence "
            "returns its input plus something of the same shape. Feature reuse needs a residual network, such as ViT, "
            "ConvNeXt or ResNet; for plain training set `stochastic_depth_steps=0` and `masked_freeze_steps=0`."
        )
    if target_blocks is None:
        return blocks
    names = match_targets([block.name for block in blocks], target_blocks, type(model).__name__)
    return [block for block in blocks if block.name in names]


def match_targets(names: Sequence[str], target_blocks: str | Sequence[str], model_name: str) -> set[str]:
    """The names that a target selects; `BlockError` with the candidates where an entry selects none."""
    listed = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    mend = f"Candidates: {listed}. Pass names or endings of names in a list, or a regular expression as a string."
    if isinstance(target_blocks, str):
        try:
            found = {name for name in names if re.fullmatch(target_blocks, name)}
        except re.error as error:
            raise BlockError(f"`target_blocks={target_blocks!r}` is no regular expression: {error}. {mend}") from None
        missing = [] if found else [target_blocks]
    else:
        selected = {
            target: {name for name in names if name == target or name.endswith(f".{target}")}
            for target in target_blocks
        }
        found = set().union(*selected.values())
        missing = [target for target, matched in selected.items() if not matched] or ([] if found else [target_blocks])
    if missing:
        raise BlockError(f"`target_blocks={missing[0]!r}` matches no residual block of {model_name}. {mend}")
    return found


def trainable_blocks(model: nn.Module, blocks: Sequence[ResidualBlock]) -> list[ResidualBlock]:
    """Keep the blocks that hold parameters which train, or raise `BlockError` where none does.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import find_residual_blocks, trainable_blocks
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
        >>> model = ViTForImageClassification(config)
        >>> _ = model.vit.layers[0].requires_grad_(False)
        >>> [block.name for block in trainable_blocks(model, find_residual_blocks(model))]
        ['vit.layers.1', 'vit.layers.2']
    """
    trainable = [block for block in blocks if block.has_trainable_parameters]
    if not trainable:
        raise BlockError(
            f"None of the {len(blocks)} residual blocks of {type(model).__name__} holds a parameter that requires "
            "gradients, so a masked-freeze step would have nothing to train. Unfreeze some of them, choose others "
            "with `target_blocks`, or set `stochastic_depth_steps=0` and `masked_freeze_steps=0`."
        )
    return trainable


def check_exact(blocks: Sequence[ResidualBlock]) -> None:
    """Raise `BlockError` if skipping one of the blocks would not equal a zero residual branch."""
    inexact = [block for block in blocks if not block.exact]
    if inexact:
        raise BlockError(
            f"Block {inexact[0].name} ({type(inexact[0].module).__name__}) cannot be skipped exactly: "
            f"{inexact[0].activation} follows the addition and would change the input again ({len(inexact)} of "
            f"{len(blocks)} blocks). Use an activation that keeps its own output, such as ReLU, leave these blocks "
            "out with `target_blocks`, or set `allow_inexact_skip=True` to drop them all the same."
        )


def check_scalable(blocks: Sequence[ResidualBlock]) -> None:
    """Raise `ConfigurationError` if the increment of one of the blocks has no meaning after an activation."""
    with_activation = [block for block in blocks if block.activation is not None]
    if with_activation:
        raise ConfigurationError(
            f"`scale_kept=True` cannot scale block {with_activation[0].name}: {with_activation[0].activation} follows "
            "its addition, so output minus input is not the residual branch. Set `scale_kept=False`."
        )


def _trace(model: nn.Module, inputs: Mapping[str, Any] | torch.Tensor | None) -> list[ResidualBlock]:
    """Every module whose calls all return input plus something, in the order of their first call."""
    modules = dict(model.named_modules())
    candidates = {
        name: module
        for name, module in modules.items()
        if isinstance(modules.get(name.rpartition(".")[0]), (nn.ModuleList, nn.Sequential))
        and name
        and next(module.parameters(), None) is not None
    }
    args, kwargs = model_inputs(model, inputs)
    tracer = _Tracer()
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    handles = []
    try:
        # The walk needs a graph below every block, the frozen part of a model included.
        for parameter in frozen:
            parameter.requires_grad_(True)
        with undisturbed(model):
            for name, module in candidates.items():
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
    return tracer.blocks(candidates)


class _Tracer:
    """Hooks that compare each call's output with its inputs in the autograd graph."""

    def __init__(self) -> None:
        self.open: dict[str, list[list[tuple[int | str, GradientEdge, torch.Tensor]]]] = {}
        self.calls: dict[str, list[dict[str, Any] | None]] = {}

    def enter(self, name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            # Edges are read now: an addition in place later moves the tensor to another edge.
            tensors = [*enumerate(args), *kwargs.items()]
            edges = [(key, get_gradient_edge(x), x) for key, x in tensors if _has_graph(x)]
            self.open.setdefault(name, []).append(edges)
            self.calls.setdefault(name, [])

        return hook

    def leave(self, name: str):
        def hook(_module: nn.Module, _args: tuple, _kwargs: dict[str, Any], output: Any) -> None:
            self.calls[name].append(_match(self.open[name].pop(), output))

        return hook

    def blocks(self, candidates: Mapping[str, nn.Module]) -> list[ResidualBlock]:
        found = []
        for name, calls in self.calls.items():
            first = calls[0] if calls else None
            if first is None or any(call is None or call["key"] != first["key"] for call in calls):
                continue
            key = first["key"]
            found.append(
                ResidualBlock(
                    name=name,
                    module=candidates[name],
                    exact=all(call["exact"] for call in calls if call),
                    activation=first["activation"],
                    position=key if isinstance(key, int) else None,
                    keyword=key if isinstance(key, str) else None,
                    num_outputs=first["num_outputs"],
                )
            )
        return found


def _with_graph(value: Any) -> Any:
    """An input with an edge of its own, so that a block that takes it as its stream is found too."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    # A copy: a leaf that requires gradients cannot be changed in place.
    return value.detach().requires_grad_(True).clone()


def _has_graph(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _match(inputs: list[tuple[int | str, GradientEdge, torch.Tensor]], output: Any) -> dict[str, Any] | None:
    """What one call says of the block, or None where the first output is not an input plus something."""
    outputs = list(output) if isinstance(output, (tuple, list)) else [output]
    first = next(iter(outputs), None)
    if not isinstance(first, torch.Tensor) or not first.requires_grad:
        return None
    candidates: dict[Edge, tuple[int | str, GradientEdge]] = {
        (edge.node, edge.output_nr): (key, edge)
        for key, edge, tensor in reversed(inputs)
        if tensor.shape == first.shape and tensor.dtype == first.dtype
    }
    arrived = _walk_back(get_gradient_edge(first), set(candidates)) if candidates else None
    if arrived is None:
        return None
    edge, activation = arrived
    key, input_edge = candidates[edge]
    exact = activation is None or (activation in _IDEMPOTENT and _ends_in(input_edge, activation))
    num_outputs = None if isinstance(output, torch.Tensor) else len(outputs)
    return {"key": key, "exact": exact, "activation": activation, "num_outputs": num_outputs}


def _walk_back(start: GradientEdge, goals: set[Edge]) -> tuple[Edge, str | None] | None:
    """The input edge at the far end of a chain of additions, and the activation after the last addition."""
    stack: list[tuple[Any, int, bool, str | None]] = [(start.node, start.output_nr, False, None)]
    while stack:
        node, output_nr, added, activation = stack.pop()
        if added and (node, output_nr) in goals:
            return (node, output_nr), activation
        operation = _operation(node)
        if operation in _ADDITIONS:
            stack.extend((child, nr, True, activation) for child, nr in _inputs(node))
        elif operation in _SAME_VALUES:
            stack.extend((child, nr, added, activation) for child, nr in _inputs(node))
        elif operation in _ACTIVATIONS and not added and activation is None:
            stack.extend((child, nr, added, operation) for child, nr in _inputs(node))
    return None


def _ends_in(edge: GradientEdge, activation: str) -> bool:
    """Whether a tensor is the output of this activation, up to views and max pooling."""
    node = edge.node
    while _operation(node) in _KEEPS_RANGE:
        node = next(_inputs(node))[0]
    return _operation(node) == activation


def _operation(node: Any) -> str:
    """`AddBackward0` is "Add"."""
    return re.sub(r"Backward\d*$", "", node.name())


def _inputs(node: Any) -> Iterator[Edge]:
    return ((child, nr) for child, nr in node.next_functions if child is not None)


def _innermost(blocks: list[ResidualBlock]) -> list[ResidualBlock]:
    """Leave out blocks that contain another: a stage of residual blocks is itself input plus something."""
    names = {block.name for block in blocks}
    outer = {name[: match.start()] for name in names for match in re.finditer(r"\.", name)}
    return [block for block in blocks if block.name not in outer]
