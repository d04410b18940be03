"""CPU time from the shell's Enter to the first line of output, for each verb of `featreuse` and for a mistyped one.

    python benchmarks/startup.py

prints the median of several runs, in seconds of CPU time of the whole process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

LINES = (
    "--help",
    "inspect --help",
    "evaluate --help",
    "predict --help",
    "analyze --help",
    "prune --help",
    "push --help",
    "insepct vit",
    "inspect vit",
)


def cpu_seconds(line: str) -> float:
    """CPU time of one run of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "hf_featreuse", *line.split()], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="Runs of each command.")
    options = parser.parse_args()
    print("| command | CPU seconds |\n|---|---|")
    for line in LINES:
        times = [cpu_seconds(line) for _ in range(options.repeats)]
        print(f"| `featreuse {line}` | {statistics.median(times):.2f} |", flush=True)


if __name__ == "__main__":
    main()
