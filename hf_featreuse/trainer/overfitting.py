"""Report how far a run overfits, which decides whether feature reuse gains: the rule of docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

# Training loss as a share of evaluation loss (docs/results.md): up to the first value plain training overfits, and the
# method gained on a ViT and a ConvNeXt but not on a ResNet; from the second on it underfits, and the method lost.
OVERFITS, UNDERFITS = 2 / 3, 0.8
# In these steps the whole network runs, so their loss is comparable with that of the evaluation.
_WHOLE_NETWORK = ("loss/vanilla", "loss/masked_freeze")


def final_losses(log_history: Sequence[Mapping[str, Any]]) -> tuple[float, float, bool] | None:
    """Return the final training loss, the last evaluation loss, and whether the run was plain training.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.

    Returns:
        `None` if the run did not evaluate, or logged no step in which the whole network ran.

    The training loss is that of steps that ran the whole network, as mean over the logs of the last twentieth of the
    steps.
    """
    evaluations = [entry["eval_loss"] for entry in log_history if isinstance(entry.get("eval_loss"), Real)]
    kind = next((key for key in _WHOLE_NETWORK if any(key in entry for entry in log_history)), None)
    if not evaluations or kind is None:
        return None
    is_plain = not any("loss/stochastic_depth" in entry or "loss/masked_freeze" in entry for entry in log_history)
    if not is_plain:
        kind = "loss/masked_freeze" if any("loss/masked_freeze" in entry for entry in log_history) else kind
    logged = [(entry["step"], float(entry[kind])) for entry in log_history if kind in entry]
    last = [loss for step, loss in logged if step > 0.95 * logged[-1][0]]
    return sum(last) / len(last), float(evaluations[-1]), is_plain


def overfitting_line(log_history: Sequence[Mapping[str, Any]]) -> str | None:
    """Compare the final losses of a run, and return what the study supports.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.

    Returns:
        `str`, *optional*: one line; `None` if the losses cannot be compared or support no statement.

    Example:
        >>> from hf_featreuse.trainer.overfitting import overfitting_line
        >>> overfitting_line([{"step": 100, "loss/vanilla": 2.3}, {"step": 100, "eval_loss": 2.4}])
        'training loss 2.3, 96% of the eval loss: plain training does not overfit; feature reuse costs accuracy then'
    """
    found = final_losses(log_history)
    if found is None or not found[1] > 0:
        return None
    train, test, is_plain = found
    start = f"training loss {train:.2g}, {train / test:.0%} of the eval loss: "
    if is_plain:
        if train <= OVERFITS * test:
            return start + "plain training overfits; feature reuse may gain, as on 2 of 3 models of the study"
        if train >= UNDERFITS * test:
            return start + "plain training does not overfit; feature reuse costs accuracy then"
        return start + "compare with feature reuse; the study does not tell which is better"
    if train >= UNDERFITS * test:
        return start + "the model does not overfit; a lower drop_rate or 0 (plain training) is likely better"
    return None
