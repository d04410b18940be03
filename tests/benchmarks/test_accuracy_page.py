"""Every run whose figures docs/results.md shows is one that a command on the page starts."""

import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy  # noqa: E402


def command_lines():
    """The command lines of the study on the page, without those of unscaled runs."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").partition("## Repeating the study")[2]
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line.partition("benchmarks/accuracy.py ")[2]) for line in lines if "accuracy.py " in line]


def test_every_run_has_its_command():
    planned = {
        run.key for line in command_lines() for run in accuracy.planned(accuracy.make_parser().parse_args(line))
    }
    shown = [accuracy.run_of(line) for line in accuracy.read(accuracy.DEFAULT_OUT)]
    assert len(shown) > 60
    assert [run for run in shown if run.key not in planned] == []
