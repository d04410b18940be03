"""Early stopping sets the options it needs, and contradicting options are errors."""

import pytest

from hf_featreuse import ConfigurationError
from hf_featreuse.program import parse_arguments


def training(*words):
    return parse_arguments(["--use_cpu", "--early_stopping_patience", "2", *words]).training


def test_a_run_without_evaluations_gets_them_with_checkpoints_and_keeps_the_best():
    args = training("--train_dir", "x")
    assert (args.eval_strategy, args.save_strategy, args.metric_for_best_model) == ("epoch", "epoch", "loss")
    assert args.load_best_model_at_end and not args.greater_is_better
    assert args.restore_callback_states_from_checkpoint


def test_what_is_given_stays():
    args = training("--eval_strategy", "steps", "--eval_steps", "7", "--metric_for_best_model", "accuracy")
    assert (args.save_strategy, args.save_steps, args.greater_is_better) == ("steps", 7, True)
    args = training("--load_best_model_at_end", "false", "--save_strategy", "no")
    assert (args.load_best_model_at_end, args.save_strategy, args.eval_strategy) == (False, "no", "epoch")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_strategy", "no"], "needs evaluations during training, but `--eval_strategy no` was passed"),
        (["--save_strategy", "steps"], "`--save_strategy steps` differs from `--eval_strategy epoch`"),
        (["--early_stopping_threshold", "-1"], "early_stopping_threshold"),
    ],
)
def test_what_leaves_nothing_to_stop_by_is_refused(words, message):
    with pytest.raises(ConfigurationError, match=message):
        training(*words)


def test_a_threshold_needs_patience():
    with pytest.raises(ConfigurationError, match="no effect without `--early_stopping_patience`"):
        parse_arguments(["--use_cpu", "--early_stopping_threshold", "0.1"])
