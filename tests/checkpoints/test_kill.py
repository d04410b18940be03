"""kill -9 at random points, again and again: the run ends bit-identical to the uninterrupted one."""

import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import killed_run
import pytest
import torch
from forked_runs import context, warm_forkserver
from killed_run import CASES, STEPS, train_to_the_end
from training_runs import same_bits, without_times

from hf_featreuse.checkpoints.completeness import newest_whole

KILLS_EACH = 8
# The first kills wait for these; the others come at random.
AWAITED = ("stochastic_depth forward", "masked_freeze backward", "save of weights", "save of the optimizer")


@pytest.fixture(scope="module", autouse=True)
def warm_parent() -> None:
    warm_forkserver(killed_run)


def start(folder: Path, case: str) -> tuple[Any, Connection]:
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=train_to_the_end, args=(folder, case, sending))
    process.start()
    sending.close()
    return process, receiving


def lines(receiving: Connection, count: int | None = None) -> list[str]:
    """The next lines, or all that are left of a process that has ended."""
    found: list[str] = []
    try:
        while count is None or len(found) < count:
            found.append(receiving.recv_bytes().decode())
    except EOFError:
        pass
    return found


def finished(folder: Path, case: str) -> dict[str, Any]:
    """Finish the run without further kills, and return its end."""
    process, receiving = start(folder, case)
    lines(receiving)
    process.join()
    assert process.exitcode == 0, (folder / "errors.txt").read_text()[-3000:]
    return torch.load(folder / "result.pt")


def kill_at_random(folder: Path, case: str, chance: random.Random, awaited: str | None) -> str | None:
    """Start or resume the run, kill it at a random point and return what it was doing; `None` if it ended before."""
    process, receiving = start(folder, case)
    # Mostly within a step or two, so that a run of few steps is killed often; now and then while it is starting.
    count = chance.randrange(10) if awaited is None else 1
    seen = lines(receiving, count)
    while awaited is not None and seen and awaited not in seen[-1]:
        seen = lines(receiving, 1)
    time.sleep(chance.uniform(0, 0.3 if count == 0 else 0.004))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    seen += lines(receiving)
    return (seen or ["0 start"])[-1] if process.exitcode == -signal.SIGKILL else None


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("weights", "optimizer", "scheduler"):
        assert same_bits(found[part], expected[part]), part
    assert without_times(found["history"]) == without_times(expected["history"])
    assert found["history"][-1]["step"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_a_run_that_is_killed_again_and_again_ends_bitwise_the_same(number: int, tmp_path: Path) -> None:
    case, chance = list(CASES)[number], random.Random(number)
    expected = finished(tmp_path / "whole", case)
    folder, killed, passed_over = tmp_path / "killed 0", [], 0
    while len(killed) < KILLS_EACH:
        last = kill_at_random(folder, case, chance, AWAITED[len(killed)] if len(killed) < len(AWAITED) else None)
        if last is None:  # It came to its end: the next kills are of another run.
            assert_same(torch.load(folder / "result.pt"), expected)
            folder = tmp_path / f"killed {len(killed)}"
            continue
        killed.append(last)
        passed_over += len(newest_whole(folder)[1])
    assert_same(finished(folder, case), expected)
    assert any("save" in line for line in killed)
    assert {"stochastic_depth", "masked_freeze"} <= {line.split()[1] for line in killed}
    print(f"\n{case}: {len(killed)} kills in runs of {STEPS} steps, {passed_over} cut checkpoints passed over")
    print("  killed at step: " + "; ".join(killed))
