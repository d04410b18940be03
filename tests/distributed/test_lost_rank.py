"""One of two processes is lost: the other soon ends with a clear message, and the resumed run is bit-identical."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lost_rank_run
import pytest
import torch
from distributed_runs import free_port
from forked_runs import context, warm_forkserver
from lost_rank_run import EARLIEST, train_rank
from training_runs import same_bits, without_times

from hf_featreuse.checkpoints.completeness import newest_whole

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS = 2
# Far above what it takes, far below the half hour after which torch gives up waiting.
BOUND = 30.0
FAULTS = [
    ("kill", "stochastic_depth forward"),
    ("kill", "stochastic_depth backward"),
    ("kill", "masked_freeze forward"),
    ("kill", "masked_freeze backward"),
    ("kill", "save of weights"),
    ("kill", "save of random states and sums"),
    ("raise", "stochastic_depth backward"),
    ("raise", "masked_freeze forward"),
]


@pytest.fixture(scope="module", autouse=True)
def warm_parent() -> None:
    warm_forkserver(lost_rank_run)


def run_ranks(folder: Path, fault: str = "", point: str = "") -> list[int]:
    """The exit codes of both ranks; none may outlive the bound."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    ranks = [context.Process(target=train_rank, args=(rank, port, folder, fault, point)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    deadline = time.time() + 2 * BOUND
    for process in ranks:
        process.join(max(0.0, deadline - time.time()))
    hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    assert hanging == [], f"hangs: {hanging}"
    return [process.exitcode for process in ranks]


def finished(folder: Path) -> list[dict[str, Any]]:
    """Finish the run without further losses, and return the end of both ranks."""
    codes = run_ranks(folder)
    assert codes == [0, 0], (folder / "log_0.txt").read_text()[-3000:] + (folder / "log_1.txt").read_text()[-3000:]
    return [torch.load(folder / f"result_{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The run in which no rank is lost."""
    results = finished(tmp_path_factory.mktemp("whole"))
    assert [result["world"] for result in results] == [2, 2]
    assert same_bits(results[0]["weights"], results[1]["weights"])
    return results


def assert_resumes_bit_identically(folder: Path, whole: list[dict[str, Any]]) -> None:
    for found, expected in zip(finished(folder), whole, strict=True):
        for part in ("weights", "optimizer", "scheduler"):
            assert same_bits(found[part], expected[part]), part
        assert without_times(found["history"]) == without_times(expected["history"])


@pytest.mark.parametrize(("fault", "point"), FAULTS, ids=[" in ".join(fault) for fault in FAULTS])
def test_the_other_rank_ends_soon_and_the_run_can_be_resumed(
    fault: str, point: str, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    codes = run_ranks(tmp_path, fault, point)
    assert codes == [1, -signal.SIGKILL if fault == "kill" else 1]
    lost_at, step, kind = json.loads((tmp_path / "lost.json").read_text())
    assert step >= EARLIEST
    assert point.split()[0] in (kind, "save")
    ranks = [0] if fault == "kill" else [0, 1]
    for rank in ranks:
        end = json.loads((tmp_path / f"survivor_{rank}.json").read_text())
        assert end["model is as before"] and end["all train"] and end["no step is open"], end
        said = "".join(end["said"])
        if "save" in point and not said:  # If an exchange of the save itself failed, the error reports it.
            said = end["error"]
        assert said.count(f"The last complete checkpoint is {newest_whole(tmp_path)[0]}") == 1, end
        assert f"This is rank {rank} of 2 processes; if an exchange between them failed, another one ended" in said
        assert ("bad luck" in end["error"]) is (rank == 1), end
        assert end["time"] - lost_at < BOUND
        print(f"\n{fault} in {point}, step {step}: rank {rank} ended {end['time'] - lost_at:.2f} s later")
    assert int(str(newest_whole(tmp_path)[0]).rpartition("-")[2]) >= step - 1
    assert_resumes_bit_identically(tmp_path, whole)


def test_torchrun_ends_and_names_the_rank(whole: list[dict[str, Any]], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += [lost_rank_run.__file__, str(tmp_path), "kill", "masked_freeze backward"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    lost_at, step, _ = json.loads((tmp_path / "lost.json").read_text())
    assert time.time() - lost_at < 2 * BOUND
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert "rank      : 1" in done.stderr
    assert newest_whole(tmp_path)[0] == str(tmp_path / f"checkpoint-{step}")
    assert_resumes_bit_identically(tmp_path, whole)
