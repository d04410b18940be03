"""Models and optimizers whose parameters an engine keeps in shards: FSDP2, `torch.distributed.fsdp.fully_shard`.

Sharding replaces the parameters of a model. For a forward and a backward it gathers a unit of them, and only then does
a gathered parameter take over whether its shard requires gradients. A unit that stays gathered, as the outermost one
does after an evaluation, would go on as it was: what is frozen meanwhile would train.
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
    """The modules of a model that FSDP2 shards as a unit each, the outermost first; none for a plain model."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def unsharded_class(module: nn.Module) -> type:
    """The class of a module before FSDP2 gave it one of its own, such as `FSDPViTForImageClassification`."""
    return next(cls for cls in plain_class(module).__mro__ if not issubclass(cls, FSDPModule))


def ready_shards(modules: Sequence[FSDPModule]) -> None:
    """Make a sharded model ready for a step that freezes some of it; nothing where there is no module.

    Call it while every parameter that will ever train requires gradients.
    """
    if modules:
        # In its first forward FSDP2 reads the dtypes of what trains, once: of a unit that is frozen then it would
        # reduce gradients in another one ever after. Public is only a forward, which would gather every weight.
        modules[0]._get_fsdp_state()._lazy_init()
    for module in modules:
        module.reshard()


@contextlib.contextmanager
def without_unknown_embeddings(model: nn.Module) -> Iterator[None]:
    """Let a model whose input embedding transformers does not know say that it has none, as accelerate understands it.

    accelerate 1.15 asks every model for it before sharding, and stops at the `NotImplementedError` of ConvNeXt and its
    like.
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
    """The shard of a tensor that this rank holds; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def complete_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[list[str]]:
    """Give every parameter an optimizer state for a while, as sharded checkpoints want it; yield whose it is not.

    An optimizer makes the state of a parameter in the first step that moves it. Those without one get that of a step
    with a gradient of zero, which is taken away again, so that training is not changed. No weight moves.

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
    """Take away the optimizer state of parameters: the next step that moves them makes it, as their first one."""
    parameters = dict(model.named_parameters())
    for name in names:
        optimizer.state.pop(parameters[name], None)
