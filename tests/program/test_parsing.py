"""Options from flags and files: which defaults hold, what overrides what, and what is refused."""

import json

import pytest

from hf_featreuse import ConfigurationError
from hf_featreuse.program import UsageError, parse_arguments
from hf_featreuse.program.arguments import DEFAULT_CHECKPOINT, DIGITS, FINE_TUNING, FROM_SCRATCH
from hf_featreuse.trainer.arguments import FeatureReuseConfig


def parsed(*words, **file):
    return parse_arguments(["--use_cpu", *words])


def used(options, defaults):
    values = {**vars(options.data), **vars(options.training)}
    return {name: values[name] for name in defaults}


def test_what_is_trained_decides_the_defaults():
    assert used(parsed(), DIGITS) == DIGITS
    from_scratch = parsed("--train_dir", "x", "--model_type", "vit", "--output_dir", "out")
    assert used(from_scratch, FROM_SCRATCH) == FROM_SCRATCH
    assert from_scratch.data.horizontal_flip == 0.5
    fine_tuning = parsed("--train_dir", "x")
    assert fine_tuning.model.model_name_or_path == DEFAULT_CHECKPOINT
    assert used(fine_tuning, FINE_TUNING) == FINE_TUNING
    plain = FeatureReuseConfig(use_cpu=True)
    for name in {*FROM_SCRATCH} - {*FINE_TUNING}:
        assert getattr(fine_tuning.training, name) == getattr(plain, name), name


def test_an_entry_for_fine_tuning_is_used(monkeypatch):
    monkeypatch.setitem(FINE_TUNING, "learning_rate", 3e-4)
    assert parsed("--train_dir", "x").training.learning_rate == 3e-4
    assert parsed("--train_dir", "x", "--learning_rate", "1e-5").training.learning_rate == 1e-5
    assert parsed().training.learning_rate == DIGITS["learning_rate"]


@pytest.mark.parametrize(
    ("words", "keeps_best"),
    [
        ([], True),
        (["--eval_strategy", "no"], False),
        (["--eval_strategy", "steps", "--eval_steps", "5"], False),
        (["--save_strategy", "steps"], False),
        (["--save_strategy", "no"], False),
        (["--eval_strategy", "epoch"], True),
        (["--load_best_model_at_end", "false"], False),
        (["--eval_strategy", "steps", "--save_strategy", "steps", "--load_best_model_at_end", "true"], True),
        (["--eval_strategy", "steps", "--eval_steps", "5", "--early_stopping_patience", "2"], True),
    ],
)
def test_fine_tuning_keeps_the_best_model_if_each_evaluation_has_a_checkpoint(words, keeps_best):
    assert parsed("--train_dir", "x", *words).training.load_best_model_at_end is keeps_best


def test_a_checkpoint_that_is_only_evaluated_is_not_fine_tuned():
    options = parsed("--model_name_or_path", "x", "--do_predict").training
    assert [options.do_train, options.do_eval, options.load_best_model_at_end] == [False, False, False]


def test_dashes_and_underscores_are_the_same():
    options = parsed("--drop-rate=0.2", "--no-scale-kept", "--config-overrides=a-b=1", "--masked-freeze-steps", "2")
    assert options.training.drop_rate == 0.2
    assert options.training.scale_kept is False
    assert options.training.masked_freeze_steps == 2
    assert options.model.config_overrides == "a-b=1"


def test_without_a_task_it_trains_and_evaluates():
    assert [parsed().training.do_train, parsed().training.do_eval] == [True, True]
    only = parsed("--do_predict", "--eval_strategy", "no").training
    assert [only.do_train, only.do_eval, only.do_predict] == [False, False, True]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--drop_rat", "1"], UsageError, "`--drop_rat 1` is not a flag. Did you mean --drop_rate"),
        (["--drop-rat=1"], UsageError, "Did you mean --drop_rate"),
        (["--max_steps", "x"], UsageError, "invalid int value"),
        (["--config"], UsageError, "expected one argument"),
        (["--drop_rate", "2"], ConfigurationError, "drop_rate"),
        (["--launch", "0"], ConfigurationError, "launch 0"),
        (["--early_stopping_patience", "0"], ConfigurationError, "early_stopping_patience 0"),
    ],
)
def test_what_cannot_be_read_is_told_from_what_cannot_be_used(words, error, message):
    with pytest.raises(error, match=message) as raised:
        parsed(*words)
    assert type(raised.value) is error


@pytest.mark.parametrize("ending", ["yaml", "yml", "json"])
def test_a_file_sets_options_and_flags_override_it(ending, tmp_path):
    file = tmp_path / f"run.{ending}"
    content = {
        "drop-rate": 0.25, "eval_strategy": "no", "learning_rate": 1e-4, "target_blocks": ["layers.0", "layers.1"],
        "max_train_samples": None, "use_cpu": True, "output_dir": "from-the-file",
    }  # fmt: skip
    lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in content.items())
    file.write_text(json.dumps(content) if ending == "json" else lines.replace('"no"', "no"))
    alone = parse_arguments([str(file)])
    assert (alone.training.drop_rate, alone.training.learning_rate) == (0.25, 1e-4)
    assert alone.training.eval_strategy == "no"
    assert alone.training.target_blocks == ["layers.0", "layers.1"]
    # A flag wins wherever it stands.
    flags = ["--drop_rate", "0.5", f"--config={file}", "--target-blocks", "layers.2", "--output_dir", "mine"]
    options = parse_arguments(flags)
    assert (options.training.drop_rate, options.training.output_dir) == (0.5, "mine")
    assert options.training.target_blocks == "layers.2"
    assert options.training.learning_rate == 1e-4


def test_a_file_without_data_is_of_the_digits(tmp_path):
    (tmp_path / "run.yaml").write_text("train_dir: null\nuse_cpu: true\n")
    assert parse_arguments([str(tmp_path / "run.yaml")]).training.output_dir == DIGITS["output_dir"]
