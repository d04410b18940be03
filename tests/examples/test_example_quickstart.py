"""The notebook runs from its first cell to its last in a real kernel, and what it says of itself is true."""

import base64
import io
import re
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image
from transformers import AutoModelForImageClassification

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from run_notebook import NOTEBOOK, run


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


def check_what_it_prints(text: str) -> None:
    accuracies = re.search(r"6 blocks: ([\d.]+)%, 4 blocks: ([\d.]+)%", text)
    assert accuracies, text
    assert min(map(float, accuracies.groups())) > 90
    assert re.search(r"label (\d), prediction \1 ", text), text
    # The last step of a cycle trains what the others dropped.
    assert re.search(r"step 2: stochastic_depth D = (\(.*\))\nstep 3: masked_freeze +D = \1\n", text), text


def test_it_is_valid_and_saved_with_its_outputs():
    """As `python tools/run_notebook.py` leaves it."""
    notebook = read()
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 600_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [cell.source for cell in code if "print(" in cell.source and not cell.outputs]
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]
    check_what_it_prints(printed(notebook))
    curves, digit = (Image.open(io.BytesIO(picture)) for picture in pictures(notebook))
    assert digit.size == (96, 96)
    assert min(curves.size) > 300
    assert "site-packages" not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_trains_analyses_prunes_and_loads_back(tmp_path):
    notebook = read()
    run(notebook, tmp_path)
    check_what_it_prints(printed(notebook))
    assert len(pictures(notebook)) == 2
    outputs = tmp_path / "outputs" / "quickstart"
    assert AutoModelForImageClassification.from_pretrained(outputs).config.num_hidden_layers == 6
    assert AutoModelForImageClassification.from_pretrained(outputs / "shallow").config.num_hidden_layers == 4
