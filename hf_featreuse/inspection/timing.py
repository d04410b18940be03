"""Time the blocks of a model on a device, for an inspection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_featreuse.errors import ConfigurationError
from hf_featreuse.method.blocks import ResidualBlock
from hf_featreuse.method.compiling import compile_blocks
from hf_featreuse.method.cost import StepCosts
from hf_featreuse.method.dummy_forward import model_inputs
from hf_featreuse.method.memory_format import set_memory_format
from hf_featreuse.method.schedule import TrainTrunk
from hf_featreuse.method.step_times import measure_step_times
from hf_featreuse.text import first_sentence


@dataclass(frozen=True)
class Timing:
    """How to time a model in [`inspect_model`].

    Args:
        device (`str`, defaults to `"cpu"`): device, such as `"cuda"`. A model that is passed as a module is timed on
            its own device.
        batch_size (`int`, defaults to 8): images in the batch.
        bf16 (`bool`, defaults to `False`): whether to autocast to bfloat16.
        compiled (`bool`, defaults to `False`): whether to compile the blocks, as training with `torch_compile` does.

    Raises:
        ConfigurationError: the device cannot be used, or `batch_size` is below 1.
    """

    device: str = "cpu"
    batch_size: int = 8
    bf16: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigurationError(f"`batch_size={self.batch_size}` is below 1. Pass a whole number of at least 1.")
        try:
            torch.empty(1, device=self.device)
        except Exception as error:
            raise ConfigurationError(
                f"`device={self.device!r}` cannot be used: {first_sentence(error)} Pass cpu, or a device of this "
                "machine."
            ) from None

    def __str__(self) -> str:
        precision = ", bfloat16" if self.bf16 else ""
        return f"{self.device}, batch of {self.batch_size}{precision}{', compiled blocks' if self.compiled else ''}"


def time_steps(
    model: nn.Module,
    blocks: Sequence[ResidualBlock],
    inputs: Mapping[str, Any] | torch.Tensor | None,
    timing: Timing,
    train_trunk: TrainTrunk,
) -> StepCosts:
    """Measure the times of a model on its device, in nanoseconds."""
    args, kwargs = model_inputs(model, inputs)
    if args:
        raise ConfigurationError(
            "`inputs` is a tensor, but timing needs names. Pass a dictionary of tensors, such as `pixel_values`."
        )
    batch = {
        name: value.expand(timing.batch_size, *value.shape[1:]).contiguous() if _is_one(value) else value
        for name, value in kwargs.items()
    }
    with _memory_format_of_a_run(model), compile_blocks(blocks) if timing.compiled else contextlib.nullcontext():
        return measure_step_times(
            model, blocks, batch, train_trunk=train_trunk, autocast=torch.bfloat16 if timing.bf16 else None
        )


@contextlib.contextmanager
def _memory_format_of_a_run(model: nn.Module) -> Iterator[None]:
    """Lay the model out as a run on its device does by default, until the exit."""
    held = [(parameter, parameter.data) for parameter in model.parameters()]
    set_memory_format(model, None, held[0][0].device, in_shards=False)
    try:
        yield
    finally:
        for parameter, data in held:
            parameter.data = data


def _is_one(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == 1
