"""Keep the buffers of frozen modules: statistics of other norms than BatchNorm, spectral norm, observers.

Which buffers a training forward changes follows from no table and from no one forward: an observer may be switched on
later. So a copy is kept of each, and taken again only after the buffer has changed. A step in which none changes costs
a comparison of version numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class FrozenBuffers:
    """The buffers of the parts of a model, to be kept while a part is frozen.

    The running statistics of BatchNorm are left to `freeze`, except for classes with a forward of their own, which
    may not heed `track_running_stats`.

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
        """Restore, at the exit, what the buffers of some parts hold now; a tensor that another part has, too, stays.

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
    """Whether only `track_running_stats` decides that the buffers of a module move."""
    return isinstance(module, _BatchNorm) and type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class _Buffer:
    """A buffer of a module and what it held last."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.tensor: torch.Tensor | None = None
        self.content: torch.Tensor | None = None
        self.version = -1
        # Whether it changes without a new version, as by `buffer.data.copy_`; not known before the first frozen step.
        self.changes_unseen: bool | None = None

    @property
    def now(self) -> torch.Tensor | None:
        return self.module._buffers.get(self.name)

    def remember(self) -> None:
        """Take a copy, unless the one that is there holds."""
        tensor = self.now
        # A copy made in a dry run under FakeTensorMode holds nothing.
        copied = tensor is self.tensor and type(self.content) is type(tensor)
        if copied and not self.changes_unseen and _version(tensor) == self.version:
            return
        self.tensor, self.version = tensor, _version(tensor)
        self.content = None if tensor is None else tensor.detach().clone()

    def restore(self) -> None:
        """Give the module back its tensor, and the tensor what it held."""
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
    """Let calls inside change copies of the buffers of a module and its parts."""
    held = [(part, part._buffers.copy()) for part in module.modules() if part._buffers]
    try:
        for part, buffers in held:
            part._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        yield
    finally:
        for part, buffers in held:
            part._buffers.clear()
            part._buffers.update(buffers)
