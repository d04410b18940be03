"""Train only some blocks inside a context: everything else is frozen, bitwise.

A frozen parameter gets no gradient instead of a zero gradient: with `grad=None` an optimizer changes neither the
weight nor its moments, while with a zero gradient momentum and weight decay would still change it.

Sources: masked freeze, arXiv 2411.09475 (abstract); the closest precedent is freeze-drop-path, Smith and Topin 2016
(arXiv 1611.00847).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from hf_featreuse.errors import BlockError
from hf_featreuse.method.blocks import ResidualBlock
from hf_featreuse.method.class_swap import bound_class, set_class
from hf_featreuse.method.frozen_buffers import FrozenBuffers
from hf_featreuse.method.frozen_convolution import convolutions, input_free_class
from hf_featreuse.method.schedule import TrainTrunk, trunk_option

FrozenBatchNorm = Literal["batch", "inference"]


@contextlib.contextmanager
def train_only(
    model: nn.Module,
    blocks: Sequence[ResidualBlock],
    *,
    train_trunk: TrainTrunk | bool = "none",
    all_blocks: Sequence[ResidualBlock] = (),
    frozen_batch_norm: FrozenBatchNorm = "batch",
) -> Iterator[None]:
    """Train only some blocks in every backward pass inside the context.

    Parameters that did not require gradients before stay frozen. The running statistics of frozen BatchNorm layers do
    not change, even if `model.train()` is called inside; other buffers of frozen modules are restored at exit. At exit
    every `requires_grad` and every layer is as before.

    Args:
        model (`torch.nn.Module`): the model.
        blocks (`list[ResidualBlock]`): the blocks that train.
        train_trunk (`"all"`, `"head"` or `"none"`, defaults to `"none"`): modules outside `all_blocks` that also
            train: all, only those that are first called after the last block, or none.
        all_blocks (`list[ResidualBlock]`): all blocks of the model in forward order; required unless `train_trunk` is
            `"none"`.
        frozen_batch_norm (`"batch"` or `"inference"`, defaults to `"batch"`): whether frozen BatchNorm layers use the
            statistics of the batch, as in a plain step, or their running ones, as in evaluation.

    Raises:
        BlockError: nothing would train, or `all_blocks` is missing.
        ConfigurationError: `train_trunk` has another value.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import find_residual_blocks, train_only
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> model = ViTForImageClassification(config)
        >>> blocks = find_residual_blocks(model)
        >>> with train_only(model, blocks[:1]):
        ...     model(torch.zeros(1, 3, 224, 224)).logits.sum().backward()
        >>> model.classifier.weight.grad is None
        True
    """
    trunk = trunk_option(train_trunk)
    if trunk != "none" and not all_blocks:
        raise BlockError(
            f"`train_trunk={train_trunk!r}` needs `all_blocks`, the list of all blocks, to know what the trunk is."
        )
    training = {id(module) for block in blocks for module in block.module.modules()}
    if trunk != "none":
        body, head = trunk_modules(model, all_blocks)
        training |= {id(module) for module in (head if trunk == "head" else [*body, *head])}
    frozen = [module for module in model.modules() if id(module) not in training]
    active = {id(p) for p in own_parameters(m for m in model.modules() if id(m) in training) if p.requires_grad}
    if not active:
        raise BlockError(
            f"None of the blocks {[block.name for block in blocks]} has a parameter that requires gradients, so "
            "nothing would train. Pass blocks with such parameters."
        )
    # A parameter that is shared with a training block trains.
    parameters = [p for p in own_parameters(frozen) if p.requires_grad and id(p) not in active]
    buffers = FrozenBuffers([frozen])
    with freeze(parameters, changing_layers(frozen), frozen_batch_norm), buffers.kept([0]):
        yield


@contextlib.contextmanager
def freeze(
    parameters: Sequence[nn.Parameter],
    layers: Sequence[_BatchNorm | _ConvNd],
    frozen_batch_norm: FrozenBatchNorm = "batch",
) -> Iterator[None]:
    """Freeze parameters that require gradients, and layers of `changing_layers`, inside the context."""
    classes = [type(layer) for layer in layers]
    try:
        for parameter in parameters:
            parameter.requires_grad = False
        for layer, plain in zip(layers, classes, strict=True):
            is_norm = isinstance(layer, _BatchNorm)
            set_class(layer, _frozen_class(plain, frozen_batch_norm) if is_norm else input_free_class(plain))
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True
        for layer, plain in zip(layers, classes, strict=True):
            set_class(layer, plain)


@functools.cache
def _frozen_class(plain: type[nn.Module], frozen_batch_norm: FrozenBatchNorm) -> type[nn.Module]:
    """Return the class of a frozen BatchNorm layer.

    In training only `track_running_stats` decides whether the statistics change; with `training` off they are used.
    The attributes of the layer itself do not change, so `model.train()`, which Trainer calls in every step, and copies
    inside the context are safe.
    """
    name = "track_running_stats" if frozen_batch_norm == "batch" else "training"

    def get(_norm: nn.Module) -> bool:
        return False

    def keep(norm: nn.Module, value: bool) -> None:
        norm.__dict__[name] = value

    return bound_class(plain, {name: property(get, keep)})


def changing_layers(modules: Iterable[nn.Module]) -> list[_BatchNorm | _ConvNd]:
    """Return the layers that need another class while they are frozen.

    These are BatchNorm layers, whose running statistics change in training, and convolutions, which save their input.
    """
    modules = list(modules)
    norms = [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]
    return [*norms, *convolutions(modules)]


def trunk_modules(model: nn.Module, all_blocks: Sequence[ResidualBlock]) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the modules outside all blocks, in two lists: the head, which follows the last block, is the second."""
    in_blocks = {id(module) for block in all_blocks for module in block.module.modules()}
    after = {id(module) for module in all_blocks[-1].followers} if all_blocks else set()
    trunk = [module for module in model.modules() if id(module) not in in_blocks]
    # A weight that the head shares with modules before the blocks, such as the embeddings of a language model, would
    # also train there, and the gradient would have to reach the input.
    below = {id(parameter) for parameter in own_parameters(module for module in trunk if id(module) not in after)}
    after -= {id(module) for module in trunk if any(id(parameter) in below for parameter in own_parameters([module]))}
    return [module for module in trunk if id(module) not in after], [m for m in trunk if id(m) in after]


def own_parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """Return the parameters of the modules themselves, without those of their children."""
    return (parameter for module in modules for parameter in module.parameters(recurse=False))
