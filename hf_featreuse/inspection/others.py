"""Find modules that look like residual blocks but are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_featreuse.method.blocks import ResidualBlock
from hf_featreuse.method.dummy_forward import model_inputs, undisturbed

Inputs = Mapping[str, Any] | torch.Tensor


@dataclass(frozen=True)
class NotSkippable:
    """A module next to residual blocks, or of the class of one, that steps neither skip nor train selectively.

    Args:
        name (`str`): qualified name in the model.
        class_name (`str`): class of the module.
        reason (`str`): why it does not take part.
    """

    name: str
    class_name: str
    reason: str


def not_skippable(
    model: nn.Module,
    inputs: Inputs | None,
    found: Sequence[ResidualBlock],
    blocks: Sequence[ResidualBlock],
) -> list[NotSkippable]:
    """Return the modules in one list with a residual block, or of its class, that do not take part, with reasons."""
    names, taking_part = [block.name for block in found], {block.name for block in blocks}
    lists = {name.rpartition(".")[0] for name in names}
    classes = {type(block.module) for block in found if not type(block.module).__module__.startswith("torch.")}
    others = {
        name: module
        for name, module in model.named_modules()
        if name not in taking_part
        and (name.rpartition(".")[0] in lists or type(module) in classes)
        and not any(name.startswith(f"{block}.") or block.startswith(f"{name}.") for block in names)
    }
    shapes = _shapes(model, inputs, {name: module for name, module in others.items() if name not in names})
    left_out = {block.name: block.has_trainable_parameters for block in found if block.name not in taking_part}
    return [
        NotSkippable(name, type(module).__name__, _reason(module, shapes.get(name), left_out.get(name)))
        for name, module in others.items()
    ]


def _reason(module: nn.Module, shapes: tuple[list[Any], Any] | None, left_out: bool | None) -> str:
    """Return why a module does not take part; `left_out` is whether a block that was left out could train."""
    if left_out is not None:
        return "left out by target_blocks" if left_out else "no parameter that requires gradients"
    if next(module.parameters(), None) is None:
        return "no parameters"
    if shapes is None:
        return "not called in the forward"
    arguments, output = shapes
    if output not in arguments:
        return "output has another shape than the input (downsampling or projection)"
    return "output is not the input plus something"


def _shapes(
    model: nn.Module, inputs: Inputs | None, modules: Mapping[str, nn.Module]
) -> dict[str, tuple[list[Any], Any]]:
    """Return, from one forward, the shapes of each module's input tensors and of its first output."""
    if not modules:
        return {}
    shapes: dict[str, tuple[list[Any], Any]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, call_args: tuple, call_kwargs: dict[str, Any], output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            values = [*call_args, *call_kwargs.values()]
            shapes[name] = [v.shape for v in values if isinstance(v, torch.Tensor)], getattr(first, "shape", None)

        return hook

    args, kwargs = model_inputs(model, inputs)
    handles = []
    try:
        with undisturbed(model), torch.no_grad():
            for name, module in modules.items():
                handles.append(module.register_forward_hook(record(name), with_kwargs=True))
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes
