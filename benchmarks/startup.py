"""Measure the CPU time of `featreuse` for the help of each verb, a mistyped verb and a short command.

    python benchmarks/startup.py

prints the median of several runs, in seconds of CPU time of the whole process.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys


def lines() -> list[str]:
    """Return the command lines to time: the help of every verb that `featreuse --help` lists, and a few commands."""
    listed = subprocess.run(
        [sys.executable, "-m", "hf_featreuse", "--help"], capture_output=True, text=True, check=True
    )
    verbs = re.findall(r"^ {4}([a-z]+) ", listed.stdout, flags=re.MULTILINE)
    return ["--version", "--help", *(f"{verb} --help" for verb in verbs), "insepct vit", "inspect vit"]


def cpu_seconds(line: str) -> float:
    """Return the user and system CPU time of one run of the command; 0 on Windows, which does not count it."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "hf_featreuse", *line.split()], capture_output=True, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="Runs of each command.")
    options = parser.parse_args()
    print("| command | CPU seconds |\n|---|---|")
    for line in lines():
        times = [cpu_seconds(line) for _ in range(options.repeats)]
        print(f"| `featreuse {line}` | {statistics.median(times):.2f} |", flush=True)


if __name__ == "__main__":
    main()
