"""The line that compares the final losses of a run with what the accuracy study supports."""

import pytest
from tiny_models import build, examples
from training_runs import config, train
from transformers.utils import logging

from hf_featreuse import FeatureReuseTrainer
from hf_featreuse.trainer.overfitting import final_losses, overfitting_line


@pytest.fixture
def verbosity():
    """Trainer sets the level of all libraries from `log_level`."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


def plain(*losses, eval_loss=2.0):
    """The log of a plain run with these training losses, evenly spaced up to step 100."""
    steps = [100 * (index + 1) // len(losses) for index in range(len(losses))]
    log = [{"step": step, "loss/vanilla": loss} for step, loss in zip(steps, losses, strict=True)]
    return [*log, {"step": 50, "eval_loss": 1.0}, {"step": 100, "eval_loss": eval_loss}]


def test_the_training_loss_is_the_mean_of_the_last_twentieth_and_the_eval_loss_the_last():
    assert final_losses(plain(*range(40))) == ((38 + 39) / 2, 2.0, True)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (0.6, "training loss 0.6, 30% of the eval loss: plain training overfits; feature reuse may gain"),
        (1.5, "75% of the eval loss: compare with feature reuse"),
        (1.7, "85% of the eval loss: plain training does not overfit; feature reuse costs accuracy"),
    ],
)
def test_the_line_for_plain_training_depends_on_the_ratio_of_its_losses(loss, said):
    assert said in overfitting_line(plain(loss))


def test_of_feature_reuse_the_steps_that_run_the_whole_network_count():
    log = [
        {"step": 100, "loss/stochastic_depth": 1.9, "loss/masked_freeze": 0.9, "loss/vanilla": 5.0},
        {"step": 100, "eval_loss": 1.0},
    ]
    assert final_losses(log) == (0.9, 1.0, False)
    assert "the model does not overfit" in overfitting_line(log)
    log[-1]["eval_loss"] = 2.0
    assert overfitting_line(log) is None


@pytest.mark.parametrize(
    "log",
    [
        [],
        [{"step": 1, "loss/vanilla": 1.0}],
        [{"step": 1, "eval_loss": 1.0}],
        [{"step": 1, "loss/stochastic_depth": 1.0}, {"step": 1, "eval_loss": 1.0}],
        [{"step": 1, "loss/vanilla": 1.0}, {"step": 1, "eval_loss": 0.0}],
        [{"step": 1, "loss/vanilla": 1.0}, {"step": 1, "eval_loss": "much"}],
    ],
)
def test_no_line_for_runs_whose_losses_cannot_be_compared(log):
    assert overfitting_line(log) is None


@pytest.mark.usefixtures("verbosity")
@pytest.mark.parametrize(("options", "said"), [({}, True), ({"label_smoothing_factor": 0.1}, False)])
def test_a_plain_run_that_evaluated_ends_with_the_line(tmp_path, capsys, options, said):
    args = config(
        tmp_path,
        drop_rate=0,
        disable_tqdm=False,
        log_level="warning",
        eval_strategy="epoch",
        logging_steps=1,
        **options,
    )
    data = {"train_dataset": examples(8), "eval_dataset": examples(8)}
    train(FeatureReuseTrainer(build("vit"), args, **data))
    assert ("  losses      training loss " in capsys.readouterr().out) is said
