"""The benchmark of accuracy against depth, run small."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "depth.py"
RESULTS = BENCHMARK.parent / "results" / "depth_vit_cpu.json"
DOCUMENT = BENCHMARK.parents[1] / "docs" / "pruning.md"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("depth", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_arm_is_trained_pruned_and_measured(benchmark, tmp_path, capsys):
    path = tmp_path / "new" / "depth.json"
    record = benchmark.main(
        [
            *("--config_overrides", "hidden_size=16,num_hidden_layers=3,num_attention_heads=2", "--image_size", "8"),
            *("--steps", "6", "--budgets", "2", "1", "--drop_rate_schedule", "uniform", "--cpu", "--json", str(path)),
        ]
    )
    assert json.loads(path.read_text())["arms"].keys() == {"vanilla", "stochastic depth", "feature reuse"}
    # At equal arithmetic: the cheaper a step, the more of them.
    steps = {arm: figures["training"]["steps"] for arm, figures in record["arms"].items()}
    assert steps["vanilla"] == 6 < steps["feature reuse"] < steps["stochastic depth"]
    for figures in record["arms"].values():
        assert list(figures["depths"]) == [3, 2, 1]
        rows = list(figures["depths"].values())
        assert [len(row["removed"]) for row in rows] == [0, 1, 2]
        assert set(rows[1]["removed"]) < set(rows[2]["removed"])
        sizes = [row["parameters"] for row in rows]
        assert sizes[0] - sizes[1] == sizes[1] - sizes[2] > 0
        assert rows[0]["megabytes"] > rows[2]["megabytes"]
    assert benchmark.table(record["arms"]) in capsys.readouterr().out


def test_the_table_in_the_document_is_that_of_the_results(benchmark):
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert benchmark.table(record["arms"]) in DOCUMENT.read_text(encoding="utf-8")
