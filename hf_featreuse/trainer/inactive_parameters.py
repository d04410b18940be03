"""Check, in the first steps of a run, that the optimizer does not change parameters without a gradient.

Dropped and frozen blocks have no gradient (`grad` is None), and every optimizer of torch skips such parameters. An
optimizer that replaces the absent gradient with zero changes them by momentum and weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import TrainerCallback

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.method.schedule import StepKind

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class InactiveParameters(TrainerCallback):
    """Raises an error if the optimizer changes a parameter without a gradient, or its state.

    Weights and optimizer state are compared before and after the optimizer step, for each kind of step and each
    parameter group, until one step had a learning rate above 0 and a parameter without a gradient that an earlier step
    had trained: before that, momentum changes nothing, and a warm-up starts at 0. Nothing is compared later. Steps
    that the gradient scaler skips do not count.

    Args:
        step_kind (`Callable`): returns the kind of the step of the current gradients.
        was_skipped (`Callable`): returns whether the last optimizer step was skipped.

    Raises:
        ConfigurationError: after the first optimizer step that changed such a parameter or its state.
    """

    def __init__(self, step_kind: Callable[[], StepKind | None], was_skipped: Callable[[], bool]) -> None:
        self._step_kind, self._was_skipped = step_kind, was_skipped
        self._forget()

    def _forget(self) -> None:
        # Ids of the parameters that an optimizer step of this run has trained.
        self._trained: set[int] = set()
        # Kinds of step and indices of parameter groups that need no further comparison.
        self._passed: set[tuple[StepKind, int]] = set()
        self._before: dict[int, tuple[list[nn.Parameter], list[torch.Tensor]]] = {}
        self._active: set[int] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start over, because the optimizer may have been replaced."""
        self._forget()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Record what must not change."""
        kind, self._before, self._active = self._step_kind(), {}, set()
        if kind is None or (kind is StepKind.VANILLA and self._passed):
            return
        for index, group in enumerate(optimizer.param_groups):
            if (kind, index) in self._passed:
                continue
            without = [p for p in group["params"] if p.grad is None and p.requires_grad]
            self._active |= {id(p) for p in group["params"] if p.grad is not None}
            if without and kind is not StepKind.VANILLA:
                self._before[index] = without, [_digest(p, optimizer) for p in without]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Compare the record with the current values."""
        if self._was_skipped():
            return
        kind = self._step_kind()
        for index, (without, before) in self._before.items():
            after = [_digest(parameter, optimizer) for parameter in without]
            if not all(torch.equal(was, now) for was, now in zip(before, after, strict=True)):
                raise _error(optimizer, kind)
            learns = float(optimizer.param_groups[index].get("lr", 1.0)) > 0
            if kind is not None and learns and any(id(parameter) in self._trained for parameter in without):
                self._passed.add((kind, index))
        self._trained |= self._active
        self._before = {}


def _error(optimizer: Any, kind: StepKind | None) -> ConfigurationError:
    plain = type(getattr(optimizer, "optimizer", optimizer))
    step = "an optimizer step" if kind is None else f"a {kind.value} step"
    return ConfigurationError(
        f"The optimizer {plain.__module__}.{plain.__qualname__} cannot be used with feature reuse: in {step} it "
        "changed parameters that had no gradient, or their optimizer state. It treats an absent gradient as zero, so "
        "momentum and weight decay change blocks that are dropped or frozen. Pass an optimizer that skips parameters "
        'whose `grad` is None, as those of torch do, for instance `optim="adamw_torch"`. Plain training, with '
        "`stochastic_depth_steps=0` and `masked_freeze_steps=0`, works with any optimizer."
    )


def _digest(parameter: nn.Parameter, optimizer: Any) -> torch.Tensor:
    """Return checksums of a parameter and its optimizer state, which take less memory than copies."""
    values = [parameter, *_values(optimizer.state.get(parameter, {}))]
    sums = [_bits(value) if isinstance(value, torch.Tensor) else torch.tensor(hash(value)) for value in values]
    return torch.stack([total.to(sums[0].device) for total in sums])


def _values(state: Any) -> Iterator[Any]:
    """Yield the tensors and numbers in a nested optimizer state."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        for value in state:
            yield from _values(value)
    elif isinstance(state, (torch.Tensor, int, float)):
        yield state


@torch.no_grad()
def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor's bits, read as integers, on its device."""
    if is_traceable_wrapper_subclass(tensor):  # Sharded or quantized: the parts on this device.
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        # Since torch 2.13 a sharded tensor names its mesh, too.
        return sum((_bits(part) for part in parts if isinstance(part, torch.Tensor)), torch.tensor(0))
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
