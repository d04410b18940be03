"""Keep the buffers of frozen modules: statistics of norms other than BatchNorm, spectral norm, observers.

Neither a table nor a single forward can tell which buffers a training forward changes: an observer may be enabled
later. So a copy of each buffer is kept, and renewed only after the buffer has changed. A step in which none changes
costs only a comparison of version numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class FrozenBuffers:
    """The buffers of the parts of a model, which are kept while a part is frozen.

    The running statistics of BatchNorm are left to `freeze`, except for classes with their own forward, which may
    ignore `track_running_stats`.

    Args:
        parts (`list[list[torch.nn.Module]]`): the modules of each part.
    """

    def __init__(self, parts: Iterable[Sequence[nn.Module]]) -> None:
        self._parts = [
            [_Buffer(module, name) for module in part if not _heeds_flag(module) for name in module._buffers]
            for part in parts
        ]

    @contextlib.contextmanager
    def kept(self, frozen: Collection[int]) -> Iterator[None]:
        """Restore the current content of the buffers of some parts at the exit, unless another part shares a tensor.

        Args:
            frozen (`list[int]`): indices of the parts.
        """
        buffers = [buffer for index in frozen for buffer in self._parts[index]]
        if buffers:
            others = (buffer for index, part in enumerate(self._parts) if index not in frozen for buffer in part)
            shared = {id(tensor) for other in others if (tensor := other.now) is not None}
            buffers = [buffer for buffer in buffers if id(buffer.now) not in shared]
        for buffer in buffers:
            buffer.remember()
        try:
            yield
        finally:
            for buffer in buffers:
                buffer.restore()


def _heeds_flag(module: nn.Module) -> bool:
    """Return whether only `track_running_stats` decides if the buffers of a module change."""
    return isinstance(module, _BatchNorm) and type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class _Buffer:
    """A buffer of a module and its last content."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.tensor: torch.Tensor | None = None
        self.content: torch.Tensor | None = None
        self.version = -1
        # Whether it changes without a new version, as with `buffer.data.copy_`; unknown until the first frozen step.
        self.changes_unseen: bool | None = None

    @property
    def now(self) -> torch.Tensor | None:
        return self.module._buffers.get(self.name)

    def remember(self) -> None:
        """Copy the buffer, unless the existing copy is still valid."""
        tensor = self.now
        # A copy made in a dry run under FakeTensorMode has no values.
        copied = tensor is self.tensor and type(self.content) is type(tensor)
        if copied and not self.changes_unseen and _version(tensor) == self.version:
            return
        self.tensor, self.version = tensor, _version(tensor)
        self.content = None if tensor is None else tensor.detach().clone()

    def restore(self) -> None:
        """Restore the module's tensor, and the content of the tensor."""
        if self.now is not self.tensor:
            self.module._buffers[self.name] = self.tensor
        if self.tensor is None or self.content is None:
            return
        changed = _version(self.tensor) != self.version
        if not changed and self.changes_unseen is None and self.module.training:
            # The only comparison that waits for a device, once per buffer.
            self.changes_unseen = _has_values(self.tensor) and not torch.equal(self.tensor, self.content)
        if changed or self.changes_unseen:
            with torch.no_grad():
                if self.tensor.shape != self.content.shape:
                    self.tensor.resize_(self.content.shape)
                self.tensor.copy_(self.content)
            self.version = _version(self.tensor)


def _version(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _has_values(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.device.type != "meta"


@contextlib.contextmanager
def copied_buffers(module: nn.Module) -> Iterator[None]:
    """Let calls inside change only copies of the buffers of a module and its parts."""
    held = [(part, part._buffers.copy()) for part in module.modules() if part._buffers]
    try:
        for part, buffers in held:
            part._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        yield
    finally:
        for part, buffers in held:
            part._buffers.clear()
            part._buffers.update(buffers)
