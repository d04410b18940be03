"""Support models and optimizers whose parameters are sharded with FSDP2, `torch.distributed.fsdp.fully_shard`.

Sharding replaces the parameters of a model. For a forward and a backward it gathers a unit of them, and only at that
point does a gathered parameter adopt `requires_grad` of its shard. A unit that stays gathered, as the outermost one
does after an evaluation, would keep its old values, so parameters frozen meanwhile would train.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_featreuse.method.class_swap import plain_class


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that FSDP2 shards as units, the outermost first; an empty list for a plain model."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def unsharded_class(module: nn.Module) -> type:
    """Return the class of a module before FSDP2 replaced it, such as by `FSDPViTForImageClassification`."""
    return next(cls for cls in plain_class(module).__mro__ if not issubclass(cls, FSDPModule))


def ready_shards(modules: Sequence[FSDPModule]) -> None:
    """Prepare a sharded model for a step that freezes some of it; do nothing without modules.

    Call it while every parameter that will ever train requires gradients.
    """
    if modules:
        # FSDP2 reads the dtypes of trainable parameters once, in its first forward: for a unit that is frozen then, it
        # would reduce gradients in another dtype from then on. The only public way is a forward, which would gather
        # every weight.
        modules[0]._get_fsdp_state()._lazy_init()
    for module in modules:
        module.reshard()


@contextlib.contextmanager
def without_unknown_embeddings(model: nn.Module) -> Iterator[None]:
    """Let a model whose input embedding transformers does not know return `None`, which accelerate accepts.

    accelerate 1.15 asks every model for it before sharding, and stops at the `NotImplementedError` of models such as
    ConvNeXt.
    """
    ask = getattr(model, "get_input_embeddings", None)
    try:
        if ask is not None:
            ask()
        unknown = False
    except NotImplementedError:
        unknown = True
        model.__dict__["get_input_embeddings"] = lambda: None
    try:
        yield
    finally:
        if unknown:
            del model.__dict__["get_input_embeddings"]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the shard of a tensor on this rank; a plain tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def complete_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[list[str]]:
    """Give every parameter an optimizer state until the exit, as sharded checkpoints require; yield those without one.

    An optimizer creates the state of a parameter in the first step that updates it. Parameters without state get that
    of a step with a gradient of zero, which is removed at the exit, so training does not change. No weight changes.

    Args:
        model (`torch.nn.Module`): the model, for the names.
        optimizer (`torch.optim.Optimizer`): with `grad=None` everywhere, as between two steps.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    without = [parameter for parameter in trained if not optimizer.state.get(parameter)]
    rates = [group["lr"] for group in optimizer.param_groups]
    values = [local_part(parameter.detach()).clone() for parameter in without]
    try:
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
        for parameter in without:
            parameter.grad = torch.zeros_like(parameter)
        if without:
            optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter, value in zip(without, values, strict=True):
            parameter.grad = None
            local_part(parameter.detach()).copy_(value)
    try:
        yield [names[id(parameter)] for parameter in without]
    finally:
        forget_state(model, optimizer, [names[id(parameter)] for parameter in without])


def forget_state(model: nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[str]) -> None:
    """Remove the optimizer state of parameters: the next step that updates them creates it, like their first one."""
    parameters = dict(model.named_parameters())
    for name in names:
        optimizer.state.pop(parameters[name], None)
