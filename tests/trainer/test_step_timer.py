"""Seconds per step by kind in the log, read from a device only when they are known."""

import types
from pathlib import Path

import pytest
import torch
from tiny_models import build, examples
from training_runs import config, train

from hf_featreuse import FeatureReuseTrainer, StepKind
from hf_featreuse.trainer import step_timer
from hf_featreuse.trainer.step_timer import FIRST_LOG, WARM_UP, EventClock, StepTimer

CPU = types.SimpleNamespace(device=torch.device("cpu"))
DEPTH, FREEZE = StepKind.STOCHASTIC_DEPTH, StepKind.MASKED_FREEZE


def timed(monkeypatch, seconds: dict[StepKind, float], steps: int, kinds=(DEPTH, FREEZE)) -> StepTimer:
    """Steps that take what they are said to."""
    now = [0.0]
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: now[0])
    kind: list[StepKind | None] = [None]
    timer = StepTimer(lambda: kind[0])
    timer.on_train_begin(CPU, None, None)
    for step in range(steps):
        kind[0] = kinds[step % len(kinds)]
        timer.on_step_begin(CPU, None, None)
        # The first steps of a process are slow, and count for nothing.
        now[0] += seconds[kind[0]] if step >= WARM_UP else 99.0
        timer.on_step_end(CPU, None, None)
        now[0] += 1000.0
    return timer


def test_means_by_kind_after_the_first_steps(monkeypatch):
    timer = timed(monkeypatch, {DEPTH: 0.25, FREEZE: 0.75}, FIRST_LOG)
    assert timer.drain() == {"step_time/stochastic_depth": 0.25, "step_time/masked_freeze": 0.75}
    # Since the last log.
    assert timer.drain() == {}


def test_nothing_is_logged_before(monkeypatch):
    timer = timed(monkeypatch, {DEPTH: 0.25, FREEZE: 0.75}, FIRST_LOG - 1)
    assert timer.drain() == {}


def test_a_kind_that_did_not_occur_is_left_out(monkeypatch):
    assert timed(monkeypatch, {DEPTH: 0.25}, FIRST_LOG, (DEPTH,)).drain() == {"step_time/stochastic_depth": 0.25}


class Event:
    """An event of a device that is behind: complete if `done` is reached."""

    done = 0
    made: list["Event"]

    def record(self) -> None:
        self.number = len(Event.made)
        Event.made.append(self)

    def query(self) -> bool:
        return self.number < Event.done

    def elapsed_time(self, other: "Event") -> float:
        assert self.query() and other.query(), "the host would wait"
        return 1e3 * (other.number - self.number)


def test_events_are_read_only_when_they_are_complete(monkeypatch):
    Event.done, Event.made = 0, []
    timer = StepTimer(lambda: DEPTH)
    timer.on_train_begin(CPU, None, None)
    timer._clock = EventClock(Event)
    for _ in range(FIRST_LOG):
        timer.on_step_begin(CPU, None, None)
        timer.on_step_end(CPU, None, None)
    assert timer.drain() == {}
    Event.done = len(Event.made) - 1
    assert timer.drain() == {"step_time/stochastic_depth": 1.0} and len(timer._pending) == 1
    Event.done += 1
    assert timer.drain() == {"step_time/stochastic_depth": 1.0} and not timer._pending


def test_other_devices_are_not_timed():
    timer = StepTimer(lambda: DEPTH)
    timer.on_train_begin(types.SimpleNamespace(device=torch.device("meta")), None, None)
    for _ in range(FIRST_LOG):
        timer.on_step_begin(CPU, None, None)
        timer.on_step_end(CPU, None, None)
    assert timer.drain() == {}


@pytest.mark.parametrize("drop_rate", [0.5, 0.0])
def test_a_run_logs_the_time_of_each_kind(tmp_path: Path, drop_rate: float):
    arguments = config(tmp_path, max_steps=60, logging_steps=20, drop_rate=drop_rate)
    trainer = train(FeatureReuseTrainer(build("vit"), arguments, train_dataset=examples(16)))
    first, second, third = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert not any(key.startswith("step_time") for key in {**first, **second})
    times = {key: value for key, value in third.items() if key.startswith("step_time/")}
    kinds = {key.removeprefix("loss/") for key in third if key.startswith("loss/")}
    assert {key.removeprefix("step_time/") for key in times} == kinds and kinds
    # The mean time of a step is part of that of the run.
    assert all(0 < value < trainer.state.log_history[-1]["train_runtime"] / 20 for value in times.values())
