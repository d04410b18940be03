"""Detect launches that were meant for several processes but train in fewer.

The variables are those that accelerate 1.15 (`PartialState`, `utils/launch.py`) and torch 2.13 (`torchrun`) set.
"""

from __future__ import annotations

from collections.abc import Mapping

# The number of processes, as torchrun and MPI launchers set it; accelerate reads the same variables.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def find_lone_launch(environment: Mapping[str, str], num_processes: int) -> str | None:
    """Describe what is wrong if fewer processes train together than the launcher was asked for.

    Args:
        environment (`Mapping[str, str]`): variables of the process, such as `os.environ`.
        num_processes (`int`): processes that train together, such as `accelerator.num_processes`.

    Returns:
        `str`, *optional*: what was asked, what was found and what to do; `None` if nothing is wrong.

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
                f"The launcher started {asked} processes ({name}={asked}), but this one trains with a world size of "
                f"{num_processes}: they do not exchange gradients, and each writes to `output_dir`. Without a GPU "
                "pass `use_cpu=True` (`--use_cpu`); otherwise start at most one process per GPU."
            )
    # The simple launcher of accelerate sets an address for several processes or machines, and starts one process.
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if by_accelerate and num_processes == 1 and not any(name in environment for name in _WORLD_SIZES):
        return (
            "`accelerate launch` was asked for several processes but started one: it does so on CPUs and if it finds "
            "fewer than two GPUs. Start `torchrun --nproc_per_node 2 ... --use_cpu` or `accelerate launch --multi_gpu "
            "--num_processes 2 ... --use_cpu` instead; to train in one process, leave out `--num_processes`."
        )
    return None
