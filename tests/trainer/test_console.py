"""What is printed before and after training, what the bar shows, and when all of it is quiet."""

import re

import pytest
from tiny_models import build, examples
from training_runs import config, train
from transformers import TrainerCallback
from transformers.utils import logging

from hf_featreuse import FeatureReuseTrainer
from hf_featreuse.data.metrics import build_compute_metrics
from hf_featreuse.trainer.console import ConsoleCallback, closing_summary, mean_compute_share


@pytest.fixture(autouse=True)
def verbosity():
    """Trainer sets the level of all libraries from `log_level`."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


def run(tmp_path, callbacks=None, **changed):
    args = config(tmp_path, **{"disable_tqdm": False, "log_level": "warning", "max_steps": 8, **changed})
    trainer = FeatureReuseTrainer(
        build("vit"), args, train_dataset=examples(), eval_dataset=examples(8), callbacks=callbacks,
        compute_metrics=build_compute_metrics(),
    )  # fmt: skip
    return train(trainer)


def test_both_summaries_say_what_the_run_was(tmp_path, capsys):
    trainer = run(tmp_path, eval_strategy="steps", eval_steps=4, max_steps=60)
    printed = capsys.readouterr().out
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert f"Feature reuse with ViTForImageClassification ({count / 1000:.3g} k parameters)" in printed
    assert "  blocks  4, vit.layers.0 to vit.layers.3" in printed
    assert "  rates   0.50, one set per step" in printed
    assert "  steps   60, in cycles of 1 stochastic depth and 1 masked freeze" in printed
    assert "  engine  1 process on cpu, full precision" in printed
    shares = [entry["compute_share"] for entry in trainer.state.log_history if "compute_share" in entry]
    assert f"arithmetic  {100 * sum(shares) / 60:.1f} % of plain" in printed
    expected = float(re.search(r"cost    share of arithmetic (\S+) of a plain", printed)[1])
    assert expected == pytest.approx(sum(shares) / 60, abs=0.06)
    last = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    assert f"accuracy    {100 * last:.1f} % after step 60" in printed
    assert f"files       {tmp_path}" in printed


def test_with_a_set_for_every_sample_the_expected_cost_is_what_was_spent(tmp_path, capsys):
    trainer = run(tmp_path, drop_granularity="sample", max_steps=40)
    printed = capsys.readouterr().out
    assert "one set per sample" in printed
    expected = float(re.search(r"cost    share of arithmetic (\S+) of a plain", printed)[1])
    assert expected == pytest.approx(mean_compute_share(trainer.state.log_history), abs=0.05)
    assert "  sizes   a block divides 4 samples in 1 way\n" in printed


def test_plain_steps_and_rates_over_time_are_named(tmp_path, capsys):
    run(tmp_path, vanilla_steps=2, drop_rate_over_time="falling", max_steps=1)
    printed = capsys.readouterr().out
    assert "  rates   0.50, falling to 0, one set per step" in printed
    assert "  steps   1, in cycles of 2 vanilla, 1 stochastic depth and 1 masked freeze" in printed
    run(tmp_path, drop_rate_over_time="rising", drop_rate_schedule="linear", max_steps=1)
    assert "  rates   0.12 to 0.50, rising from 0, one set per step" in capsys.readouterr().out


@pytest.mark.parametrize("plain", [{"stochastic_depth_steps": 0, "masked_freeze_steps": 0}, {"drop_rate": 0}])
def test_plain_training_is_reported(tmp_path, capsys, plain):
    run(tmp_path, **plain, max_steps=1)
    printed = capsys.readouterr().out
    assert "blocks  none: plain training" in printed
    assert "cost" not in printed


class SeesTheBar(TrainerCallback):
    """Notes what the bar says when a step has ended."""

    def __init__(self):
        self.said = []

    def on_step_end(self, args, state, control, **kwargs):
        bars = [
            bar for bar in (getattr(c, "training_bar", None) for c in self.trainer.callback_handler.callbacks) if bar
        ]
        self.said.append(bars[0].postfix.strip())


def test_the_bar_names_the_kind_of_every_step(tmp_path):
    watch = SeesTheBar()
    args = config(tmp_path, disable_tqdm=False)
    watch.trainer = FeatureReuseTrainer(build("vit"), args, train_dataset=examples(), callbacks=[watch])
    watch.trainer.train()
    schedule = watch.trainer.feature_reuse.schedule
    assert watch.said == [schedule.plan(step).kind.value.replace("_", " ") for step in range(6)]
    assert len(set(watch.said)) > 1


@pytest.mark.parametrize("quiet", [{"disable_tqdm": True}, {"log_level": "error"}, {"log_level": "critical"}])
def test_nothing_is_printed_where_the_rule_says_quiet(tmp_path, capsys, quiet):
    run(tmp_path, **quiet)
    assert "Feature reuse with" not in capsys.readouterr().out


def test_without_the_bar_the_summaries_are_messages_of_level_info(tmp_path, caplog):
    with caplog.at_level("INFO", logger="hf_featreuse"):
        run(tmp_path, disable_tqdm=True)
    for text in ("Feature reuse with", "Trained 8 steps"):
        assert {record.levelname for record in caplog.records if text in record.message} == {"INFO"}


def test_another_process_than_the_main_one_prints_nothing(tmp_path, capsys):
    trainer = run(tmp_path)
    capsys.readouterr()
    trainer.state.is_world_process_zero = False
    callback = ConsoleCallback(trainer)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    callback.on_train_end(trainer.args, trainer.state, trainer.control)
    assert capsys.readouterr().out == ""
    trainer.state.is_world_process_zero = True
    callback.on_train_end(trainer.args, trainer.state, trainer.control)
    assert "Trained 8 steps" in capsys.readouterr().out


def test_it_can_be_taken_out(tmp_path, capsys):
    trainer = FeatureReuseTrainer(
        build("vit"), config(tmp_path, disable_tqdm=False, log_level="warning"), train_dataset=examples()
    )
    trainer.remove_callback(ConsoleCallback)
    trainer.train()
    assert "Feature reuse with" not in capsys.readouterr().out


def test_the_share_is_the_mean_over_steps_also_where_logs_are_uneven():
    log = [{"step": 1, "compute_share": 1.0}, {"step": 1, "eval_loss": 3.0}, {"step": 11, "compute_share": 0.5}]
    assert mean_compute_share(log) == pytest.approx((1 + 10 * 0.5) / 11)
    assert mean_compute_share([{"step": 3, "loss": 1.0}]) is None


def test_no_summary_stops_a_run(tmp_path, capsys, caplog):
    metrics = {"accuracy": {"accuracy": 0.5}}
    args = config(tmp_path, disable_tqdm=False, log_level="warning", eval_strategy="steps", eval_steps=6)
    data = {"train_dataset": examples(8), "eval_dataset": examples(8)}
    trainer = train(FeatureReuseTrainer(build("vit"), args, **data, compute_metrics=lambda _: metrics))
    printed = capsys.readouterr().out
    assert "Trained 6 steps" in printed
    assert "eval loss   " in printed
    assert "  accuracy    " not in printed
    # A log that a user's own callback has spoilt.
    trainer.state.log_history.append({"compute_share": "much", "step": 6})
    with caplog.at_level("WARNING", logger="hf_featreuse"):
        ConsoleCallback(trainer).on_train_end(trainer.args, trainer.state, trainer.control)
    assert "summary of the run could not be created" in caplog.text


def test_the_best_accuracy_is_named_where_it_was_not_the_last():
    log = [{"step": 5, "eval_accuracy": 0.9}, {"step": 9, "eval_accuracy": 0.8}, {"step": 9, "eval_loss": 1.0}]
    assert "80.0 % after step 9, at best 90.0 % after step 5" in closing_summary(log, steps=9, seconds=3)
    assert "eval loss   1 after step 9" in closing_summary(log[-1:], steps=9, seconds=3)


def test_in_a_notebook_the_kind_of_the_step_stands_before_the_bar(tmp_path):
    pytest.importorskip("IPython", reason="Trainer's bar of notebooks needs IPython")
    from transformers.utils.notebook import NotebookProgressCallback

    bar = NotebookProgressCallback()
    said = []

    class SeesTheTracker(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            said.append(bar.training_tracker.prefix.strip())

    trainer = run(tmp_path, callbacks=[bar, SeesTheTracker()], max_steps=4, disable_tqdm=True)
    schedule = trainer.feature_reuse.schedule
    assert said == [schedule.plan(step).kind.value.replace("_", " ") for step in range(4)]


def test_the_opening_summary_does_not_run_into_the_bar(tmp_path, capfd):
    run(tmp_path, max_steps=2)
    out = capfd.readouterr().out
    assert out.startswith("Feature reuse with") or "\nFeature reuse with" in out
