"""The table of engines and options in docs/engines.md names a test for every claim, and these tests exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("<!-- begin: engines and options -->")[2].partition("<!-- end -->")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines() if line.startswith("|")]
TESTS = dict(re.findall(r"^(\d+)\. `(tests/\S+\.py::\S+)`", TABLE, flags=re.MULTILINE))
# A claim, with the numbers of its tests, or none.
CELL = re.compile(r"(?:exact|refused) \[(\d+(?:, \d+)*)\]|not tested|-")


def numbers(cell: str) -> list[str]:
    matched = CELL.fullmatch(cell)
    assert matched, f"{cell!r} is neither `exact [test]`, `refused [test]`, `not tested` nor `-`"
    return matched[1].split(", ") if matched[1] else []


def test_every_cell_makes_one_of_three_claims_and_names_its_tests() -> None:
    header, _, *rows = ROWS
    assert header[1:] == ["one process", "DDP", "FSDP2", "DeepSpeed ZeRO-1, 2, 3", "FSDP1", "`nn.DataParallel`"]
    assert len(rows) > 15
    assert all(len(row) == len(header) for row in rows)
    named = {number for row in rows for cell in row[1:] for number in numbers(cell)}
    assert named == set(TESTS)


def test_what_is_claimed_of_several_processes_is_tested_with_them() -> None:
    header, _, *rows = ROWS
    for name in ("DDP", "FSDP2"):
        column = header.index(name)
        for row in rows:
            if row[column].startswith("exact"):
                files = {ROOT / TESTS[number].split("::")[0] for number in numbers(row[column])}
                assert all("pytest.mark.distributed" in file.read_text(encoding="utf-8") for file in files), row


@pytest.mark.slow
def test_the_tests_that_the_table_names_exist() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", *TESTS.values()]
    # Options of the run that this is part of, such as -v, would change what is printed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    missing = [test for test in TESTS.values() if not any(line.startswith(test) for line in collected)]
    assert missing == []
