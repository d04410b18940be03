"""The notebook runs from its first cell to its last in a real kernel, and what it says of itself is true."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import AutoModelForImageClassification

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_it_is_valid_and_saved_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    assert notebook.cells
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
def test_it_trains_analyses_prunes_and_loads_back(tmp_path):
    notebook = read()
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    text = printed(notebook)
    accuracies = re.search(r"6 blocks: ([\d.]+)%, 4 blocks: ([\d.]+)%", text)
    assert accuracies, text
    assert min(map(float, accuracies.groups())) > 90
    assert re.search(r"label (\d), prediction \1 ", text), text
    # Of each pair of steps, the second trains what the first dropped.
    assert re.search(r"step 0: stochastic_depth D = (\(.*\))\nstep 1: masked_freeze +D = \1\n", text), text
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    assert len(pictures) == 2
    outputs = tmp_path / "outputs" / "quickstart"
    assert AutoModelForImageClassification.from_pretrained(outputs).config.num_hidden_layers == 6
    assert AutoModelForImageClassification.from_pretrained(outputs / "shallow").config.num_hidden_layers == 4
