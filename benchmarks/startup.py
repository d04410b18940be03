"""CPU time from the shell's Enter to the first line of output, for each verb of `featreuse` and for a mistyped one.

    python benchmarks/startup.py

prints the median of several runs, in seconds of CPU time of the whole process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from hf_featreuse.cli import VERBS

LINES = ("--version", "--help", *(f"{verb.name} --help" for verb in VERBS), "insepct vit", "inspect vit")


def cpu_seconds(line: str) -> float:
    """CPU time of one run of the command, in the program and the system; 0 on Windows, which does not count it."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "hf_featreuse", *line.split()], capture_output=True, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


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
