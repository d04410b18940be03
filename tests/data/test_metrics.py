"""Top-k accuracy: alone, combined, in several processes, and as a Trainer calls it."""

from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from transformers import EvalPrediction

from hf_featreuse.data.metrics import (
    TopKAccuracy,
    build_compute_metrics,
    metrics_for,
    multi_label_metrics,
    rank_top_k,
    regression_metrics,
)
from hf_featreuse.errors import DataError


@pytest.fixture
def scored():
    generator = np.random.default_rng(0)
    return generator.normal(size=(60, 9)), generator.integers(0, 9, 60)


@pytest.mark.parametrize(("k", "name"), [(1, "accuracy"), (3, "top3_accuracy"), (5, "top5_accuracy")])
def test_the_value_is_scikit_learns(scored, k, name, tmp_path):
    logits, labels = scored
    ranked = rank_top_k(torch.from_numpy(logits))
    metric = TopKAccuracy(k=k, cache_dir=str(tmp_path))
    wanted = top_k_accuracy_score(labels, logits, k=k, labels=range(9))
    assert metric.compute(predictions=ranked, references=labels) == pytest.approx({name: wanted})
    for i in range(0, 60, 20):
        metric.add_batch(predictions=ranked[i : i + 20], references=labels[i : i + 20])
    assert metric.compute() == pytest.approx({name: wanted})


def test_metrics_combine(tmp_path):
    both = evaluate.combine([TopKAccuracy(k, cache_dir=str(tmp_path)) for k in (1, 5)])
    ranked = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 2, 3, 4, 5]]
    assert both.compute(predictions=ranked, references=[0, 0, 9]) == {"accuracy": 1 / 3, "top5_accuracy": 2 / 3}


def test_several_processes_make_one_result(tmp_path):
    def process(rank):
        metric = TopKAccuracy(1, cache_dir=str(tmp_path), num_process=2, process_id=rank, experiment_id="two")
        metric.add_batch(predictions=[[rank]] * (1 + rank), references=[0] * (1 + rank))
        return metric.compute()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, (0, 1))) == [{"accuracy": 1 / 3}, None]


def test_fewer_ids_than_k_and_ragged_ids_count_as_they_are():
    metric = TopKAccuracy(5, keep_in_memory=True)
    assert metric.compute(predictions=[[1, 0], [2], [0]], references=[0, 2, -1]) == {"top5_accuracy": 2 / 3}


def test_labels_of_minus_100_are_left_out():
    metric = TopKAccuracy(1, keep_in_memory=True)
    assert metric.compute(predictions=[[1], [2], [3]], references=[1, -100, 0]) == {"accuracy": 0.5}


@pytest.mark.parametrize(("predictions", "references"), [([], []), ([[1]], [-100])])
def test_nothing_to_measure_is_an_error(predictions, references):
    with pytest.raises(DataError, match=rf"None of the {len(references)} samples has a label"):
        TopKAccuracy(1, keep_in_memory=True).compute(predictions=predictions, references=references)


def test_k_must_be_positive():
    with pytest.raises(DataError, match="k=0"):
        TopKAccuracy(0)
    with pytest.raises(DataError, match="ks="):
        build_compute_metrics(())
    with pytest.raises(DataError, match="ks="):
        build_compute_metrics((1, 0))


def test_logits_are_ranked_best_first_from_tuples_and_few_classes():
    logits = torch.tensor([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]])
    assert rank_top_k((logits, torch.zeros(2))).tolist() == [[1, 2, 0], [0, 2, 1]]
    assert rank_top_k(logits, labels=torch.zeros(2), k=2).tolist() == [[1, 2], [0, 2]]


def test_a_trainer_gets_the_same_from_ranks_and_from_logits(scored):
    logits, labels = scored
    wanted = {f"{name}accuracy": top_k_accuracy_score(labels, logits, k=k) for k, name in ((1, ""), (5, "top5_"))}
    compute = build_compute_metrics()
    ranked = rank_top_k(torch.from_numpy(logits)).numpy()
    assert compute(EvalPrediction(predictions=ranked, label_ids=labels)) == pytest.approx(wanted)
    assert compute(EvalPrediction(predictions=(logits, logits), label_ids=labels)) == pytest.approx(wanted)
    with pytest.raises(DataError, match="None of the 60"):
        compute(EvalPrediction(predictions=ranked, label_ids=np.full(60, -100)))


def test_batches_that_are_kept_apart_give_the_same(scored):
    logits, labels = scored
    compute = build_compute_metrics()
    wanted = compute(EvalPrediction(predictions=logits, label_ids=labels))
    parts = [slice(0, 25), slice(25, 50), slice(50, None)]
    for kind in (lambda part: logits[part], lambda part: (logits[part], logits[part])):
        apart = EvalPrediction(predictions=[kind(part) for part in parts], label_ids=[labels[part] for part in parts])
        assert compute(apart) == wanted


# Several labels, and values


@pytest.mark.parametrize("ties", [False, True])
def test_scores_of_several_labels_are_scikit_learns(ties):
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(50, 6)), (random.random((50, 6)) < 0.3).astype(np.float32)
    if ties:
        logits = logits.round()
    labels[:, 4] = 0  # of a class without images there is no precision
    found = multi_label_metrics(EvalPrediction(predictions=logits, label_ids=labels))
    some = labels.any(0)
    assert found == pytest.approx(
        {
            "f1_micro": sklearn.f1_score(labels, logits > 0, average="micro"),
            "f1_macro": sklearn.f1_score(labels, logits > 0, average="macro", zero_division=0),
            "mean_average_precision": sklearn.average_precision_score(labels[:, some], logits[:, some]),
        }
    )
    # Unknown labels count for nothing, whatever their logits.
    more = EvalPrediction(np.vstack([logits, logits[::-1]]), np.vstack([labels, np.full_like(labels, -100)]))
    assert multi_label_metrics(more) == pytest.approx(found)


def test_scores_of_values_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    outputs, values = random.normal(size=(50, 1)), random.normal(size=50).astype(np.float32)
    expected = {
        "mae": sklearn.mean_absolute_error(values, outputs),
        "rmse": sklearn.root_mean_squared_error(values, outputs),
        "r2": sklearn.r2_score(values, outputs),
    }
    assert regression_metrics(EvalPrediction(outputs, values)) == pytest.approx(expected)
    batches = [outputs[:20], outputs[20:]], [values[:20], values[20:]]
    assert regression_metrics(EvalPrediction(*batches)) == pytest.approx(expected)


def test_each_kind_of_labels_has_its_metrics():
    assert metrics_for("multi_label_classification")["compute_metrics"] is multi_label_metrics
    assert metrics_for("single_label_classification")["preprocess_logits_for_metrics"] is rank_top_k
    with pytest.raises(DataError, match="'ranking'"):
        metrics_for("ranking")
