"""An exponential moving average (EMA) of the weights, with which the model can be evaluated.

The update is torch's (`torch.optim.swa_utils.get_ema_multi_avg_fn`). torch's `AveragedModel` copies the whole module,
with hooks, wrapped forwards and the frozen base of adapters; here only the tensors that change are copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hf_featreuse.errors import CheckpointError, ConfigurationError

AVERAGE_FILE = "averaged.safetensors"


class WeightAverage:
    """Keep an exponential moving average of the weights of a model.

    After each optimizer step: average = d * average + (1 - d) * weights, where d warms up to `decay`: after t steps it
    is min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten. The average covers the parameters
    that require gradients at construction, and the floating-point buffers, such as the statistics of BatchNorm. It
    starts at the weights that the model has at construction.

    A weight whose block is dropped or frozen in a step does not change, but its average still moves toward it.

    Args:
        model (`torch.nn.Module`): the model that trains, outside of any step of feature reuse.
        decay (`float`): above 0 and below 1; the average covers about the last 1 / (1 - decay) steps.

    Raises:
        ConfigurationError: `decay` is out of range.

    Source: Polyak and Juditsky 1992; torch's `get_ema_multi_avg_fn`; the warm-up is that of TensorFlow's
    `ExponentialMovingAverage`.

    Example:
        >>> import torch
        >>> from hf_featreuse import WeightAverage
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> average = WeightAverage(model, decay=0.75)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> average.update(step=100)
        >>> with average.applied():
        ...     model.weight.item()
        0.25
        >>> model.weight.item()
        1.0
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        check_decay(decay)
        self.model, self.decay = model, decay
        # Outside of steps, because in masked-freeze steps some parameters require no gradient.
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        names += [name for name, tensor in model.named_buffers() if tensor.is_floating_point()]
        # Where each is stored: moving a model replaces its buffers, and a walk over all modules per step is slow.
        self._places = {name: _place(model, name) for name in names}
        self._average = {name: tensor.clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are averaged, with their current values."""
        return {name: holder[key].detach() for name, (holder, key) in self._places.items()}

    def update(self, step: int | None = None) -> None:
        """Update the average; call it once after every optimizer step.

        Args:
            step (`int`, *optional*): optimizer steps taken, including this one; `None` uses `decay` without warm-up.
        """
        current = self._tensors()
        decay = self.decay if step is None else min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(self._average.values()), [current[name] for name in self._average], 0)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Return the model the averaged weights inside the context; its own are restored bitwise at exit."""
        own = {name: tensor.clone() for name, tensor in self._tensors().items()}
        self.copy_to_model()
        try:
            yield
        finally:
            self._copy(own)

    def copy_to_model(self) -> None:
        """Copy the averaged weights into the model, at the end of training."""
        self._copy(self._average)

    def _copy(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(values[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the average by the names of the model; `accelerator.register_for_checkpointing` uses it."""
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, torch.Tensor], source: str = "this state") -> None:
        """Load an average that `state_dict` returned.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of another shape; then nothing is changed.
        """
        shapes = {name: tensor.shape for name, tensor in self._average.items()}
        found = {name: tensor.shape for name, tensor in state.items()}
        if shapes != found:
            wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
            raise CheckpointError(
                f"The weight average in {source} is of another model: {wrong[:4]} ({len(wrong)} in total) are "
                "missing, unexpected or of another shape. Resume with the model that wrote it, or leave `ema_decay` "
                "unset."
            )
        for name, tensor in self._average.items():
            tensor.copy_(state[name])

    def save(self, folder: str | Path) -> None:
        """Write the average into a checkpoint folder."""
        state = {name: tensor.contiguous().cpu() for name, tensor in self._average.items()}
        safetensors.torch.save_file(state, Path(folder) / AVERAGE_FILE)

    def load(self, folder: str | Path) -> bool:
        """Load the average of a checkpoint folder; return `False` if it has none."""
        path = Path(folder) / AVERAGE_FILE
        if not path.is_file():
            return False
        self.load_state_dict(safetensors.torch.load_file(path), str(path))
        return True


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the dictionary that holds a parameter or buffer, and its key there."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    return (module._parameters if key in module._parameters else module._buffers), key


def check_decay(value: object) -> None:
    """Raise `ConfigurationError` unless a value is a decay."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ConfigurationError(
            f"`ema_decay={value!r}` is not a decay. Pass a number above 0 and below 1, such as 0.999, or None for no "
            "EMA."
        )
