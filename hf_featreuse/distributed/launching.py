"""Tell launches that were meant for several processes from what became of them.

Read in accelerate 1.15 (`PartialState`, `utils/launch.py`) and torch 2.13 (`torchrun`): which variables each sets.
"""

from __future__ import annotations

from collections.abc import Mapping

# Where torchrun and MPI launchers say how many processes there are; accelerate reads the same ones.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def find_lone_launch(environment: Mapping[str, str], num_processes: int) -> str | None:
    """Say what is wrong if a process trains with fewer others than its launcher was asked for.

    Args:
        environment (`Mapping[str, str]`): variables of the process, as `os.environ`.
        num_processes (`int`): processes that train together, as `accelerator.num_processes`.

    Returns:
        `str`, *optional*: what was asked, what was found and what to do; `None` if all is well.

    Example:
        >>> from hf_featreuse.distributed import find_lone_launch
        >>> find_lone_launch({"WORLD_SIZE": "2", "RANK": "0"}, num_processes=2)
        >>> find_lone_launch({"WORLD_SIZE": "2", "RANK": "0"}, num_processes=1)[:44]
        'The launcher started 2 processes (WORLD_SIZE'
    """
    for name in _WORLD_SIZES:
        asked = environment.get(name, "")
        if asked.isdecimal() and int(asked) > num_processes:
            return (
                f"The launcher started {asked} processes ({name}={asked}), but this one trains with a world of "
                f"{num_processes}: they do not exchange gradients, and each writes to `output_dir`. Without a GPU "
                "pass `use_cpu=True` (`--use_cpu`); else start one process for each GPU at most."
            )
    # The simple launcher of accelerate sets an address for several processes or machines, and starts one process.
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if by_accelerate and num_processes == 1 and not any(name in environment for name in _WORLD_SIZES):
        return (
            "`accelerate launch` was asked for several processes, but started one: it does so on CPUs and where it "
            "finds no two GPUs. This one trains alone. Start `torchrun --nproc_per_node 2 ... --use_cpu` instead, or "
            "`accelerate launch --multi_gpu --num_processes 2 ... --use_cpu`; for one process leave out "
            "`--num_processes`."
        )
    return None
