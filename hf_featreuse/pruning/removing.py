"""Remove residual blocks from a model, and check that the result gives the logits of the model that skips them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_featreuse.errors import BlockError, ConfigurationError
from hf_featreuse.method.blocks import ResidualBlock, find_residual_blocks
from hf_featreuse.method.dummy_forward import model_inputs, undisturbed
from hf_featreuse.method.skipping import skip_blocks
from hf_featreuse.method.targets import match_targets
from hf_featreuse.pruning.expressing import Depth
from hf_featreuse.pruning.selecting import check_budget, rank_removals

# A regular expression, or a list of indices in forward order, names and endings of names.
BlockChoice = str | Sequence[int | str]
Model = TypeVar("Model", bound=PreTrainedModel)


def prune_blocks(
    model: Model,
    *,
    drop: BlockChoice | None = None,
    keep: BlockChoice | None = None,
    budget: int | float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    inputs: Mapping[str, Any] | torch.Tensor | None = None,
) -> Model:
    """Return a shallower model of the same class without some residual blocks; the model itself does not change.

    The new model has its own configuration and copies of the weights, so `save_pretrained` writes an ordinary
    checkpoint. Before it is returned, its logits are compared with those of the model that skips the blocks: they must
    be bit-identical. Pass exactly one of `drop`, `keep` and `budget`.

    Args:
        model (`PreTrainedModel`): an image classifier whose configuration sets the number of layers.
        drop (`str` or `list[int | str]`, *optional*): blocks to remove. A list holds indices into
            `find_residual_blocks(model)`, names and dotted endings of names; a string is a regular expression that
            must match the whole name.
        keep (`str` or `list[int | str]`, *optional*): the blocks to keep, in the same grammar; all others are removed.
        budget (`int` or `float`, *optional*): how much may remain at most: a whole number of residual blocks, or a
            share of the forward's arithmetic between 0 and 1. Requires `evaluate`; see [`rank_removals`].
        evaluate (`Callable`, *optional*): takes the model and returns how good it is, higher is better, such as
            `accuracy_on(batches)` on validation data.
        inputs (`dict[str, torch.Tensor]` or `torch.Tensor`, *optional*): a batch to find the blocks with and to
            compare on. By default a batch of noise is made from `model.config`.

    Returns:
        `PreTrainedModel`: of the same class, dtype, device and mode.

    Raises:
        ConfigurationError: not exactly one of `drop`, `keep` and `budget`, or a budget out of range.
        BlockError: there is no such block, nothing to drop or nothing left, or the configuration cannot express the
            result.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_featreuse import prune_blocks
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=8, patch_size=4)
        >>> pruned = prune_blocks(ViTForImageClassification(config), drop=[1, "layers.3"])
        >>> pruned.config.num_hidden_layers, len(pruned.vit.layers)
        (2, 2)
    """
    _check_arguments(model, drop, keep, budget, evaluate)
    blocks = find_residual_blocks(model, inputs)
    if budget is not None:
        assert evaluate is not None
        removals = rank_removals(model, evaluate, budget=budget, inputs=inputs)
        names = {name for removal in removals for name in removal.blocks}
    elif drop is not None:
        names = chosen_names(blocks, drop, "drop", type(model).__name__)
    else:
        assert keep is not None
        names = {block.name for block in blocks} - chosen_names(blocks, keep, "keep", type(model).__name__)
    dropped = [block for block in blocks if block.name in names]
    _check_dropped(model, blocks, dropped)
    config = Depth(model, blocks).config_without([block.name for block in dropped])
    return _build(model, config, dropped, inputs)


def chosen_names(blocks: Sequence[ResidualBlock], choice: BlockChoice, option: str, model_name: str) -> set[str]:
    """Return the names of the blocks that a choice selects."""
    names = [block.name for block in blocks]
    if isinstance(choice, str):
        return match_targets(names, choice, model_name)
    indices = [entry for entry in choice if isinstance(entry, int) and not isinstance(entry, bool)]
    targets = [entry for entry in choice if isinstance(entry, str)]
    if len(indices) + len(targets) < len(choice):
        raise BlockError(
            f"`{option}={choice!r}` holds an entry that is neither an index nor a name. Pass integers and strings."
        )
    wrong = [index for index in indices if not 0 <= index < len(blocks)]
    if wrong:
        raise BlockError(
            f"`{option}` holds {wrong[0]}, but {model_name} has {len(blocks)} blocks, 0 to {len(blocks) - 1}, "
            f"{names[0]} ... {names[-1]}. Pass some of these; `featreuse inspect` lists them."
        )
    return {names[index] for index in indices} | (match_targets(names, targets, model_name) if targets else set())


def _check_arguments(
    model: Any, drop: Any, keep: Any, budget: int | float | None, evaluate: Callable[[nn.Module], float] | None
) -> None:
    if not isinstance(model, PreTrainedModel):
        raise BlockError(
            f"{type(model).__name__} is not a transformers model, so no configuration can describe what is left of "
            "it. Pass the bare model; merge adapters first with `merge_and_unload()`."
        )
    given = [name for name, value in (("drop", drop), ("keep", keep), ("budget", budget)) if value is not None]
    if len(given) != 1:
        raise ConfigurationError(
            f"{' and '.join(f'`{name}`' for name in given) or 'None of `drop`, `keep` and `budget`'} "
            f"{'were' if given else 'was'} passed. Pass exactly one of `drop`, `keep` and `budget`."
        )
    if budget is not None:
        check_budget(budget)
        if evaluate is None:
            raise ConfigurationError(
                f"`budget={budget!r}` was passed without `evaluate`, which measures how good the model is without "
                "each block. Pass `evaluate=accuracy_on(batches)` with validation data, or name the blocks with "
                "`drop`."
            )


def _check_dropped(model: nn.Module, blocks: Sequence[ResidualBlock], dropped: Sequence[ResidualBlock]) -> None:
    name = type(model).__name__
    if not dropped:
        raise BlockError(
            f"There is nothing to drop: all {len(blocks)} residual blocks of {name} would stay. Name some in `drop`, "
            "leave some out of `keep`, or pass a smaller `budget`."
        )
    if len(dropped) == len(blocks):
        raise BlockError(f"All {len(blocks)} residual blocks of {name} would be removed. Leave at least one.")


def _build(
    model: Model,
    config: PreTrainedConfig,
    dropped: Sequence[ResidualBlock],
    inputs: Mapping[str, Any] | torch.Tensor | None,
) -> Model:
    """Return the model of the smaller configuration with the weights that remain."""
    renamed = _new_names(model, dropped)
    with torch.random.fork_rng([]), torch.device("cpu"):
        pruned = type(model)(config)
    state = {renamed[key]: value.detach().clone() for key, value in model.state_dict().items() if key in renamed}
    problems = set(state) ^ set(pruned.state_dict())
    if problems:
        raise BlockError(
            f"The weights of {type(model).__name__} are not those of its configuration: {sorted(problems)[:4]} "
            f"({len(problems)}). Pass a model as `from_pretrained` returns it; merge adapters first."
        )
    # The annotations of `to` in transformers accept no argument.
    nn.Module.to(pruned, model.device)
    # Assigned, not copied: each weight keeps its own dtype.
    pruned.load_state_dict(state, strict=True, assign=True)
    old = dict(model.named_parameters(remove_duplicate=False))
    originals = {new: old[key] for key, new in renamed.items() if key in old}
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(originals[name].requires_grad)
    pruned.train(model.training)
    difference = logits_difference(model, dropped, pruned, inputs)
    if difference != 0:
        raise BlockError(
            f"The logits of {type(model).__name__} without {dropped[0].name} ({len(dropped)} in all) differ by "
            f"{difference:.2g} from those of the model that skips these blocks. Its configuration cannot express this "
            "model. Drop other blocks."
        )
    return pruned


def _new_names(model: nn.Module, dropped: Sequence[ResidualBlock]) -> dict[str, str]:
    """Return the new name of every remaining entry of the state dict, by its old name."""
    modules = dict(model.named_modules())
    moved: dict[str, str | None] = {}
    for parent in dict.fromkeys(block.name.rpartition(".")[0] for block in dropped):
        gone = {block.name for block in dropped}
        children = [name for name, _ in modules[parent].named_children()]
        rest = iter(children)
        for child in children:
            name = f"{parent}.{child}"
            moved[f"{name}."] = None if name in gone else f"{parent}.{next(rest)}."
    renamed = {}
    for key in model.state_dict():
        prefix = next((prefix for prefix in moved if key.startswith(prefix)), None)
        if prefix is None:
            renamed[key] = key
        elif (new := moved[prefix]) is not None:
            renamed[key] = new + key[len(prefix) :]
    return renamed


def _logits(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the logits from aligned copies of the weights.

    Loaded weights lie at any offset of their file, and kernels for unaligned memory may round differently.
    """
    weights = {name: value.clone() for name, value in chain(model.named_parameters(), model.named_buffers())}
    return torch.func.functional_call(model, weights, args, dict(kwargs))[0]


def logits_difference(
    model: nn.Module,
    dropped: Sequence[ResidualBlock],
    other: nn.Module,
    inputs: Mapping[str, Any] | torch.Tensor | None = None,
) -> float:
    """Return the largest difference of the logits of a model that skips blocks from another's; 0 if bit-identical."""
    args, kwargs = model_inputs(model, inputs)
    if inputs is None:
        generator = torch.Generator().manual_seed(0)
        kwargs = {key: _noise(value, generator) for key, value in kwargs.items()}
    with undisturbed(model), undisturbed(other), torch.no_grad():
        with skip_blocks(dropped, allow_inexact=True):
            expected = _logits(model, args, kwargs)
        found = _logits(other, args, kwargs)
    return 0.0 if torch.equal(expected, found) else (expected - found).abs().max().item() or math.nan


def _noise(value: Any, generator: torch.Generator) -> Any:
    """Return noise in the shape of a dummy input, because zeros would hide a difference."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return torch.randn(2, *value.shape[1:], generator=generator).to(value)
