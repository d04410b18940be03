"""Layer-wise learning-rate decay from the head down to the stem, and a separate factor for the head.

Layers are numbered by the residual blocks of the model, so the rule is the same for every architecture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.method.blocks import ResidualBlock
from hf_featreuse.method.freezing import own_parameters


def layer_decay_groups(
    model: nn.Module,
    blocks: Sequence[ResidualBlock],
    groups: Iterable[Mapping[str, Any]] | None = None,
    *,
    learning_rate: float,
    layer_decay: float | None = None,
    head_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Split parameter groups by layer and set the learning rate of each layer.

    The stem is layer 0, the blocks are layers 1 to n in forward order, and the head is layer n + 1. Modules between
    two blocks, such as the downsampling between stages, belong to the block after them, and the final norm of the base
    model to the last block. Layer l has `learning_rate * layer_decay ** (n + 1 - l)`, the head `head_lr_multiplier`
    times as much. If base model and head are one module, as in timm's models, everything after the last block is the
    head.

    Args:
        model (`torch.nn.Module`): the model that trains.
        blocks (`list[ResidualBlock]`): all of its blocks, from [`find_residual_blocks`].
        groups (`list[dict]`, *optional*): parameter groups for an optimizer, for instance one with weight decay and
            one without; the options of each are kept. By default one group of all parameters that train.
        learning_rate (`float`): learning rate of the head, and base of all others; an `"lr"` of a group replaces it.
        layer_decay (`float`, *optional*): above 0 and at most 1; by default 1, no decay.
        head_lr_multiplier (`float`, defaults to 1.0): above 0.

    Returns:
        `list[dict]`: groups for an optimizer, from the head down to the stem, with `"lr"` and, as in timm,
            `"lr_scale"`.

    Raises:
        ConfigurationError: an option is out of range, there are no blocks, or a parameter is not one of the model.

    Source: BEiT (arXiv 2106.08254); the layers are those of timm's `param_groups_layer_decay`.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import find_residual_blocks, layer_decay_groups
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2))
        >>> groups = layer_decay_groups(model, find_residual_blocks(model), learning_rate=1e-3, layer_decay=0.5)
        >>> [group["lr"] for group in groups]
        [0.001, 0.0005, 0.00025, 0.000125]
        >>> optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    """
    check_layer_decay(layer_decay, head_lr_multiplier)
    if groups is None:
        groups = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    layers = layer_numbers(model, blocks)
    numbers = {id(parameter): layers[name] for name, parameter in model.named_parameters()}
    return split_by_layer(
        groups,
        numbers,
        max(layers.values()),
        learning_rate,
        layer_decay=layer_decay,
        head_lr_multiplier=head_lr_multiplier,
    )


def layer_numbers(model: nn.Module, blocks: Sequence[ResidualBlock]) -> dict[str, int]:
    """Number the layer of each parameter of a model, by name: 0 for the stem to n + 1 for the head.

    Raises:
        ConfigurationError: there are no blocks.
    """
    if not blocks:
        raise ConfigurationError(
            f"`layer_decay` and `head_lr_multiplier` number the layers by the residual blocks, but none were found in "
            f"{type(model).__name__}. Leave both unset, or name blocks with `target_blocks`."
        )
    followed: dict[int, int] = {}
    for block in blocks:
        for module in block.followers:
            followed[id(module)] = followed.get(id(module), 0) + 1
    numbers = {id(module): 1 + count for module in model.modules() if (count := followed.get(id(module), 0))}
    for number, block in enumerate(blocks, start=1):
        numbers.update({id(module): number for module in block.module.modules()})
    head, backbone = len(blocks) + 1, _backbone(model)
    if any(number == head and module not in backbone for module, number in _numbered(model, numbers)):
        numbers.update({id(module): head - 1 for module in backbone if numbers.get(id(module)) == head})
    layers: dict[int, int] = {}
    for module in model.modules():
        for parameter in own_parameters([module]):
            # A parameter that several layers share belongs to the lowest.
            number = numbers.get(id(module), 0)
            layers[id(parameter)] = min(number, layers.get(id(parameter), number))
    return {name: layers[id(parameter)] for name, parameter in model.named_parameters()}


def _backbone(model: nn.Module) -> set[nn.Module]:
    """Return the modules of the base model, without the head; an empty set if there is no base model."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            base = getattr(module, module.base_model_prefix, None)
            return set(base.modules()) if isinstance(base, nn.Module) else set()
    return set()


def _numbered(model: nn.Module, numbers: Mapping[int, int]) -> list[tuple[nn.Module, int]]:
    """Return the modules that directly hold parameters, and their layers."""
    found = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    return [(module, numbers.get(id(module), 0)) for module in found]


def split_by_layer(
    groups: Iterable[Mapping[str, Any]],
    layers: Mapping[int, int],
    head: int,
    learning_rate: float | None = None,
    *,
    layer_decay: float | None,
    head_lr_multiplier: float,
) -> list[dict[str, Any]]:
    """Split parameter groups by layer, the head first.

    Args:
        groups (`list[dict]`): of an optimizer, or for one.
        layers (`dict[int, int]`): layer of each parameter, by its `id`.
        head (`int`): number of the last layer.
        learning_rate (`float`, *optional*): base for groups that have no `"lr"`.
        layer_decay (`float`, *optional*): as in [`layer_decay_groups`].
        head_lr_multiplier (`float`): as in [`layer_decay_groups`].
    """
    split: dict[tuple[int, int], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        base = group.get("lr", learning_rate)
        if base is None:
            raise ConfigurationError(
                "`layer_decay` and `head_lr_multiplier` scale the learning rate, but this optimizer computes its own. "
                "Leave both unset, or set another `optim`."
            )
        for parameter in group["params"]:
            if id(parameter) not in layers:
                raise ConfigurationError(
                    f"A parameter of shape {tuple(parameter.shape)} in the optimizer is not one of the model, so it "
                    "has no layer. Make the groups from the parameters of this model."
                )
            layer = layers[id(parameter)]
            scale = (layer_decay or 1.0) ** (head - layer) * (head_lr_multiplier if layer == head else 1.0)
            new = {**group, "params": [], "lr": _scaled(base, scale), "lr_scale": scale}
            split.setdefault((-layer, index), new)["params"].append(parameter)
    return [group for _, group in sorted(split.items(), key=lambda item: item[0])]


def check_own_optimizer(layer_decay: float | None, head_lr_multiplier: float, optimizer: object) -> None:
    """Raise `ConfigurationError` if the options would change groups that the user made."""
    if optimizer is not None and (layer_decay is not None or head_lr_multiplier != 1):
        raise ConfigurationError(
            "`layer_decay` and `head_lr_multiplier` set learning rates of the optimizer that the trainer creates, but "
            "one was passed. Leave both unset and create its groups with `hf_featreuse.layer_decay_groups`, or pass "
            "`optimizer_cls_and_kwargs` instead."
        )


def _scaled(base: Any, scale: float) -> Any:
    # Compiled optimizers take the learning rate as a tensor, which groups must not share.
    return base.clone() * scale if isinstance(base, torch.Tensor) else base * scale


def check_layer_decay(layer_decay: Any, head_lr_multiplier: Any) -> None:
    """Raise `ConfigurationError` unless the two options are usable."""
    if layer_decay is not None and not (_is_number(layer_decay) and 0 < layer_decay <= 1):
        raise ConfigurationError(
            f"`layer_decay={layer_decay!r}` is not a factor from one layer to the layer below it. Pass a number above "
            "0 and at most 1, such as 0.75, or None for the same learning rate everywhere."
        )
    if not (_is_number(head_lr_multiplier) and head_lr_multiplier > 0):
        raise ConfigurationError(
            f"`head_lr_multiplier={head_lr_multiplier!r}` is not a factor. Pass a finite number above 0, such as 10."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
