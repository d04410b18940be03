"""Seconds per step by kind, without synchronizing host and device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from hf_featreuse.method.schedule import StepKind

# The first steps of a process are slow: libraries select kernels, blocks are compiled, memory is allocated.
WARM_UP = 10
# Steps of a process after which times are logged.
FIRST_LOG = 50


class StepTimer(TrainerCallback):
    """Times optimizer steps, from the first micro-batch to the end of the optimizer step, without data loading.

    On a GPU each step is enclosed in two events, which are read when they are complete, so the time is that of the
    device. On a CPU the host's clock is used. On other devices nothing is timed.

    Args:
        kind (`Callable[[], StepKind | None]`): returns the kind of the last step.
    """

    def __init__(self, kind: Callable[[], StepKind | None]) -> None:
        self._kind = kind
        self._clock: HostClock | EventClock | None = None
        self._begin()

    def _begin(self) -> None:
        self._steps = 0
        self._begun: Any = None
        self._pending: deque[tuple[StepKind, Any, Any]] = deque()
        # Sum and number of the steps of each kind since the last log, of which there may be none for the whole run.
        self._seconds: dict[StepKind, tuple[float, int]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the clock of the device."""
        self._clock = {"cpu": HostClock, "cuda": EventClock}.get(args.device.type, lambda: None)()
        self._begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the beginning of an optimizer step."""
        self._begun = None if self._clock is None else self._clock.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark its end, and read earlier steps that are complete."""
        kind = self._kind()
        if self._clock is None or self._begun is None or kind is None:
            return
        self._steps += 1
        if self._steps > WARM_UP:
            self._pending.append((kind, self._begun, self._clock.mark()))
        self._begun = None
        self._read()

    def _read(self) -> None:
        """Read the steps that are complete, in order."""
        while self._clock is not None and self._pending:
            kind, begun, ended = self._pending[0]
            seconds = self._clock.seconds(begun, ended)
            if seconds is None:
                return
            self._pending.popleft()
            total, count = self._seconds.get(kind, (0.0, 0))
            self._seconds[kind] = total + seconds, count + 1

    def drain(self) -> dict[str, float]:
        """Return mean seconds since the last call, by name of the log; empty in the first steps of a process."""
        self._read()
        found, self._seconds = self._seconds, {}
        if self._steps < FIRST_LOG:
            return {}
        return {f"step_time/{kind.value}": found[kind][0] / found[kind][1] for kind in StepKind if kind in found}


class HostClock:
    """The clock of the host, for a CPU, where calls are synchronous."""

    def mark(self) -> float:
        """Return the time now."""
        return time.perf_counter()

    def seconds(self, begun: float, ended: float) -> float | None:
        """Return the time between two marks."""
        return ended - begun


class EventClock:
    """Events in the stream of a GPU.

    Args:
        make (`Callable`, *optional*): makes an event with timing; by default `torch.cuda.Event`.
    """

    def __init__(self, make: Callable[[], Any] | None = None) -> None:
        self._make = make or (lambda: torch.cuda.Event(enable_timing=True))

    def mark(self) -> Any:
        """Record an event and return it."""
        event = self._make()
        event.record()
        return event

    def seconds(self, begun: Any, ended: Any) -> float | None:
        """Return the time between two events; `None` if the device has not reached the second."""
        return begun.elapsed_time(ended) / 1e3 if ended.query() else None
