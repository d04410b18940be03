"""The tensors among the arguments of a block: which belong to the samples of a batch, and how containers are rebuilt.

Containers are tuples and lists, named tuples included, mappings and dataclasses.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import Cache

from hf_featreuse.method.dummy_forward import model_inputs, undisturbed
from hf_featreuse.method.rows import put_rows, take_rows


def items_of(value: Any) -> list[tuple[Any, Any]] | None:
    """The items of a container with their keys; `None` for anything else."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    return None


def with_items(value: Any, items: Sequence[Any]) -> Any:
    """A container like another one that holds these items, in its order."""
    if isinstance(value, tuple):
        # Named tuples take one argument per item.
        return cast(Any, value)._make(items) if hasattr(value, "_make") else type(value)(items)
    twin = copy.copy(value)
    if isinstance(value, list):
        twin[:] = items
        return twin
    keys = [key for key, _ in items_of(value) or ()]
    for key, item in zip(keys, items, strict=True):
        if isinstance(value, Mapping):
            twin[key] = item
        else:
            # Frozen dataclasses too.
            object.__setattr__(twin, key, item)
    return twin


def named_tensors(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among the arguments of a call, those inside containers too, by path."""

    def walk(path: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield path, value
        for key, item in items_of(value) or ():
            yield from walk(f"{path}.{key}", item)

    for key, value in (*enumerate(args), *kwargs.items()):
        yield from walk(str(key), value)


def in_parts(
    path: str, value: Any, split: Callable[[str, torch.Tensor], list[torch.Tensor] | None], count: int
) -> list[Any]:
    """An argument for each of some groups of samples; what no group has for itself is shared.

    A cache of keys and values of the whole batch has no part for a group, and training no use for one: it is left out.

    Args:
        path (`str`): of the argument.
        value: the argument.
        split (`Callable`): gives the parts of the tensor at a path, or `None` if it is shared.
        count (`int`): number of groups.
    """
    if isinstance(value, torch.Tensor):
        return split(path, value) or [value] * count
    if isinstance(value, Cache):
        return [None] * count
    items = items_of(value)
    if not items:
        return [value] * count
    parts = [in_parts(f"{path}.{key}", item, split, count) for key, item in items]
    if all(part[group] is item for part, (_, item) in zip(parts, items, strict=True) for group in range(count)):
        return [value] * count
    return [with_items(value, [part[group] for part in parts]) for group in range(count)]


class Split(NamedTuple):
    """The samples of a batch in groups, for one block.

    Args:
        num_samples (`int`): in the batch.
        rows (`list[torch.Tensor]`): which samples each group holds.
        rest (`bool`): whether there are samples in no group.
    """

    num_samples: int
    rows: Sequence[torch.Tensor]
    rest: bool


def take_apart(
    unbatched: Collection[str], args: tuple, kwargs: Mapping[str, Any], split: Split
) -> list[tuple[tuple, dict[str, Any]]]:
    """The arguments of a call for each group: tensors whose first dimension is the batch are split, others shared.

    If there is a rest, the last ones are those of the whole batch, as `put_together` needs them.
    """
    count = len(split.rows) + split.rest

    def select(path: str, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        batched = path not in unbatched and tensor.shape[:1] == (split.num_samples,)
        return take_rows(tensor, split.rows, rest=split.rest) if batched else None

    positional = [in_parts(str(index), value, select, count) for index, value in enumerate(args)]
    by_name = {key: in_parts(key, value, select, count) for key, value in kwargs.items()}
    return [
        (tuple(part[group] for part in positional), {key: part[group] for key, part in by_name.items()})
        for group in range(count)
    ]


def put_together(outputs: list[Any], split: Split) -> Any:
    """One output for the batch, in its own order, from those of the groups and, if there is one, of the rest."""
    if isinstance(outputs[0], torch.Tensor):
        return _put(outputs, split)
    merged: list[Any] = [_put([output[0] for output in outputs], split)]
    for index in range(1, len(outputs[0])):
        values = [output[index] for output in outputs]
        example = next((value for value in values if value is not None), None)
        if example is not None and _is_split(values, example, split):
            merged.append(_put(_filled(values, example, split), split))
        else:
            merged.append(example)
    return with_items(outputs[0], merged)


def _put(values: list[torch.Tensor], split: Split) -> torch.Tensor:
    groups = len(split.rows)
    return put_rows(values[:groups], split.rows, values[groups] if split.rest else None)


def _is_split(values: list[Any], example: Any, split: Split) -> bool:
    """Return whether the values of an output are tensors of as many samples as each group has."""
    sizes = [*map(len, split.rows), *[split.num_samples] * split.rest]
    return isinstance(example, torch.Tensor) and all(
        value is None or value.shape[:1] == (size,) for value, size in zip(values, sizes, strict=True)
    )


def _filled(values: list[Any], example: torch.Tensor, split: Split) -> list[torch.Tensor]:
    """What a block did not compute for some samples, such as their attention weights, is zero for them."""
    sizes = [*map(len, split.rows), *[split.num_samples] * split.rest]
    return [
        example.new_zeros(size, *example.shape[1:]) if value is None else value
        for value, size in zip(values, sizes, strict=True)
    ]


def unbatched_in_a_larger_batch(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: Mapping[str, Any] | torch.Tensor | None
) -> dict[str, set[str]]:
    """Paths of the tensors among the arguments of modules that do not grow by a sample when the batch does.

    In a batch of several samples, a tensor that they share may have as many rows by chance. One forward with one more
    sample tells. Empty for a batch of one, where it does not matter, and if the model does not run on a larger one.
    """
    args, kwargs = model_inputs(model, inputs)
    batched = [(path, tensor.shape[0]) for path, tensor in named_tensors(args, kwargs) if tensor.ndim]
    size = batched[0][1] if batched else 1
    if size < 2:
        return {}
    same = {path for path, rows in batched if rows == size}
    # An input with as many rows may be shared, too; then the model runs if the first one alone grows.
    for grown in ({batched[0][0]}, same):
        found: dict[str, set[str]] = {}
        try:
            with undisturbed(model), torch.no_grad(), _watched(modules, size + 1, found):
                model(*_grown(enumerate(args), grown).values(), **_grown(kwargs.items(), grown))
            return found
        except Exception:
            continue
    return {}


def _grown(arguments: Any, paths: set[str]) -> dict[Any, Any]:
    """The arguments with the first sample repeated at the end of some tensors."""

    def larger(path: str, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        return [torch.cat([tensor, tensor[:1]])] if path in paths else None

    return {key: in_parts(str(key), value, larger, 1)[0] for key, value in arguments}


@contextlib.contextmanager
def _watched(modules: Mapping[str, nn.Module], size: int, found: dict[str, set[str]]) -> Iterator[None]:
    """Note, for each module that is called inside, tensors among its arguments that have another number of rows."""

    def watch(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            other = {path for path, tensor in named_tensors(args, kwargs) if tensor.shape[:1] != (size,)}
            found.setdefault(name, set()).update(other)

        return hook

    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
