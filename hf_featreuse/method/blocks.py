"""Find the residual blocks of a model, by structure, in forward order.

A module is a residual block if the graph of one forward shows that its first output is one of its input tensors plus
something, and if it is in a list or sequence, or else among siblings of one class. Other modules can be named. The
shortcut is exact if it is the identity in that forward and in training mode.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_featreuse.errors import BlockError, ConfigurationError
from hf_featreuse.method.batch_arguments import unbatched_in_a_larger_batch
from hf_featreuse.method.dummy_forward import check_not_compiled
from hf_featreuse.method.residual_graph import NOT_SHOWN, Call, Key, Trace, calls_in_training, trace_calls
from hf_featreuse.method.targets import listed, no_match, target_entries

_IN_TRAINING = "in training mode its shortcut changes the input, as dropout does"


@dataclass(frozen=True, eq=False)
class ResidualBlock:
    """A residual block of a model, with what is needed to skip it.

    Args:
        name (`str`): qualified name in the model, as in `model.named_modules()`.
        module (`torch.nn.Module`): the block.
        exact (`bool`): whether the graph shows that the shortcut is a bitwise identity, so that skipping equals a
            zero branch. `False` if an activation follows the addition and changes the input again, such as GELU; if
            the shortcut moves or scales values, or has dropout; if the output is the sum of several inputs; if only
            the first of two streams is shown to be kept; and for a block named in `target_blocks` that is not shown
            to be its input plus something: then only you state that it computes input plus branch.
        inexact (`str`): why it is not exact; empty if it is.
        activation (`str`, *optional*): name of the activation after the addition, such as `"Relu"`.
        position (`int`, *optional*): index of the residual stream among the positional arguments of the call.
        keyword (`str`, *optional*): its name, if the call passes it by keyword.
        num_outputs (`int`, *optional*): length of the tuple that the block returns; `None` for a bare tensor.
        num_calls (`int`, defaults to 1): how often a forward of the model calls the block.
        unbatched (`frozenset[str]`, defaults to none): tensors among the arguments of a call whose first dimension is
            not the batch, such as `"position_embeddings.0"` or `"1"`; samples share them when a batch is split.
        passed_on (`tuple`, defaults to none): for each further output, position or keyword of the argument that it
            returns, such as a second stream; `None` if the block computes it.
        made_inside (`tuple[int, ...]`, defaults to none): indices of further outputs that only the block computes,
            such as an auxiliary loss, in eval or training mode. Such a block cannot be skipped. Attention weights do
            not count: a skipped block returns `None` for them.
        branch (`torch.nn.Module`, *optional*): part of the block whose output is added to the input, if an activation
            follows the addition; a stochastic-depth step scales it.
        followers (`tuple[torch.nn.Module, ...]`): modules with their own parameters that the forward first calls after
            the last call of this block.

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
    num_calls: int = 1
    unbatched: frozenset[str] = frozenset()
    passed_on: tuple[Key | None, ...] = ()
    inexact: str = field(default="", repr=False)
    made_inside: tuple[int, ...] = ()
    branch: nn.Module | None = field(default=None, repr=False)
    followers: tuple[nn.Module, ...] = field(default=(), repr=False)

    @property
    def has_trainable_parameters(self) -> bool:
        """Whether any parameter of the block currently requires gradients."""
        return any(parameter.requires_grad for parameter in self.module.parameters())

    def stream(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Return the residual stream among the arguments of a call of the block."""
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return kwargs[self.keyword] if self.keyword is not None else next(iter(kwargs.values()))

    @property
    def has_batch_first(self) -> bool:
        """Whether the first dimension of the residual stream is the batch, so that samples can be separated."""
        return not self.unbatched & {str(self.position), self.keyword}


def find_residual_blocks(
    model: nn.Module,
    inputs: Mapping[str, Any] | torch.Tensor | None = None,
    target_blocks: str | Sequence[str] | None = None,
) -> list[ResidualBlock]:
    """Find the skippable residual blocks of a model in the order in which the forward calls them.

    Runs one or two forwards of a small batch, without a loss. Random states, buffers, gradients, modes and attributes
    do not change.

    Args:
        model (`torch.nn.Module`): an image classifier, bare or with PEFT adapters, on any device including the meta
            device. It must not be compiled or wrapped for distributed training yet.
        inputs (`dict[str, torch.Tensor]` or `torch.Tensor`, *optional*): a small batch for the model's forward, for
            instance `{"pixel_values": tensor of shape (1, 3, height, width)}`. Labels are left out. By default a batch
            of one is made from `model.config`.
        target_blocks (`str` or `list[str]`, *optional*): keep only these of the blocks found. A string is a regular
            expression that must match the whole name; a list holds names or dotted suffixes of names, like
            `target_modules` in PEFT. By default all are kept. An entry that matches none of the blocks may name any
            other module of the model, for architectures whose blocks are not found by structure. It becomes a block if
            each call takes exactly one tensor of the shape and dtype of its first output; see `ResidualBlock` for
            `exact`.

    Returns:
        `list[ResidualBlock]`: in forward order. Blocks whose shortcut is inexact are listed with `exact=False`.

    Raises:
        BlockError: no block was found; a target matches none, names a module that cannot be a block, or names two
            modules of which one contains the other; the dummy batch does not fit the model; or the model is compiled.

    Example:
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> from hf_featreuse import find_residual_blocks
        >>> config = ResNetConfig(
        ...     embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
        ... )
        >>> [block.name for block in find_residual_blocks(ResNetForImageClassification(config))]
        ['resnet.encoder.stages.0.layers.0', 'resnet.encoder.stages.0.layers.1', 'resnet.encoder.stages.1.layers.1']
    """
    return find_and_choose(model, inputs, target_blocks)[1]


def find_and_choose(
    model: nn.Module,
    inputs: Mapping[str, Any] | torch.Tensor | None = None,
    target_blocks: str | Sequence[str] | None = None,
) -> tuple[list[ResidualBlock], list[ResidualBlock]]:
    """Return the blocks found by structure, and the blocks that the target selects from them and other modules."""
    check_not_compiled(model)
    modules = {name: module for name, module in model.named_modules() if name}
    in_lists = [name for name in modules if isinstance(_parent(modules, model, name), (nn.ModuleList, nn.Sequential))]
    alike = _among_siblings_of_one_class(model)
    traced = {*in_lists, *alike} if target_blocks is None else set(modules)
    trace = trace_calls(
        model, {n: m for n, m in modules.items() if n in traced and next(m.parameters(), None) is not None}, inputs
    )
    calls = trace.calls
    found: list[ResidualBlock] = []
    for names in (set(in_lists), alike):
        shown = [_block(name, modules[name], trace) for name, made in calls.items() if name in names and _shown(made)]
        found = found or _innermost(shown)
    chosen = found
    if target_blocks is not None:
        chosen = _choose(found, modules, trace, target_blocks, type(model).__name__)
    elif not found:
        raise BlockError(
            f"{type(model).__name__} has no residual block that can be skipped: no module in a list or sequence, or "
            "among siblings of one class, returns its input plus something of the same shape. Feature reuse needs a "
            "residual network, such as ViT, ConvNeXt or ResNet. If this is one, name its blocks in `target_blocks`; "
            "to train plainly, set `stochastic_depth_steps=0` and `masked_freeze_steps=0`."
        )
    names = {block.name: block.module for block in (*found, *chosen)}
    in_training = calls_in_training(model, names, trace.arguments)
    shared = unbatched_in_a_larger_batch(model, names, inputs)
    found, chosen = (
        [replace(block, unbatched=block.unbatched.union(shared.get(block.name, ()))) for block in part]
        for part in (found, chosen)
    )
    looked = [[_looked_at_again(block, in_training.get(block.name, [])) for block in part] for part in (found, chosen)]
    return looked[0], looked[1]


def _parent(modules: Mapping[str, nn.Module], model: nn.Module, name: str) -> nn.Module:
    return modules.get(name.rpartition(".")[0], model)


def _among_siblings_of_one_class(model: nn.Module) -> set[str]:
    """Return the names of modules whose siblings all share their class, if several siblings of it exist somewhere."""
    rows = {
        name: [child for child, _ in module.named_children()]
        for name, module in model.named_modules()
        if len({type(child) for child in module.children()}) == 1
    }
    classes = {name: type(model.get_submodule(name).get_submodule(children[0])) for name, children in rows.items()}
    repeated = {classes[name] for name, children in rows.items() if len(children) > 1}
    return {
        f"{name}.{child}" if name else child
        for name, children in rows.items()
        if classes[name] in repeated
        for child in children
    }


def _shown(calls: list[Call]) -> bool:
    """Return whether the graph shows that every call returns the same argument plus something."""
    return bool(calls) and all(call.shown and call.key == calls[0].key for call in calls)


def _looked_at_again(block: ResidualBlock, calls: list[Call]) -> ResidualBlock:
    """Return the block updated with what its calls in training mode show."""
    made_inside = tuple(sorted({*block.made_inside, *(index for call in calls for index in call.made_inside)}))
    if not block.exact or all(call.shown and not call.inexact for call in calls):
        return replace(block, made_inside=made_inside)
    return replace(block, made_inside=made_inside, exact=False, inexact=_IN_TRAINING)


def _block(name: str, module: nn.Module, trace: Trace) -> ResidualBlock:
    calls = trace.calls[name]
    first, ended = calls[0], calls[-1].ended
    inexact = next((call.inexact for call in calls if call.inexact), "")
    return ResidualBlock(
        name=name,
        module=module,
        exact=not inexact,
        inexact=inexact,
        activation=first.activation if _shown(calls) else None,
        position=first.key if isinstance(first.key, int) else None,
        keyword=first.key if isinstance(first.key, str) else None,
        num_outputs=first.num_outputs,
        num_calls=len(calls),
        unbatched=frozenset().union(*(call.unbatched for call in calls)),
        passed_on=first.passed_on,
        made_inside=tuple(sorted({index for call in calls for index in call.made_inside})),
        branch=first.branch if all(call.branch is first.branch for call in calls) else None,
        followers=tuple(
            other
            for other, begun in trace.first_called.items()
            if begun >= ended and next(other.parameters(recurse=False), None) is not None
        ),
    )


def _choose(
    found: Sequence[ResidualBlock],
    modules: Mapping[str, nn.Module],
    trace: Trace,
    target_blocks: str | Sequence[str],
    model_name: str,
) -> list[ResidualBlock]:
    """Return the blocks that a target selects, in forward order; other modules that it names become blocks."""
    calls = trace.calls
    candidates = listed([block.name for block in found])
    chosen: dict[str, ResidualBlock] = {}
    for entry, matches in target_entries(target_blocks, candidates):
        selected = {block.name: block for block in found if matches(block.name)}
        if not selected:
            named = [name for name in modules if matches(name)]
            if not named:
                raise no_match(entry, model_name, candidates)
            for name in named:
                why = _why_not(name, {block.name for block in found} | set(named), calls.get(name))
                if why:
                    raise no_match(
                        entry,
                        model_name,
                        candidates,
                        f". It names {name} ({type(modules[name]).__name__}), which {why}",
                    )
                selected[name] = _block(name, modules[name], trace)
        chosen.update(selected)
    if not chosen:
        raise no_match(target_blocks, model_name, candidates)
    outer = next((name for name in chosen for inner in chosen if inner.startswith(f"{name}.")), None)
    if outer is not None:
        inner = next(name for name in chosen if name.startswith(f"{outer}."))
        raise BlockError(f"`target_blocks` names {outer} and {inner}, which is a part of it. Name one of the two.")
    return [chosen[name] for name in calls if name in chosen]


def _why_not(name: str, others: set[str], calls: list[Call] | None) -> str:
    """Return why a named module cannot be a block; empty if it can."""
    inner = min((other for other in others if other.startswith(f"{name}.")), default=None)
    if inner is not None:
        return f"contains {inner}: name that one"
    if not calls:
        return "has no parameters or is not called in the forward"
    reason = next((call.reason for call in calls if call.reason), "")
    differs = any(call.key != calls[0].key for call in calls)
    return reason or ("takes its stream from a different argument in each call" if differs else "")


def trainable_blocks(model: nn.Module, blocks: Sequence[ResidualBlock]) -> list[ResidualBlock]:
    """Return the blocks with parameters that train; raise `BlockError` if there are none.

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
    """Raise `BlockError` unless skipping each of the blocks is known to equal a zero residual branch."""
    inexact = [block for block in blocks if not block.exact]
    if inexact:
        fix = "Use an activation that keeps its own output, such as ReLU, leave" if inexact[0].activation else "Leave"
        raise BlockError(
            f"Block {inexact[0].name} ({type(inexact[0].module).__name__}) cannot be skipped exactly: "
            f"{inexact[0].inexact or NOT_SHOWN} ({len(inexact)} of {len(blocks)} blocks). {fix} these blocks "
            "out with `target_blocks`, or set `allow_inexact_skip=True` to drop them anyway."
        )


def check_outputs(blocks: Sequence[ResidualBlock]) -> None:
    """Raise `BlockError` if one of the blocks returns something that only the block computes."""
    block = next((block for block in blocks if block.made_inside), None)
    if block is not None:
        raise BlockError(
            f"Block {block.name} ({type(block.module).__name__}) cannot be skipped: only it computes output "
            f"{block.made_inside[0]} of those it returns, counted from 0, such as an auxiliary loss or router logits, "
            "which would be missing. Return `None` there, or leave the block out with `target_blocks`."
        )


def check_scalable(blocks: Sequence[ResidualBlock]) -> None:
    """Raise `ConfigurationError` if what one of the blocks adds to its input cannot be scaled."""
    unknown = next((block for block in blocks if block.activation is not None and block.branch is None), None)
    if unknown is not None:
        raise ConfigurationError(
            f"`scale_kept=True` cannot scale block {unknown.name} ({type(unknown.module).__name__}): "
            f"{unknown.activation} follows its addition, and no module inside it returns exactly what is added. Set "
            "`scale_kept=False`, or leave the block out with `target_blocks`."
        )


def _innermost(blocks: list[ResidualBlock]) -> list[ResidualBlock]:
    """Leave out blocks that contain another one: a stage of residual blocks is itself input plus something."""
    names = {block.name for block in blocks}
    outer = {name[: match.start()] for name in names for match in re.finditer(r"\.", name)}
    return [block for block in blocks if block.name not in outer]
