"""The tables of docs/distributed.md make the claims of engine_table.toml, and the tests named there exist."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
CLAIMS = tomllib.loads((ROOT / "tests" / "engine_table.toml").read_text(encoding="utf-8"))
WORKS, REFUSED = CLAIMS["works"], CLAIMS["refused"]
COLUMNS = ["one process", "DDP", "FSDP2"]
TESTS = sorted(
    {test for claims in WORKS.values() for _, *tests in claims.values() for test in tests}
    | {test for tests in REFUSED.values() for test in tests}
)


def rows(name: str) -> list[list[str]]:
    """The cells of the table after a marker."""
    table = PAGE.partition(f"<!-- begin: {name} -->")[2].partition("<!-- end -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_the_page_makes_the_claims_of_the_list_and_no_other() -> None:
    header, _, *found = rows("engines and options")
    assert header[1:] == COLUMNS
    assert found == [[name, *(claims[column][0] for column in COLUMNS)] for name, claims in WORKS.items()]
    _, _, *refused = rows("refused")
    assert [row[0] for row in refused] == list(REFUSED)
    assert all(len(row) == 3 and all(row) for row in refused)


def test_every_claim_has_a_test() -> None:
    for name, claims in WORKS.items():
        for claim, *tests in claims.values():
            assert claim in ("exact", "refused", "not tested", "-"), name
            assert bool(tests) == (claim == "exact"), name
    assert all(REFUSED.values())
    assert len(WORKS) > 15 and len(REFUSED) > 8


def test_what_is_claimed_of_several_processes_is_tested_with_them() -> None:
    for name, claims in WORKS.items():
        for column in ("DDP", "FSDP2"):
            files = {ROOT / test.split("::")[0] for test in claims[column][1:]}
            assert all("pytest.mark.distributed" in file.read_text(encoding="utf-8") for file in files), name


@pytest.mark.slow
def test_the_tests_that_the_table_names_exist() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", *TESTS]
    # Options of the run that this is part of, such as -v, would change what is printed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    missing = [test for test in TESTS if not any(line.startswith(test) for line in collected)]
    assert missing == []
