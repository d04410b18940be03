"""Top-k accuracy as a metric of the `evaluate` library, and the functions that a Trainer needs for each kind of label.

It is defined here, not loaded by name from the Hub, so evaluation works offline.
"""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from transformers import EvalPrediction

from hf_featreuse.data.labels import REGRESSION, SEVERAL, SINGLE
from hf_featreuse.errors import DataError

_DESCRIPTION = "Fraction of the samples whose label is among the k classes ranked first."
_INPUTS = """
Args:
    predictions: Class ids of each sample, best first; k of them, or all if there are fewer classes.
    references: Label of each sample; -100 ignores a sample.
"""


class TopKAccuracy(evaluate.Metric):
    """Measure how often the label is among the `k` classes ranked first.

    Predictions are ranked class ids, not logits, so that little is kept in memory; [`rank_top_k`] makes them. Labels
    of -100 are left out. It works in `evaluate.combine` and with several processes.

    Args:
        k (`int`, defaults to 5): how many classes count, at least 1.
        config_name (`str`, *optional*): name of the folder for temporary files; by default `"top<k>"`.
        options (`dict[str, Any]`): further options of `evaluate.Metric`, such as `keep_in_memory`, `num_process`,
            `process_id` and `experiment_id`.

    Returns:
        `dict[str, float]`: from `compute`, `{"accuracy": float}` for `k=1`, else `{"top<k>_accuracy": float}`, in
            [0, 1].

    Raises:
        DataError: `k` is below 1; on `compute`: no sample has a label.

    Example:
        >>> from hf_featreuse.data.metrics import TopKAccuracy
        >>> metric = TopKAccuracy(k=2, keep_in_memory=True)
        >>> metric.compute(predictions=[[0, 2], [1, 2], [2, 0]], references=[2, 0, 2])
        {'top2_accuracy': 0.6666666666666666}
    """

    def __init__(self, k: int = 5, config_name: str | None = None, **options: Any):
        if k < 1:
            raise DataError(f"k={k!r} must be at least 1.")
        self.k = k
        super().__init__(config_name=config_name or f"top{k}", **options)

    def _info(self) -> evaluate.MetricInfo:
        """Describe the inputs to `evaluate`."""
        features = {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """Compute the metric from everything that was added."""
        width = max(map(len, predictions), default=0)
        ranked = np.full((len(predictions), width), np.iinfo(np.int64).min)  # the filler equals no label
        for i, ids in enumerate(predictions):
            ranked[i, : len(ids)] = ids
        return {_name(self.k): _top_k_accuracy(ranked, np.asarray(references, dtype=np.int64), self.k)}


def rank_top_k(logits: Any, labels: torch.Tensor | None = None, k: int = 5) -> torch.Tensor:
    """Reduce logits to the ids of the best classes: a `preprocess_logits_for_metrics` for Trainer.

    It runs on the device of the logits and does not synchronize.

    Args:
        logits (`torch.Tensor` or `tuple` or `list`): of shape (batch, classes), or a tuple or list that starts with
            such a tensor.
        labels (`torch.Tensor`, *optional*): ignored; Trainer passes them.
        k (`int`, defaults to 5): how many ids to keep.

    Returns:
        `torch.Tensor`: int64 of shape (batch, min(k, classes)), best class first.

    Example:
        >>> import torch
        >>> from hf_featreuse.data.metrics import rank_top_k
        >>> rank_top_k(torch.tensor([[0.1, 0.7, 0.2]]), k=2)
        tensor([[1, 2]])
    """
    scores = logits[0] if isinstance(logits, tuple | list) else logits
    return scores.topk(min(k, scores.shape[-1]), dim=-1).indices


def build_compute_metrics(ks: Sequence[int] = (1, 5)) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build a `compute_metrics` for Trainer that reports top-k accuracies.

    Pass it with `preprocess_logits_for_metrics=rank_top_k` to keep only ranked ids; plain logits are ranked here.

    Args:
        ks (`Sequence[int]`, defaults to `(1, 5)`): each k to report.

    Returns:
        `Callable[[EvalPrediction], dict[str, float]]`: for the default `ks`, it returns
            `{"accuracy": float, "top5_accuracy": float}`.

    Raises:
        DataError: `ks` is empty or holds a number below 1; when called: no sample has a label.

    Example:
        >>> import numpy as np
        >>> from transformers import EvalPrediction
        >>> from hf_featreuse.data.metrics import build_compute_metrics
        >>> ranked = np.array([[3, 1, 0, 2, 4], [0, 1, 2, 3, 4]])
        >>> build_compute_metrics()(EvalPrediction(predictions=ranked, label_ids=np.array([3, 9])))
        {'accuracy': 0.5, 'top5_accuracy': 0.5}
    """
    if not ks or min(ks) < 1:
        raise DataError(f"ks={ks!r} must name at least one k, each at least 1.")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        """Compute the accuracies of one evaluation."""
        ranked, labels = _joined(prediction.predictions), _joined(prediction.label_ids)
        if np.issubdtype(ranked.dtype, np.floating):
            ranked = np.argsort(-ranked, axis=-1, kind="stable")[:, : max(ks)]
        return {_name(k): _top_k_accuracy(ranked, labels, k) for k in ks}

    return compute_metrics


def multi_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Score several labels per image: a `compute_metrics` for Trainer.

    A label is predicted if its logit is above 0, that is, its probability above one half. Labels of -100 are left out.

    Args:
        prediction (`EvalPrediction`): logits and zeros and ones, both of shape (images, classes).

    Returns:
        `dict[str, float]`: `f1_micro` over all labels, `f1_macro`, the mean of the classes', and
            `mean_average_precision` over the classes that some image has; for each the definition of scikit-learn.

    Example:
        >>> import numpy as np
        >>> from transformers import EvalPrediction
        >>> from hf_featreuse.data.metrics import multi_label_metrics
        >>> logits, labels = np.array([[2.0, -1.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
        >>> multi_label_metrics(EvalPrediction(predictions=logits, label_ids=labels))
        {'f1_micro': 0.8, 'f1_macro': 0.8333333333333333, 'mean_average_precision': 1.0}
    """
    logits, labels = _joined(prediction.predictions), _joined(prediction.label_ids)
    known, true, positive = labels != -100, labels == 1, logits > 0
    hits, wrong = (true & positive).sum(0), (known & (true != positive)).sum(0)
    scored = [known[:, c] for c in range(labels.shape[1])]
    precisions = [_average_precision(logits[k, c], true[k, c]) for c, k in enumerate(scored) if true[k, c].any()]
    return {
        "f1_micro": float(2 * hits.sum() / max(2 * hits.sum() + wrong.sum(), 1)),
        "f1_macro": float((2 * hits / np.maximum(2 * hits + wrong, 1)).mean()),
        "mean_average_precision": float(np.mean(precisions)) if precisions else float("nan"),
    }


def _average_precision(scores: np.ndarray, true: np.ndarray) -> float:
    """Return the mean precision over the true samples, ranked by score; equal scores share a rank."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(true[order])[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / hits[-1])


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Score predicted values: a `compute_metrics` for Trainer.

    Args:
        prediction (`EvalPrediction`): outputs of shape (images, 1) or (images,), and values of shape (images,).

    Returns:
        `dict[str, float]`: `mae`, the mean absolute error, `rmse`, the root of the mean squared one, and `r2`, the
            share of the variance that is explained, `nan` if all values are equal.

    Example:
        >>> import numpy as np
        >>> from transformers import EvalPrediction
        >>> from hf_featreuse.data.metrics import regression_metrics
        >>> outputs, values = np.array([[1.0], [3.0], [4.0]]), np.array([1.0, 2.0, 3.0])
        >>> regression_metrics(EvalPrediction(predictions=outputs, label_ids=values))["r2"]
        0.0
    """
    values = _joined(prediction.label_ids).astype(np.float64)
    errors = _joined(prediction.predictions).astype(np.float64).reshape(values.shape) - values
    spread = np.square(values - values.mean()).mean()
    squared = np.square(errors).mean()
    return {
        "mae": float(np.abs(errors).mean()),
        "rmse": float(np.sqrt(squared)),
        "r2": float(1 - squared / spread) if spread else float("nan"),
    }


def metrics_for(problem_type: str) -> dict[str, Callable | None]:
    """Choose the metrics of a kind of labels, as arguments of Trainer.

    Args:
        problem_type (`str`): as `ImageData.problem_type`.

    Returns:
        `dict[str, Callable]`: `compute_metrics`, and `preprocess_logits_for_metrics` or `None`.

    Raises:
        DataError: there is no such kind.

    Example:
        >>> from hf_featreuse.data.metrics import metrics_for
        >>> metrics_for("regression")["compute_metrics"].__name__
        'regression_metrics'
    """
    if problem_type == SINGLE:
        return {"compute_metrics": build_compute_metrics(), "preprocess_logits_for_metrics": rank_top_k}
    chosen = {SEVERAL: multi_label_metrics, REGRESSION: regression_metrics}.get(problem_type)
    if chosen is None:
        raise DataError(f"`problem_type={problem_type!r}` is unknown. Pass one of {(SINGLE, SEVERAL, REGRESSION)}.")
    return {"compute_metrics": chosen, "preprocess_logits_for_metrics": None}


def _joined(values: Any) -> np.ndarray:
    """Return the first output of all batches; with `eval_do_concat_batches=False` each batch is an entry of a list."""
    if isinstance(values, list):
        return np.concatenate([_joined(batch) for batch in values])
    return np.asarray(values[0] if isinstance(values, tuple) else values)


def _name(k: int) -> str:
    """Name a top-k accuracy as Hugging Face's examples name the plain one."""
    return "accuracy" if k == 1 else f"top{k}_accuracy"


def _top_k_accuracy(ranked: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Compute the fraction of labeled samples whose label is among the first k ids."""
    labeled = labels != -100
    if not labeled.any():
        raise DataError(
            f"None of the {len(labels)} samples has a label (-100 means none): there is nothing to measure."
        )
    hits = (ranked[labeled, :k] == labels[labeled, None]).any(axis=1)
    return float(hits.mean())
